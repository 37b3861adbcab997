"""Names of sites, from the name stacks of their equations and the weights that they read."""

import collections
import dataclasses
import itertools
import re
import urllib.parse
from typing import Iterable, Iterator, Sequence

import jax

# What JAX, Flax and Equinox add to a module's path: the transformation an equation came from, the einsum it was written
# as, the method that was called, the class of a layer.
_TRANSFORMATION = re.compile(r"\b(?:jvp|transpose|vmap|linearize)\(")
_ADDED_ELEMENT = re.compile(r"^(?:rematted_computation|checkpoint|remat2?|)$|->|^eqx\.nn\.")
_METHOD = re.compile(r"\.(?:<lambda>|[A-Za-z_]\w*)$")
_RECOMPUTED = "rematted_computation"
# The backward pass of a checkpoint has its scope twice.
_TWICE = re.compile(r"transpose\(jvp\([^()]*\)\)/jvp\(")


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
    return _TWICE.sub("transpose(jvp(", str(name_stack)).rpartition(ROOT)[2].lstrip("/)")


def scope_of(outer: str, name_stack: object) -> str:
    """The path of an equation inside `outer`: module path or name scopes, without what JAX and Flax add to it.

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
        # A module's method called from another of its methods stands in the stack behind the module once more.
        is_repeated = name != element and path and path[-1].rpartition("/")[2] == name
        if name and not is_repeated and not _ADDED_ELEMENT.search(element):
            path.append(name)
    return "/".join(path)


def derivative_of(outer: str, name_stack: object) -> str:
    """What an equation is of a derivative that the function itself takes: "transpose" (its backward pass), "remat" (what
    that computes again), or "" where it is of none; inside an equation that is `outer`.

    >>> derivative_of("", "mlp/jvp(up)"), derivative_of("", "transpose(jvp(up))"), derivative_of("transpose", "up")
    ('', 'transpose', 'transpose')
    """
    text = str(name_stack)
    return "remat" if _RECOMPUTED in text else "transpose" if "transpose(" in text else outer


# By these names Flax calls the one weight of a layer: the layer's path is enough.
_SOLE = ("kernel", "embedding")

# What products that don't read exactly one weight are called, below their scope.
DATA, WEIGHTS_ALONE = "data", "weights"


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A leaf of the weights: what a value that was computed from weights goes by.

    Args:
      path: from the root of the weights on; the names that Flax gives to a layer's one weight left out.
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

        >>> up = (jax.tree_util.DictKey("up"), jax.tree_util.DictKey("kernel"), jax.tree_util.GetAttrKey("value"))
        >>> Weight.at(up, 16, 0).path, Weight.at((jax.tree_util.DictKey("mlp/~/up"), jax.tree_util.DictKey("w")), 16, 0).path
        (('up',), ('mlp', 'up', 'w'))
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
        return cls(
            whole[:-1] if whole[-1:] and whole[-1] in _SOLE else whole, whole, size, position
        )

    def larger(self, other: "Weight | None") -> "Weight":
        """The larger of two, which names what was computed from both; the first of equals."""
        return min(filter(None, (self, other)), key=lambda weight: (-weight.size, weight.position))


class Namer:
    """Hands out the names of sites: by the scope of the product and the weight that it reads, and by nothing else.

    So a site has its name whatever other sites are traced with it. The weight's path adds to the scope what the scope
    does not say yet; where that would make two weights of the tree alike, all of it. Only products of one scope that
    read the same weight, or none, are counted.

    >>> a, b = (Weight.at((jax.tree_util.DictKey(name),), 16, i) for i, name in enumerate("ab"))
    >>> namer = Namer([a, b])
    >>> namer("mlp", b), namer("mlp", a), namer("mlp/a", a), namer("mlp", a), namer("", a)
    ('mlp/b', 'mlp/a', 'mlp/a#1', 'mlp/a#2', 'a')
    >>> namer("mlp", DATA), Namer([])("", None)
    ('mlp/data', 'dot')
    """

    def __init__(self, weights: Iterable[Weight]):
        self._counts: collections.Counter[str] = collections.Counter()
        self._taken: set[str] = set()
        self._tree: dict = {}
        for weight in weights:
            node = self._tree
            for element in weight.path:
                node = node.setdefault(element, {})
            node.setdefault(None, []).append(weight)

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
        below = (
            self._below(scope, reads) if isinstance(reads, Weight) else (reads,) if reads else ()
        )
        name = "/".join(filter(None, (prefix, scope, *below, derivative))) or "dot"
        for count in itertools.count(self._counts[name]):
            counted = f"{name}#{count}" if count else name
            if counted not in self._taken:  # by a weight that is called so
                break
        self._counts[name] = count + 1
        self._taken.add(counted)
        return counted

    def _below(self, scope: str, weight: Weight) -> tuple[str, ...]:
        path = scope.split("/") if scope else []
        rest = _unsaid(path, weight.path)
        return rest if len(set(self._alike(self._tree, path, rest))) < 2 else weight.whole

    def _alike(self, node: dict, path: Sequence[str], rest: tuple[str, ...]) -> Iterator[Weight]:
        """The weights whose path is `rest` behind a part of `path`."""
        end = node
        for element in rest:
            end = end.get(element, {})
        yield from end.get(None, ())
        for index, element in enumerate(path):
            if element in node:
                yield from self._alike(node[element], path[index + 1 :], rest)


def _unsaid(scope: Sequence[str], path: tuple[str, ...]) -> tuple[str, ...]:
    """What is left of `path` behind its longest part that stands in `scope`, in order.

    >>> _unsaid(["decoder", "mlp", "x"], ("decoder", "x")), _unsaid(["mlp"], ("layers", "0", "up"))
    ((), ('layers', '0', 'up'))
    """
    remaining = iter(scope)
    for index, element in enumerate(path):
        if element not in remaining:
            return path[index:]
    return ()
