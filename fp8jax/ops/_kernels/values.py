"""Operands rounded to FP8 in blocks, as their values in bfloat16: for TPUs, whose products of such
operands are bfloat16's own.

    v[r, c] = round(x[r, c] / s) s,   s the power of two that fits the largest magnitude of a block

Scales are exact powers of two, so values are exact in bfloat16, and are those that codes and scales
would be decoded to. Blocks lie along rows for the one product that an operand takes part in, and
along columns for the other: both casts come of one reading. XLA computes each in two passes over
the operand; where a block is a part of a row, which lies along a vector's lanes, it turns rows into
columns before, and writes each scale as often as a block is long. In a step of two layers of width
4096 under `mxfp8`, compiled for a TPU 7x by JAX 0.12, that is 72 M cycles of 167 M.

A program has a tile of 256 x 2048, of which a turn of its loop takes 128 rows: whole blocks, in
either direction. Where a block is a part of a vector, squares of 128 are transposed before and
after. Scaled values are rounded by an addition and a subtraction.

By the schedules that Mosaic makes for a TPU 7x, both casts of 1024 elements, which are one vector,
take 9.1 bundles of instructions in blocks of 32, and 7.6 in blocks of 128; a bundle has room for
four of the vector units'. The declared cost is that. No device has run it: interpreted on a CPU, it
gives the values of the codes, bit for bit.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType

from fp8jax import _shims
from fp8jax._conversion import is_convertible
from fp8jax._formats import Format
from fp8jax._recipe import CastSpec
from fp8jax._scaling import _INFINITY, BlockWise, Scaling, raised_to_scale
from fp8jax.devices import device_of, division_of
from fp8jax.ops._cast import cast as cast_to_codes

NAME, PLATFORM = "fp8jax_values", "tpu"
ROWS, COLUMNS, TURN, LANES = 256, 2048, 128, 128
EXTENTS, NARROW = (1, 32, 64, 128), (32, 64)
# Of instructions, by how many columns share a scale in the casts.
BUNDLES = {(1,): 4.4, (32,): 5.6, (128,): 5.3, (1, 32): 9.1, (1, 128): 7.6}


class BlockCast(NamedTuple):
    """A cast of a matrix: its format, and how many rows and columns share a scale.

    Args:
      format: E4M3 or E5M2.
      rows, columns: of `EXTENTS`, not both of `NARROW`.
      clips: whether infinities become the largest value.
    """

    format: Format
    rows: int
    columns: int
    clips: bool


Casts = Sequence[tuple[CastSpec, Scaling, tuple[int, ...]]]


def block_casts(operand: Any, casts: Casts, beside: Sequence[Any] = ()) -> list[BlockCast] | None:
    """Casts of an operand as the kernel has them.

    Args:
      operand: float array, or its abstract value.
      casts: each with what shares a scale in the operand's layout, and the contracted axes.

    Returns:
      None where it isn't for a TPU, or where XLA would have to divide the kernel; and where the
      kernel has not all of the casts: in blocks of 32, 64 or 128 along the last two axes, with
      scales within the sum that are powers of two.
    """
    if (
        device_of(operand).platform != PLATFORM
        or division_of(operand)
        or operand.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16)
        or operand.ndim < 2
        or 0 in operand.shape
        or _shims.has_symbolic(operand.shape)
        or operand.shape[-1] < LANES
    ):
        return None
    found = [_of_matrix(operand.shape, *one) for one in casts]
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else None


def values_of(operand: jax.Array, casts: Casts) -> list[jax.Array] | None:
    """An operand by each of some casts, decoded: bfloat16 arrays of its shape; None where
    `block_casts` is.
    """
    known = block_casts(operand, casts)
    if known is None:
        return None

    def by_kernel(operand):
        found = values(operand.reshape(-1, operand.shape[-1]), known)
        return [one.reshape(operand.shape) for one in found]

    def by_xla(operand):
        codes = (cast_to_codes(operand, spec, boxes) for spec, boxes, _ in casts)
        return [one.values(jnp.bfloat16, scaled=True) for one in codes]

    # What is traced for one device may still be lowered for others.
    return lax.platform_dependent(operand, default=by_xla, **{PLATFORM: by_kernel})


def _of_matrix(shape, spec: CastSpec, boxes: Scaling, contracted) -> BlockCast | None:
    """The cast of a matrix of all rows, if there is one."""
    groups = boxes.group_shape(shape)
    if (
        not isinstance(spec.scaling, BlockWise)
        or not spec.power_of_two
        or spec.delayed is not None
        or not is_convertible(spec.format, spec.rounding)
        # Where scales are outside of the sum, codes are multiplied.
        or all(groups[axis] == 1 for axis in contracted)
    ):
        return None
    *others, rows, columns = (
        size if extent is None else extent
        for size, extent in zip(shape, boxes.block(shape), strict=True)
    )
    whole = len(shape) == 2 or shape[-2] % rows == 0
    if any(extent != 1 for extent in others) or not whole or {rows, columns} - {*EXTENTS}:
        return None
    if rows in NARROW and columns in NARROW:
        return None
    return BlockCast(spec.format, rows, columns, spec.clip_infinities)


def values(x: jax.Array, casts: Sequence[BlockCast], interpret: Any = False) -> list[jax.Array]:
    """A float matrix by each of some casts, decoded: bfloat16 of its shape.

    Args:
      x: float32, bfloat16 or float16.
      casts: of it.
      interpret: as `jax.experimental.pallas.pallas_call`'s, to run it on a CPU.
    """
    return _values(x, tuple(casts), interpret)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _values(x, casts, interpret):
    rows, columns = x.shape
    # What lies outside of an array is not known: so no block may straddle its edge.
    x = _filled(x, TURN, LANES)
    height, width = min(ROWS, x.shape[0]), min(COLUMNS, x.shape[1])
    tile, varying = pl.BlockSpec((height, width), lambda i, j: (i, j)), _shims.varying_axes(x)
    out = jax.ShapeDtypeStruct(
        x.shape,
        jnp.bfloat16,
        manual_axis_type=ManualAxisType(varying=varying) if varying else None,
    )
    found = pl.pallas_call(
        functools.partial(_kernel, casts=casts),
        grid=(pl.cdiv(x.shape[0], height), pl.cdiv(x.shape[1], width)),
        in_specs=[tile],
        out_specs=[tile] * len(casts),
        out_shape=[out] * len(casts),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=_cost(x, casts),
        name=NAME,
        interpret=interpret,
    )(x)
    return [one[:rows, :columns] for one in found]


def _kernel(x, *outs, casts):
    def turn(index, _):
        rows = pl.ds(index * TURN, TURN)
        for start in range(0, x.shape[1], LANES):
            columns = slice(start, start + LANES)
            wide = x[rows, columns].astype(jnp.float32)
            for cast, out in zip(casts, outs):
                out[rows, columns] = _rounded(wide, cast)
        return ()

    lax.fori_loop(0, x.shape[0] // TURN, turn, ())


def _rounded(wide, cast: BlockCast):
    """The values that codes and scales stand for."""
    if 1 < cast.columns < LANES:
        return _rounded(wide.T, cast._replace(rows=cast.columns, columns=cast.rows)).T
    scale = _scale(wide, cast)
    inverse = np.int32(254 << 23) - scale
    scale, inverse = (lax.bitcast_convert_type(bits, jnp.float32) for bits in (scale, inverse))
    x, largest = wide * inverse, np.float32(cast.format.max)
    if cast.clips:
        x = lax.clamp(-largest, x, largest)
    # As `fp8jax._conversion.rounded`. Of an infinity, the shift is one, and the difference is NaN.
    exponent = lax.bitcast_convert_type(lax.bitcast_convert_type(x, np.int32) & _INFINITY, x.dtype)
    binade = lax.max(exponent, np.float32(cast.format.min_normal))
    shift = binade * np.float32(1.5 * 2.0 ** (23 - cast.format.mantissa_bits))
    value = ((x + shift) - shift) * scale
    if cast.format.has_inf:
        value = jnp.where(lax.abs(x) == np.float32(np.inf), x, value)
    return value.astype(jnp.bfloat16)


def _scale(wide, cast: BlockCast):
    """For each element, or each row, that of its block: the bits of a power of two."""
    magnitude = lax.abs(wide)
    largest = jnp.where(magnitude < np.float32(np.inf), magnitude, np.float32(-np.inf))
    rows, columns = wide.shape
    if cast.rows > 1:
        largest = largest.reshape(rows // cast.rows, cast.rows, columns).max(1)
    if cast.columns > 1:
        largest = largest.max(1, keepdims=True)
    bits = _fitting(largest, cast.format)
    if cast.rows > 1:
        spread = (bits.shape[0], cast.rows, bits.shape[1])
        bits = lax.broadcast_in_dim(bits, spread, (0, 2)).reshape(rows, bits.shape[1])
    return bits


def _fitting(largest, fmt: Format):
    """As `fp8jax._scaling.fitting_scale`; by floats, of which the unit has a maximum."""
    raised, tiny = raised_to_scale(fmt), np.float32(2.0**-126)
    least = (tiny.view(np.int32) - raised).view(np.float32)
    bits = lax.bitcast_convert_type(lax.max(largest, least), np.int32) + raised
    return jnp.where(largest < tiny, np.int32(127 << 23), bits & _INFINITY)


def _cost(x, casts) -> pl.CostEstimate:
    # Of 64 columns, at most what 32 take.
    columns = sorted(32 if cast.columns == 64 else cast.columns for cast in casts)
    bundles = BUNDLES.get(tuple(columns)) or sum(BUNDLES[one,] for one in columns)
    return pl.CostEstimate(
        flops=round(4 * bundles * x.size),
        bytes_accessed=x.size * (x.dtype.itemsize + 2 * len(casts)),
        transcendentals=0,
    )


def _filled(array: jax.Array, rows: int, columns: int) -> jax.Array:
    """With zeros behind both axes, up to multiples of these."""
    tails = [(0, -size % to, 0) for size, to in zip(array.shape, (rows, columns))]
    if not any(tail for _, tail, _ in tails):
        return array
    return lax.pad(array, jnp.zeros((), array.dtype), tails)
