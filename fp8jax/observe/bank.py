"""The scales of many sites in one array: apart for the sites that read them, and what they observed together again."""

import dataclasses
import functools
import itertools
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from fp8jax import shims
from fp8jax.observe.share import merged_beside
from fp8jax.state import Group, SiteScales

_SPAN = 16  # pieces of an array in one stage
_MANY = 64  # arrays that one kernel puts together


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def unbind(array: jax.Array, group: Group, looped: bool = False) -> tuple[SiteScales, ...]:
    """The `SiteScales` of all sites of a group, from the group's array in a `Scales`; what they observed comes back as one array.

    The observations of a batch that shares the array merge by max.

    Args:
      array: float32 `stack + (sites, columns)`.
      group: which sites these are (static).
      looped: whether it is done in each iteration of a loop, with as few kernels as can be (static).

    >>> from fp8jax import recipes
    >>> group = Group(("down", "up"), recipes.delayed().delayed_casts)
    >>> [node.rhs for node in unbind(jnp.arange(12.0).reshape(2, 6), group)]
    [Array(1., dtype=float32), Array(7., dtype=float32)]
    """
    rows = _cut(array, len(group.sites)) if looped else _rows(array, len(group.sites))
    return _nodes(rows, group)


def _nodes(rows: Sequence[jax.Array], group: Group) -> tuple[SiteScales, ...]:
    return tuple(group.node(site, row) for site, row in zip(group.sites, rows, strict=True))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _rows(array: jax.Array, sites: int) -> tuple[jax.Array, ...]:
    if array.ndim > 2:  # for a scan, which slices them
        return _cut(array, sites)
    return jax.lax.platform_dependent(
        array,
        cpu=functools.partial(_rows_on_cpu, sites=sites),
        default=functools.partial(_cut, sites=sites),
    )


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _cut(array: jax.Array, sites: int) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.index_in_dim(array, site, -2, keepdims=False) for site in range(sites))


def _rows_on_cpu(array, sites):
    """`_cut`, in stages.

    XLA's CPU compiler takes 10 ms for the kernel of each piece, but makes only one for all that are alike: such as the
    pieces at the same place of equally long arrays, if these are buffers and not fused away. A conditional's results are
    buffers, so each stage is one; and of what reads them, kernels that are alike but for the site are one, too.
    """
    lengths, arrays = (sites,), (array,)
    for span in (_SPAN**2, _SPAN, 1):
        if span > 1 and sites <= span:
            continue
        parts = [
            [min(span, length - start) for start in range(0, length, span)] for length in lengths
        ]

        def cut(*arrays, parts=parts):
            starts = [[0, *itertools.accumulate(lengths)] for lengths in parts]
            return tuple(
                jax.lax.slice_in_dim(array, start, start + length)
                for array, of_array, lengths in zip(arrays, starts, parts, strict=True)
                for start, length in zip(of_array, lengths)
            )

        def never(*arrays, cut=cut):
            return jax.tree.map(jnp.zeros_like, cut(*arrays))

        # Always true, which XLA can't know.
        arrays = jax.lax.cond(array[0, 0] != -jnp.inf, cut, never, *arrays)
        lengths = [length for of_array in parts for length in of_array]
    return tuple(array[0] for array in arrays)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _joined(nodes: Sequence[SiteScales], casts: tuple) -> jax.Array:
    rows = [jnp.expand_dims(Group((), casts).row(node), -2) for node in nodes]
    while len(rows) > 1:
        # In stages, kept apart: a kernel that reads very many arrays takes a compiler long.
        parts = [rows[start : start + _MANY] for start in range(0, len(rows), _MANY)]
        stages = [jnp.concatenate(part, -2) for part in parts]
        rows = jax.lax.optimization_barrier(stages) if len(stages) > 1 else stages
    return rows[0]


def _anonymous(nodes: Sequence[SiteScales]) -> list[SiteScales]:
    """Without their names, which would make each group another case to trace."""
    return [node.replace(site="") for node in nodes]


unbind.defvjp(
    lambda array, group, looped: (unbind(array, group, looped), array),
    lambda group, looped, array, observations: (
        merged_beside(_joined(_anonymous(observations), group.casts), array),
    ),
)


@jax.custom_vjp
def bind(nodes: tuple[SiteScales, ...]) -> jax.Array:
    """The array that `unbind` takes apart, of sites with the same casts and shapes; a scan slices it by one kernel for all.

    >>> from fp8jax import recipes
    >>> nodes = tuple(SiteScales.zeros(name, recipes.delayed().delayed_casts, (3,)) for name in ("down", "up"))
    >>> bind(nodes).shape
    (3, 2, 6)
    """
    return _joined(_anonymous(nodes), nodes[0].casts)


