"""Many scales in one array, for scans."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.observe.share import merged_beside


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
