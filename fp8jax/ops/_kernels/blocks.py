"""Operands in the one form that kernels take: `[batch, kept, contracted]`, and a scale for each
block of the last axis.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.ops._cast import Codes


def extent_along(codes: Codes, axis: int) -> int | None:
    """How many elements along an axis share a scale; None where all do.

    >>> from fp8jax._boxes import Boxes
    >>> from fp8jax import CastSpec
    >>> data, scale, spec = jnp.zeros((4, 256)), jnp.ones((4, 2)), CastSpec("E4M3")
    >>> extent_along(Codes.of(data, scale, spec, Boxes((1, 128))), 1)
    128
    """
    size = codes.shape[axis]
    extent = codes.scaling.normalize(codes.ndim).block(codes.shape)[axis]
    return None if extent is None or extent >= size else extent


def in_blocks(
    codes: Codes, batch: tuple[int, ...], contracted: tuple[int, ...], unit: int
) -> tuple[jax.Array, jax.Array]:
    """Codes as `[batch, kept, contracted]`, and their scales as `[batch, kept, contracted / unit]`.

    Args:
      codes: an operand.
      batch, contracted: its axes; along the last contracted one, `unit` divides the extent of its
        groups.
      unit: how many elements of the last contracted axis a scale is for. The axis is filled up with
        zeros to whole ones.

    >>> from fp8jax._boxes import Boxes
    >>> from fp8jax import CastSpec
    >>> data, scale = jnp.zeros((6, 70), jnp.uint8), jnp.ones((6, 2))
    >>> codes = Codes.of(data, scale, CastSpec("E4M3"), Boxes((1, 64)))
    >>> [part.shape for part in in_blocks(codes, (), (1,), 32)]
    [(1, 6, 96), (1, 6, 3)]
    """
    last, size = contracted[-1], codes.shape[contracted[-1]]
    blocks = -(-size // unit)
    scale = codes.scale
    scale = scale.reshape(scale.shape + (1,) * (codes.ndim - scale.ndim))
    for axis in range(codes.ndim):
        extent = extent_along(codes, axis) or codes.shape[axis]
        if axis == last:
            scale = _spread(scale, axis, -(-extent // unit), blocks)
        else:
            scale = _spread(scale, axis, extent, codes.shape[axis])
    kept = tuple(axis for axis in range(codes.ndim) if axis not in batch + contracted)
    order = batch + kept + contracted
    data = codes.data
    if tail := blocks * unit - size:
        tails = [(0, tail if axis == last else 0, 0) for axis in range(codes.ndim)]
        data = lax.pad(data, jnp.zeros((), data.dtype), tails)
    data, scale = (jnp.transpose(part, order) for part in (data, scale))
    rows = [
        math.prod(data.shape[: len(batch)]),
        math.prod(data.shape[len(batch) : -len(contracted)]),
    ]
    return (
        data.reshape(*rows, math.prod(data.shape[-len(contracted) :])),
        scale.reshape(*rows, math.prod(scale.shape[-len(contracted) :])),
    )


def _spread(scale: jax.Array, axis: int, times: int, size: int) -> jax.Array:
    """Each entry along an axis so many times, up to a size."""
    if scale.shape[axis] == 1:
        shape = (*scale.shape[:axis], size, *scale.shape[axis + 1 :])
        return jnp.broadcast_to(scale, shape)
    if times > 1:
        scale = jnp.repeat(scale, times, axis)
    return scale if scale.shape[axis] == size else lax.slice_in_dim(scale, 0, size, axis=axis)