def _bind_bwd(nodes, observations):
    group = Group(tuple(node.site for node in nodes), nodes[0].casts)
    seen = _nodes(_cut(observations, len(nodes)), group)
    # A batch that shares some of the scales and not others was made to have all of its own.
    return (jax.tree.map(merged_beside, seen, nodes),)


bind.defvjp(lambda nodes: (bind(nodes), nodes), _bind_bwd)


def groups_of(scales: dict[str, SiteScales]) -> dict[Group, tuple[SiteScales, ...]]:
    """`scales` in groups that can be one array each: of the same casts and shapes, and varying over the same mesh axes."""
    groups: dict[Any, list[SiteScales]] = {}
    for node in scales.values():
        alike = node.casts, node.seal.shape, shims.varying_axes(node.seal)
        groups.setdefault(alike, []).append(node)
    return {
        Group(tuple(node.site for node in nodes), nodes[0].casts): tuple(nodes)
        for nodes in groups.values()
    }


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "array"],
    meta_fields=["group", "index"],
)
@dataclasses.dataclass(frozen=True)
class Sliced:
    """The scales of a site in one iteration of a scan, and the slice that they come from.

    A backward pass reads them in there again: the slice is of an array that is there, and keeping it takes no other.

    Attributes:
      scales: the site's.
      array: one iteration's slice of what `bind` put together.
      group, index: whose it is, and the place of the site in it (static).
    """

    scales: SiteScales
    array: jax.Array
    group: Group
    index: int

    def again(self) -> SiteScales:
        """The site's scales, from the slice."""
        row = jax.lax.index_in_dim(self.array, self.index, -2, keepdims=False)
        return self.group.node(self.group.sites[self.index], row)


def sites_in(array: jax.Array, group: Group) -> dict[str, Sliced]:
    """`unbind` in an iteration of a scan, of scales by site.

    >>> from fp8jax import recipes
    >>> group = Group(("down", "up"), recipes.delayed().delayed_casts)
    >>> sites_in(jnp.arange(12.0).reshape(2, 6), group)["up"].again().lhs
    Array(6., dtype=float32)
    """
    nodes = unbind(array, group, True)
    return {node.site: Sliced(node, array, group, index) for index, node in enumerate(nodes)}


def own_scales(scales: SiteScales | Sliced | None) -> SiteScales | None:
    """A site's scales alone."""
    return scales.scales if isinstance(scales, Sliced) else scales


@jax.custom_vjp
def read_together(nodes: tuple[SiteScales, ...]) -> tuple[SiteScales, ...]:
    """Scales that came one by one, as they are; but where that spares kernels, read from one array.

    From numbers of their own a GPU computes each site's scales, and each product of two, by a kernel of its own; of what is read
    from one array, it computes all in one. A CPU makes one kernel for all numbers that are alike, and many for parts of arrays.

    >>> from fp8jax import recipes
    >>> read_together((SiteScales.zeros("dot", recipes.delayed().delayed_casts),))[0].lhs
    Array(0., dtype=float32)
    """

    def from_one_array(nodes):
        group = Group(tuple(node.site for node in nodes), nodes[0].casts)
        # Kept in one piece, or XLA would see through to the numbers.
        array = jax.lax.optimization_barrier(_joined(_anonymous(nodes), group.casts))
        return _nodes(_cut(array, len(nodes)), group)

    return jax.lax.platform_dependent(nodes, cpu=lambda nodes: nodes, default=from_one_array)


# As for `bind`: of a batch that shares some of the scales, all have become each member's own.
read_together.defvjp(
    lambda nodes: (read_together(nodes), nodes),
    lambda nodes, observations: (jax.tree.map(merged_beside, observations, nodes),),
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["tree"])
@dataclasses.dataclass(frozen=True)
class Numbers:
    """A pytree of numbers that all have the same shape, along the last axis of one array.

    >>> Numbers.of({"a": jnp.float32(1), "b": None, "c": jnp.float32(2)}, ()).apart()
    {'a': Array(1., dtype=float32), 'b': None, 'c': Array(2., dtype=float32)}
    """

    packed: jax.Array
    tree: Any

    @classmethod
    def of(cls, numbers: Any, shape: tuple[int, ...]) -> "Numbers":
        leaves, tree = jax.tree.flatten(numbers)
        return cls(
            jnp.stack(
                [jnp.broadcast_to(leaf, shape) for leaf in leaves]
                or [jnp.zeros(shape, jnp.float32)],
                axis=-1,
            ),
            tree,
        )

    def apart(self) -> Any:
        return jax.tree.unflatten(
            self.tree, list(jnp.moveaxis(self.packed, -1, 0))[: self.tree.num_leaves]
        )
