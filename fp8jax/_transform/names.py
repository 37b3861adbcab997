"""Names of sites, from the name stacks of their equations and the weights that they read."""

import collections
import contextlib
import dataclasses
import re
import sys
import urllib.parse
from collections.abc import Sequence

import jax

# What JAX, Flax and Equinox add to a module's path: the transformation an equation came from, the
# einsum it was written as, the method that was called, the class of a layer.
_TRANSFORMATION = re.compile(r"\b(?:jvp|transpose|vmap|linearize)\(")
_ADDED_ELEMENT = re.compile(r"^(?:rematted_computation|checkpoint|remat2?|)$|->|^eqx\.nn\.")
_METHOD = re.compile(r"\.(?:<lambda>|[A-Za-z_]\w*)$")
_RECOMPUTED = "rematted_computation"
# The backward pass of a checkpoint has its scope twice.
_TWICE = re.compile(r"transpose\(jvp\([^()]*\)\)/jvp\(")


# The scope that a function is traced in, so that what its caller's scopes are called has no part in
# its sites' names.
ROOT = "fp8jax_root"


# The scope that our own products are traced in: they are cast already.
PRODUCT = "fp8jax_product"


# How the name of its site stands in the name stack of each of a product's instructions, behind
# PRODUCT. Quoted, since a name holds slashes: it stays one element, whatever JAX and XLA put around
# it.
_SITE = "fp8jax_site."


def site_scope(name: str) -> str:
    """The name scope that tells a compiled program's instructions which site they are of.

    >>> site_scope("decoder/mlp#1")
    'fp8jax_site.decoder%2Fmlp%231'
    """
    return _SITE + urllib.parse.quote(name, safe="")


def site_in(name_stack: str) -> str | None:
    """The site that a name stack, or a compiled instruction's `op_name`, is of; None where it is of
    none.

    >>> site_in("jit(step)/jvp(fp8jax_product)/fp8jax_site.decoder%2Fmlp%231/dlhs/dot_general")
    'decoder/mlp#1'
    """
    found = re.findall(rf"{re.escape(_SITE)}([\w.~%-]+)", name_stack)
    return urllib.parse.unquote(found[-1]) if found else None


def is_own(scope: str) -> bool:
    """Whether an equation of this path is part of one of our own products, in a function that was
    transformed before.
    """
    return PRODUCT in scope.split("/")


def below_root(name_stack: object) -> str:
    """A name stack, or the part of it that the function itself added.

    >>> below_root("step/jvp(model)/fp8jax_root/mlp")
    'mlp'
    """
    return _TWICE.sub("transpose(jvp(", str(name_stack)).rpartition(ROOT)[2].lstrip("/)")


def scope_of(outer: str, name_stack: object) -> str:
    """The path of an equation inside `outer`: module path or name scopes, without what JAX and Flax
    add to it.

    >>> scope_of("decoder", "layers.encode/jvp(mlp)/...qhd,...khd->...hqk")
    'decoder/layers/mlp'
    >>> scope_of("", "model/encoder/encoder.embed/table")
    'model/encoder/table'
    >>> scope_of("decoder", "fp8jax_root/layers/attn")  # A path that is whole already.
    'layers/attn'
    >>> scope_of("", "transpose(jvp(mlp))/jvp(mlp)")
    'mlp'
    """
    text, stripped = _TRANSFORMATION.subn("", below_root(name_stack))
    if stripped:
        text = text.replace(")", "")
    path = [outer] if outer and ROOT not in str(name_stack) else []
    for element in text.split("/"):
        name = _METHOD.sub("", element)
        # A module's method called from another of its methods stands in the stack behind the module
        # once more.
        is_repeated = name != element and path and path[-1].rpartition("/")[2] == name
        if name and not is_repeated and not _ADDED_ELEMENT.search(element):
            path.append(name)
    return "/".join(path)


def derivative_of(outer: str, name_stack: object) -> str:
    """What an equation is of a derivative that the function itself takes: "transpose" (its backward
    pass), "remat" (what that computes again), or "" where it is of none; inside an equation that is
    `outer`.

    >>> derivative_of("", "mlp/jvp(up)"), derivative_of("", "transpose(jvp(up))")
    ('', 'transpose')
    >>> derivative_of("transpose", "up")
    'transpose'
    """
    text = str(name_stack)
    return "remat" if _RECOMPUTED in text else "transpose" if "transpose(" in text else outer


# So Flax calls the one weight of a layer: the layer's path is enough.
_SOLE = "kernel"

# What products that don't read exactly one weight are called, below their scope: where none of the
# operands is computed from weights only; and where one is, but by a product, or both are.
DATA, WEIGHTS_ALONE = "data", "weights"

# What a name may end in that is not of its weight's path.
_OWN_WORDS = (DATA, WEIGHTS_ALONE, "transpose", "remat")
_NAMELESS = "dot"

