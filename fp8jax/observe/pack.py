"""Many scales in one array, for scans and for programs of many sites."""

import dataclasses
import functools
import itertools
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import shims
from fp8jax.observe.share import merged_beside
from fp8jax.state import SiteScales

_SITES = 16  # in an array: a kernel that reads very many arrays takes a compiler long


@jax.custom_vjp
def pack(scales):
    """All numbers of `scales`, whose leaves have the same leading axis, in one array; for a scan's
    `xs`.

    A scan slices each array that goes in, and stacks each array of observations that comes out, by
    a kernel of its own.

    Args:
      scales: pytree of float32 arrays `[length, ...]`.

    Returns:
      float32 array `[length, numbers]`.

    >>> pack({"a": jnp.zeros(2), "b": jnp.ones((2, 3))})
    Array([[0., 1., 1., 1.],
           [0., 1., 1., 1.]], dtype=float32)
    """
    return jnp.concatenate(
        [
            leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
            for leaf in jax.tree.leaves(scales)
        ],
        axis=1,
    )


def _pack_bwd(scales, observations):
    leaves, tree = jax.tree.flatten(scales)
    pieces = _pieces(observations, [leaf.shape for leaf in leaves])
    # A batch that shares some of the scales and not others was made to have all of its own.
    return (jax.tree.unflatten(tree, list(map(merged_beside, pieces, leaves))),)


pack.defvjp(lambda scales: (pack(scales), scales), _pack_bwd)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "packed"],
    meta_fields=["start", "tree", "shapes"],
)
@dataclasses.dataclass(frozen=True)
class Sliced:
    """The scales of a site in one iteration of a scan, and the slice that they come from.

    A backward pass reads them in there again: the slice is of an array that is there, and keeping
    it takes no other.

    Attributes:
      scales: the site's.
      packed: one iteration's slice of what `pack` put together.
      start, tree, shapes: where in it they are, and how (static).
    """

    scales: SiteScales
    packed: jax.Array | None
    start: int
    tree: Any
    shapes: tuple

    def again(self) -> SiteScales:
        """The site's scales, from the slice."""
        packed = jnp.asarray(self.packed)[..., self.start :]
        return jax.tree.unflatten(self.tree, _pieces(packed, self.shapes))


def sites_in(packed: jax.Array, slices: tuple) -> dict[str, Sliced]:
    """`unpack`, of scales by site.

    >>> lhs, seal = jnp.full(2, 3.0), jnp.zeros((2, 3))
    >>> scales = {name: SiteScales(lhs, None, None, seal, None, name, ()) for name in ("a", "b")}
    >>> both = sites_in(pack(scales)[0], slices_of(scales))
    >>> both["b"].start, both["b"].again().lhs
    (4, Array(3., dtype=float32))
    """
    found, start = {}, 0
    for name, node in unpack(packed, slices).items():
        leaves, tree = jax.tree.flatten(node)
        shapes = tuple(leaf.shape for leaf in leaves)
        found[name] = Sliced(node, packed, start, tree, shapes)
        start += sum(map(math.prod, shapes))
    return found


def groups_by_axes(scales: dict[str, SiteScales]) -> list[dict[str, SiteScales]]:
    """`scales` in groups that can be one array each: they vary over the same mesh axes."""
    groups = {}
    for name, node in scales.items():
        groups.setdefault(shims.varying_axes(node.seal), {})[name] = node
    return list(groups.values())


@jax.custom_vjp
def read_from_arrays(scales: dict[str, SiteScales]) -> dict[str, SiteScales]:
    """`scales` of sites, none of them stacked, as they are; but where that spares kernels, read
    from arrays of many each.

    From numbers of their own a GPU computes each site's scales, and each product of two, by a
    kernel of its own; of what is read from one array, it computes all in one. A CPU makes one
    kernel for all numbers that are alike, and many for parts of arrays.

    >>> lhs, seal = jnp.float32(3), jnp.zeros(3)
    >>> scales = {name: SiteScales(lhs, None, None, seal, None, name, ()) for name in ("a", "b")}
    >>> read_from_arrays(scales)["b"].lhs
    Array(3., dtype=float32)
    """
    found = {}
    for group in groups_by_axes(scales):
        for start in range(0, len(group), _SITES):
            some = dict(list(group.items())[start : start + _SITES])
            found |= jax.lax.platform_dependent(
                some, cpu=lambda some: some, default=_read_from_array
            )
    return found


def _read_from_array(scales):
    stacks = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), scales)
    # Kept in one piece, or XLA would see through to the numbers.
    return unpack(jax.lax.optimization_barrier(pack(stacks)[0]), slices_of(stacks))


# As for `pack`: of a batch that shares some of the scales, all have become each member's own.
read_from_arrays.defvjp(
    lambda scales: (read_from_arrays(scales), scales),
    lambda scales, observations: (jax.tree.map(merged_beside, observations, scales),),
)


@typing.overload
def own_scales(scales: SiteScales | Sliced) -> SiteScales: ...


@typing.overload
def own_scales(scales: SiteScales | Sliced | None) -> SiteScales | None: ...


def own_scales(scales: SiteScales | Sliced | None) -> SiteScales | None:
    """A site's scales alone."""
    return scales.scales if isinstance(scales, Sliced) else scales


def slices_of(scales) -> tuple:
    """What one iteration sees of `scales`: the structure, and the shapes of the leaves; hashable,
    for `unpack`.
    """
    leaves, tree = jax.tree.flatten(scales)
    return tree, tuple(leaf.shape[1:] for leaf in leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unpack(packed: jax.Array, slices: tuple):
    """One iteration's slice of what `pack` put together, as a pytree again.

    >>> scales = {"a": jnp.zeros(2), "b": jnp.ones((2, 3))}
    >>> unpack(pack(scales)[0], slices_of(scales))
    {'a': Array(0., dtype=float32), 'b': Array([1., 1., 1.], dtype=float32)}
    """
    tree, shapes = slices
    return jax.tree.unflatten(tree, _pieces(packed, shapes))


def _unpack_bwd(slices, residuals, observations):
    del slices, residuals
    return (jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(observations)]),)


unpack.defvjp(lambda packed, slices: (unpack(packed, slices), None), _unpack_bwd)


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


def _pieces(packed: jax.Array, shapes) -> list[jax.Array]:
    """The last axis of `packed` cut into arrays of these shapes; the axis before it, if any, is
    theirs too.
    """
    sizes = [math.prod(shape[packed.ndim - 1 :]) for shape in shapes]
    ends = itertools.accumulate(sizes)
    return [
        jax.lax.slice_in_dim(packed, end - size, end, axis=-1).reshape(shape)
        for shape, size, end in zip(shapes, sizes, ends)
    ]
