"""Names of sites, from the name stacks of their equations."""

import re
import urllib.parse

# What JAX and Flax add to a module's path: the transformation an equation came from, the einsum it was written as, the
# method that was called.
_TRANSFORMATION = re.compile(r"\b(?:jvp|transpose|vmap|linearize)\(")
_ADDED_ELEMENT = re.compile(r"^(?:rematted_computation|checkpoint|remat2?|)$|->")
_METHOD = re.compile(r"\.(?:<lambda>|[A-Za-z_]\w*)$")
_DEFAULT = {"dot_general": "dot", "conv_general_dilated": "conv", "ragged_dot_general": "ragged_dot"}


# The scope that a function is traced in, so that what its caller's scopes are called has no part in its sites' names.
ROOT = "fp8jax_root"


# The scope that our own products are traced in: they are cast already.
PRODUCT = "fp8jax_product"


# How the name of its site stands in the name stack of each of a product's instructions, behind PRODUCT. Quoted, since a
# name holds slashes: it stays one element, whatever JAX and XLA put around it.
_SITE = "fp8jax_site."


def site_scope(name: str) -> str:
    """The name scope that tells a compiled program's instructions which site they are of.

    >>> site_scope("decoder/mlp#1")
    'fp8jax_site.decoder%2Fmlp%231'
    """
    return _SITE + urllib.parse.quote(name, safe="")


def site_in(name_stack: str) -> str | None:
    """The site that a name stack, or a compiled instruction's `op_name`, is of; None where it is of none.

    >>> site_in("jit(step)/transpose(jvp(fp8jax_product))/fp8jax_site.decoder%2Fmlp%231/dlhs/dot_general")
    'decoder/mlp#1'
    """
    found = re.findall(rf"{re.escape(_SITE)}([\w.~%-]+)", name_stack)
    return urllib.parse.unquote(found[-1]) if found else None


def is_own(scope: str) -> bool:
    """Whether an equation of this path is part of one of our own products, in a function that was transformed before."""
    return PRODUCT in scope.split("/")


def below_root(name_stack: object) -> str:
    """A name stack, or the part of it that the function itself added.

    >>> below_root("step/jvp(model)/fp8jax_root/mlp")
    'mlp'
    """
    return str(name_stack).rpartition(ROOT)[2].lstrip("/)")


def scope_of(outer: str, name_stack: object) -> str:
    """The path of an equation inside `outer`: module path or name scopes, without what JAX and Flax add to it.

    >>> scope_of("decoder", "layers.encode/jvp(mlp)/...qhd,...khd->...hqk")
    'decoder/layers/mlp'
    >>> scope_of("", "model/encoder/encoder.embed/table")
    'model/encoder/table'
    >>> scope_of("decoder", "fp8jax_root/layers/attn")  # A path that is whole already.
    'layers/attn'
    """
    text, stripped = _TRANSFORMATION.subn("", below_root(name_stack))
    if stripped:
        text = text.replace(")", "")
    path = [outer] if outer and ROOT not in str(name_stack) else []
    for element in text.split("/"):
        name = _METHOD.sub("", element)
        # A module's method called from another of its methods stands in the stack behind the module once more.
        is_repeated = name != element and path and path[-1].rpartition("/")[2] == name
        if name and not is_repeated and not _ADDED_ELEMENT.search(element):
            path.append(name)
    return "/".join(path)


class Namer:
    """Hands out unique names: the scope, and from the second product in it on, a counter.

    >>> namer = Namer()
    >>> namer("mlp", "dot_general"), namer("mlp", "dot_general"), namer("", "dot_general")
    ('mlp', 'mlp#1', 'dot')
    """

    def __init__(self):
        self._counts: dict[str, int] = {}

    def __call__(self, scope: str, product: str) -> str:
        scope = scope or _DEFAULT[product]
        count = self._counts.get(scope, 0)
        self._counts[scope] = count + 1
        return f"{scope}#{count}" if count else scope
