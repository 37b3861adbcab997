"""Arrays by groups, amaxes, and the way from an amax to a scale.

The convention of the whole library: ``x ≈ decode(data) * scale``, one float32 scale per group of
elements. Which elements those are, `granularity` says.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax import _xla
from fp8jax._formats import Format
from fp8jax._granularity import (  # noqa: F401  the granularities are to be had here, too
    BlockWise,
    PerChannel,
    PerTensor,
    PerToken,
    Scaling,
)

# Added to the bits of a magnitude, it makes negative integers of those that are not finite, and of
# no other. Taken off from 0 again, it leaves the bits of -infinity.
_RAISED = np.int32(1 << 23)
_INFINITY = np.int32(0x7F800000)  # the bits of the exponent


@functools.partial(jax.jit, static_argnames=("scaling", "in_memory"), inline=True)
def group_amax(x: jax.Array, scaling: Scaling, *, in_memory: bool = False) -> jax.Array:
    """The largest finite magnitude in each group; infinities and NaNs don't count.

    Args:
      x: floating array of any shape.
      scaling: the granularity.
      in_memory: whether the array is known to be in memory, as a weight is, and not to come out of
        a kernel that could take the amax, too.

    Returns:
      float32 array of `scaling.group_shape(x.shape)`, not differentiable: zeros or normal numbers.
      0 for groups without finite elements, and for amaxes below 2^-126, the smallest normal number.

    Raises:
      ValueError: where the granularity doesn't fit the rank.

    >>> group_amax(jnp.array([[1.0, -3.0], [jnp.inf, 2.0]]), PerToken())
    Array([[3.],
           [2.]], dtype=float32)
    """
    return _without_subnormals(_largest_finite(x, scaling, in_memory))


@functools.partial(jax.jit, static_argnames=("scaling",), inline=True)
def observed_amax(x: jax.Array, scaling: Scaling) -> jax.Array:
    """`group_amax`, but infinite for groups in which nothing is finite: that is no amax of 0.

    >>> observed_amax(jnp.array([[1.0, jnp.nan], [jnp.nan, jnp.inf], [0.0, jnp.inf]]), PerToken())
    Array([[ 1.],
           [inf],
           [ 0.]], dtype=float32)
    """
    largest = _largest_finite(x, scaling, beside_cast=True)
    amax = _without_subnormals(largest)
    nothing = lax.lt(largest, np.int32(0))
    return lax.select(nothing, lax.full_like(amax, np.inf), amax) if x.size else amax


def _largest_finite(x, scaling, in_memory=False, beside_cast=False):
    """The bits of each group's largest finite magnitude; those of -infinity where there is none.

    Args:
      x, scaling, in_memory: as of `group_amax`.
      beside_cast: whether `x` is cast at the same time, by a scale that doesn't wait for this.
    """
    x = lax.stop_gradient(x)
    # XLA's TPU compiler takes an amax into a kernel beside sums of the same dtype, and beside a
    # cast where both read float32. Of images it makes passes of bfloat16 maxima: three convolutions
    # took 1.15 times bfloat16's cycles in the place of 0.96.
    narrow = x.dtype == jnp.bfloat16 and not beside_cast and x.ndim < 4
    largest = lax.platform_dependent(
        x,
        cpu=lambda x: _xla.called(_largest_by_integers, x, scaling=scaling),
        tpu=functools.partial(
            _largest_by_floats, scaling=scaling, in_memory=in_memory, narrow=narrow
        ),
        default=functools.partial(_largest_by_floats, scaling=scaling),
    )
    return largest.reshape(scaling.group_shape(x.shape))


def _largest_by_integers(x, scaling):
    # Bits of magnitudes are ordered like the values. XLA's reduction of floats on CPUs passes over
    # NaNs, and may lose what came before one.
    x = lax.convert_element_type(x, np.float32)
    bits = lax.bitwise_and(lax.bitcast_convert_type(x, np.int32), np.int32(0x7FFFFFFF))
    split, axes = split_groups(lax.add(bits, _RAISED), scaling)
    return _xla.max_on_cpu(split, axes, _RAISED)


def _largest_by_floats(x, scaling, in_memory=False, narrow=False):
    # What XLA takes into the product that makes the array, on GPUs and TPUs. No NaN gets as far as
    # the maximum.
    x = x if narrow else lax.convert_element_type(x, np.float32)
    split, axes = split_groups(x, scaling, fill=np.nan)

    def finite(values):
        magnitude = lax.abs(values)
        nothing = lax.full_like(magnitude, -np.inf)
        return lax.select(lax.lt(magnitude, values.dtype.type(np.inf)), magnitude, nothing)

    def rows(values):
        return values if len(axes) == split.ndim else _xla.row_major_on_gpu(values)

    parts = _xla.parts_in_memory(split) if in_memory and split.ndim == x.ndim else [split]
    if 0 in axes:
        largest = rows(functools.reduce(lax.max, map(finite, parts)))
        found = _xla.max_over(largest, axes, -np.inf)
    else:
        each = [_xla.max_over(rows(finite(part)), axes, -np.inf) for part in parts]
        found = lax.concatenate(each, 0)
    return lax.bitcast_convert_type(lax.convert_element_type(found, np.float32), np.int32)


def fitting_scale(
    x: jax.Array, scaling: Scaling, fmt: Format, *, in_memory: bool = False
) -> jax.Array:
    """`scale_from_amax` of the `group_amax`, powers of two, in few operations.

    >>> from fp8jax import E4M3
    >>> fitting_scale(jnp.array([[449.0, -3.0], [jnp.inf, 0.0]]), PerToken(), E4M3)
    Array([[2.],
           [1.]], dtype=float32)
    """
    bits = _largest_finite(x, scaling, in_memory)
    # As of `_whole_exponent`, but left in its place among the bits.
    least, raised = np.int32(1 << 23), raised_to_scale(fmt)
    scale = lax.add(lax.max(bits, least - raised), raised)
    scale = lax.bitwise_and(scale, _INFINITY)
    scale = lax.select(lax.lt(bits, least), lax.full_like(bits, 127 << 23), scale)
    return lax.bitcast_convert_type(scale, np.float32)


def raised_to_scale(fmt: Format) -> np.int32:
    """Added to the bits of an amax, it leaves in those of the exponent the scale that fits."""
    limit = int(np.float32(fmt.max).view(np.int32))
    return np.int32((127 << 23) - limit + (1 << 23) - 1)


def _without_subnormals(bits):
    # Some hardware takes subnormals for zeros; so that all agree, they are zeros.
    bits = lax.select(lax.lt(bits, np.int32(1 << 23)), lax.full_like(bits, 0), bits)
    return lax.bitcast_convert_type(bits, np.float32)


def group_sum(x: jax.Array, scaling: Scaling) -> jax.Array:
    """The sum of each group.

    Args:
      x: array of any shape.
      scaling: the granularity.

    Returns:
      Array of `scaling.group_shape(x.shape)`, dtype of `x`; 0 for groups without elements.

    Raises:
      ValueError: where the granularity doesn't fit the rank.

    >>> group_sum(jnp.array([1.0, 2.0, 3.0]), BlockWise(2))
    Array([3., 3.], dtype=float32)
    """
    split, axes = split_groups(x, scaling)
    return lax.reduce(split, x.dtype.type(0), lax.add, axes).reshape(scaling.group_shape(x.shape))


def multiply_groups(x: jax.Array, factors: jax.Array, scaling: Scaling) -> jax.Array:
    """Multiply each group by a factor of its own.

    Args:
      x: array of any shape.
      factors: array of the dtype of `x` and of `scaling.group_shape(x.shape)`; or, where both have
        been stacked along new leading axes, of that shape stacked.
      scaling: the granularity.

    Returns:
      Array like `x`.

    >>> multiply_groups(jnp.ones(3), jnp.array([2.0, 5.0]), BlockWise(2))
    Array([2., 2., 5.], dtype=float32)
    """
    if not factors.ndim:
        return lax.mul(x, factors)
    factors = factors.reshape(factors.shape + (1,) * (x.ndim - factors.ndim))  # of `PerTensor`
    whole = _with_whole_groups(x, scaling.normalize(x.ndim).block(x.shape))
    split, _ = split_groups(whole, scaling)
    product = merge_groups(split * spread_groups(factors, x.shape, scaling), x.shape, scaling)
    return product if whole is x else jax.sharding.reshard(product, jax.typeof(x).sharding)


def split_groups(x: jax.Array, scaling: Scaling, fill: float = 0) -> tuple[jax.Array, list[int]]:
    """Give groups axes of their own, ragged tails filled up; and say which axes lie within a
    group.
    """
    block = scaling.normalize(x.ndim).block(x.shape)
    x = _with_whole_groups(x, block)
    tails = [
        (0, 0, 0) if b is None else (0, -(-n // b) * b - n, 0)
        for n, b in zip(x.shape, block, strict=True)
    ]
    if any(tail for _, tail, _ in tails):
        x = lax.pad(x, x.dtype.type(fill), tails)
    axes = []
    # Axis by axis, from the last: explicit meshes can follow a reshape that splits one.
    for axis in reversed(range(x.ndim)):
        extent = block[axis]
        if extent is None:
            axes = [axis] + axes
        elif extent != 1:
            x = x.reshape(x.shape[:axis] + (x.shape[axis] // extent, extent) + x.shape[axis + 1 :])
            axes = [axis + 1] + [a + 1 for a in axes]
    return x, axes


def _with_whole_groups(x: jax.Array, block: Sequence[int | None]) -> jax.Array:
    """`x`, with explicit axes gathered where devices would share a group: such a split has no
    sharding that JAX could name.
    """
    sharding = jax.typeof(x).sharding
    before = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    spec = list(before)
    for axis, (size, extent) in enumerate(zip(x.shape, block, strict=True)):
        names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        if extent not in (None, 1) and names != (None,):
            parts = math.prod(sharding.mesh.shape[name] for name in names)
            spec[axis] = spec[axis] if size % (extent * parts) == 0 else None
    return (
        x
        if spec == before
        else jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    )


def spread_groups(groups: jax.Array, shape: tuple[int, ...], scaling: Scaling) -> jax.Array:
    """An entry per group, as it broadcasts against what `split_groups` makes of an array of
    `shape`.
    """
    return lax.expand_dims(
        groups, [axis + 1 + nth for nth, axis in enumerate(_split_axes(shape, scaling))]
    )


def merge_groups(split: jax.Array, shape: tuple[int, ...], scaling: Scaling) -> jax.Array:
    """Undo `split_groups`: the array of `shape`, without what filled up its tails."""
    for axis in _split_axes(shape, scaling):
        filled = split.shape[axis] * split.shape[axis + 1]
        split = split.reshape(split.shape[:axis] + (filled,) + split.shape[axis + 2 :])
    return split if split.shape == tuple(shape) else lax.slice(split, [0] * len(shape), shape)


def _split_axes(shape, scaling: Scaling) -> list[int]:
    """The axes that `split_groups` makes two of."""
    return [
        axis
        for axis, b in enumerate(scaling.normalize(len(shape)).block(shape))
        if b not in (None, 1)
    ]


def exponent_from_amax(amax: jax.Array, fmt: Format, margin: float = 1.0) -> jax.Array:
    """The smallest power of two by which the magnitudes up to an amax fit into a format.

    ``ceil(log2(amax * margin / fmt.max))``, by comparing exponents and mantissas: `log2` is wrong
    next to powers of two.

    Args:
      amax: float32 array of any shape, not negative.
      fmt: the format.
      margin: multiplicative headroom; with 2, values up to twice the amax fit.

    Returns:
      float32 array of integers in [-126, 126], shape of `amax`: 0 where the amax is 0. An infinite
      or NaN amax gives the exponent of the largest float32; it is never NaN.

    >>> from fp8jax import E4M3
    >>> exponent_from_amax(jnp.array([448.0, 448.1, 0.0]), E4M3)
    Array([0., 1., 0.], dtype=float32)
    """
    return lax.convert_element_type(_whole_exponent(amax, fmt, margin), np.float32)


def _whole_exponent(amax, fmt: Format, margin: float) -> jax.Array:
    """`exponent_from_amax` as int32."""
    amax = lax.stop_gradient(jnp.asarray(amax, np.float32))
    bits = magnitude = lax.bitcast_convert_type(amax, np.int32) & np.int32(0x7FFFFFFF)
    if margin != 1:
        magnitude = lax.bitcast_convert_type(amax * np.float32(margin), np.int32) & np.int32(
            0x7FFFFFFF
        )
    # `magnitude - limit` counts in steps of the pattern; what exceeds a whole number of binades is
    # one binade more.
    limit = int(np.float32(fmt.max).view(np.int32))
    exponent = lax.shift_right_arithmetic(
        lax.min(magnitude, np.int32(0x7F7FFFFF)) - np.int32(limit - ((1 << 23) - 1)), np.int32(23)
    )
    exponent = lax.clamp(np.int32(-126), exponent, np.int32(126))
    # By bits, because some hardware takes subnormals for zeros.
    return lax.select(bits == 0, lax.full_like(exponent, 0), exponent)


def scale_from_exponent(exponent: jax.Array) -> jax.Array:
    """``2**exponent``, exactly, built from exponent bits.

    Args:
      exponent: float32 array of any shape, integers in [-126, 127].

    Returns:
      float32 array of normal powers of two, same shape; NaN where an exponent is no integer, as
      after an optimizer that took it for a weight.

    >>> scale_from_exponent(jnp.array([-3.0, 0.0, 5.0]))
    Array([ 0.125,  1.   , 32.   ], dtype=float32)
    """
    # 2^23 leaves an integer in the lowest bits; the rest is shifted out.
    exponent = lax.stop_gradient(exponent)
    biased = exponent + np.float32(2**23 + 127)
    scale = lax.bitcast_convert_type(
        lax.shift_left(lax.bitcast_convert_type(biased, np.int32), np.int32(23)), np.float32
    )
    return jnp.where(exponent == lax.floor(exponent), scale, np.float32(np.nan))


def scale_from_amax(
    amax: jax.Array, fmt: Format, margin: float = 1.0, power_of_two: bool = True
) -> jax.Array:
    """The scale by which the magnitudes up to an amax fit into a format.

    Args:
      amax: float32 array of any shape, not negative.
      fmt: the format.
      margin: multiplicative headroom.
      power_of_two: whether to round the scale up to a power of two; if not, the amax becomes
        exactly the largest value.

    Returns:
      float32 array of normal numbers, shape of `amax`; 1 where the amax is 0.

    >>> from fp8jax import E4M3
    >>> scale_from_amax(jnp.float32(449.0), E4M3)
    Array(2., dtype=float32)
    >>> scale_from_amax(jnp.float32(224.0), E4M3, power_of_two=False)
    Array(0.5, dtype=float32)
    """
    if power_of_two:
        biased = _whole_exponent(amax, fmt, margin) + np.int32(127)
        return lax.bitcast_convert_type(lax.shift_left(biased, np.int32(23)), np.float32)
    scale = amax * np.float32(margin) * np.float32(1 / fmt.max)
    # The reciprocal of a normal number below 2^126 is normal too, and so nothing is flushed.
    return jnp.where(
        amax == 0, np.float32(1), lax.clamp(np.float32(2.0**-126), scale, np.float32(2.0**126))
    )