# What sets a weight's path apart from a scope, a counter from a name, and what these are written as
# where they are part of a name.
_QUOTED = str.maketrans({sign: urllib.parse.quote(sign) for sign in ":#%"})


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A leaf of the weights: what a value that was computed from weights goes by.

    Args:
      path: from the root of the weights on; the name that Flax gives to a layer's one weight left
        out.
      whole: the same with nothing left out.
      size: its number of elements.
      position: its place among all leaves.
    """

    path: tuple[str, ...]
    whole: tuple[str, ...]
    size: int
    position: int

    @classmethod
    def at(cls, path: tuple, size: int, position: int, prefix: tuple[str, ...] = ()) -> "Weight":
        """The leaf at a path of JAX's.

        >>> from jax.tree_util import DictKey, GetAttrKey
        >>> Weight.at((DictKey("up"), DictKey("kernel"), GetAttrKey("value")), 16, 0).path
        ('up',)
        >>> Weight.at((DictKey("mlp/~/up"), DictKey("w")), 16, 0).path
        ('mlp', 'up', 'w')
        """
        if path and path[-1] == jax.tree_util.GetAttrKey(
            "value"
        ):  # a box of Flax's around the array
            path = path[:-1]
        # Haiku's keys are whole paths, with "~" for what is made outside of a call.
        elements = (
            element
            for key in path
            for element in jax.tree_util.keystr((key,), simple=True).split("/")
        )
        whole = (*prefix, *(element for element in elements if element != "~"))
        return cls(whole[:-1] if whole[-1:] == (_SOLE,) else whole, whole, size, position)

    @classmethod
    def product(cls, size: int) -> "Weight":
        """What a product of weights goes by: by none of them. A larger weight that it is added to
        still names the sum.
        """
        return cls((), (), size, sys.maxsize)

    @property
    def is_product(self) -> bool:
        """Whether it is no leaf, but a product of some."""
        return self.position == sys.maxsize

    def is_of(self, scope: Sequence[str]) -> bool:
        """Whether it is a parameter of the very module whose path is this scope."""
        return bool(scope) and self.whole[:-1] == tuple(scope)

    def larger(self, other: "Weight | None") -> "Weight":
        """The larger of two, which names what was computed from both; the first of equals."""
        return min(filter(None, (self, other)), key=lambda weight: (-weight.size, weight.position))


class Namer:
    """Hands out the names of sites: by the scope of the product and the weight that it reads, and
    by nothing else.

    So a site has its name whatever other sites are traced with it, and whatever else is among the
    weights. Where the scope is the weight's path or a first part of it, as in a module, the name is
    that path; elsewhere it is the scope, a colon, and the path. Only products that read the same
    weight there, or none, are counted.

    >>> a, b = (Weight.at((jax.tree_util.DictKey(name),), 16, i) for i, name in enumerate("ab"))
    >>> namer = Namer()
    >>> namer("", b), namer("mlp", b), namer("mlp", a), namer("mlp/a", a), namer("mlp", a)
    ('b', 'mlp:b', 'mlp:a', 'mlp/a:a', 'mlp:a#1')
    >>> up = Weight.at(tuple(map(jax.tree_util.DictKey, ("mlp", "up", "kernel"))), 16, 2)
    >>> namer("mlp/up", up), namer("", up, "transpose"), namer("mlp", DATA), Namer()("", None)
    ('mlp/up', 'mlp/up/transpose', 'mlp/data', 'dot')
    """

    def __init__(self):
        self._counts: collections.Counter[str] = collections.Counter()

    def __call__(
        self, scope: str, reads: Weight | str | None, derivative: str = "", prefix: str = ""
    ) -> str:
        """The name of the next product.

        Args:
          scope: its path.
          reads: the weight that it reads; or what to call it where there is not exactly one.
          derivative: "transpose" or "remat", where it is of a derivative that the function takes.
          prefix: a path to put before the scope.
        """
        path, before = (tuple(filter(None, text.split("/"))) for text in (scope, prefix))
        if isinstance(reads, Weight):
            name = _joined(before, path, reads)
        else:
            name = _quoted((*before, *path, *filter(None, (reads,))))
        name = "/".join(filter(None, (name, derivative))) or _NAMELESS
        count = self._counts[name]
        self._counts[name] += 1
        return f"{name}#{count}" if count else name


def _joined(before: tuple[str, ...], scope: tuple[str, ...], weight: Weight) -> str:
    if not weight.whole:  # The tree is this one array.
        return _quoted((*before, *scope))
    is_within = weight.path[: len(scope)] == scope
    is_plain = weight.path != (_NAMELESS,) and weight.path[-1:] not in [(w,) for w in _OWN_WORDS]
    if is_within and is_plain:
        return _quoted((*before, *weight.path))
    return _quoted((*before, *scope)) + ":" + _quoted(weight.path or weight.whole)


def _quoted(path: Sequence[str]) -> str:
    return "/".join(element.translate(_QUOTED) for element in path)


@contextlib.contextmanager
def context_of(equation):
    """Traces what stands for an equation in its scope, and under its settings of JAX."""
    stack = below_root(equation.source_info.name_stack)
    with equation.ctx.manager, jax.named_scope(stack) if stack else contextlib.nullcontext():
        yield
