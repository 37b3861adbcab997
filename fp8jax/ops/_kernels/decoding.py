"""A product for TPUs that reads codes and their scales, and decodes them next to the matrix units.

    out[b, m, n] = sum over k of  lhs[b, m, k] s[b, m, k // unit]  rhs[b, k, n] t[b, k // unit, n]

Codes stay bytes in the chip's memory. A tile of them is widened to bfloat16 in the core's own
memory, with its scales multiplied in, where powers of two are exact; the matrix units multiply
tiles of bfloat16 along the whole sum, which stays in float32. So it sums the values that the
product on decoded arrays sums, in another order.

Why bfloat16, on a chip that multiplies FP8 at twice the rate: scales within the sum leave a sum of
128 at a time to it. By the schedules that Mosaic makes for a TPU 7x (JAX 0.12), of tiles of
512 x 1024 x 1024, a product by 128s in FP8 takes 3990 places of the matrix units, whose arrays are
256 deep, and 12554 of the vector units' for three operations on each partial sum: 5157 bundles of
instructions. Decoded here it takes 2976, 3650 and 2473.

Tiles are 1024 x 1024 x 1024 or what is left: sums of 4 MiB, operands of 1 MiB each, twice, since
the next ones come while these are multiplied, and 2 MiB each decoded. Along lanes, each row's
scales are fetched by a shuffle; along sublanes they are spread as they are read.

Its declared cost is that of the matrix units: by the same schedules, a tile of 1024 x 1024 x 1024
takes 5902 of their places, where XLA's own bfloat16 product takes 5576; so it declares 17/16 of the
two operations for each product of two elements, and the bytes of all tiles. At the rate at which
XLA estimates its own product that is 5392 cycles a tile, and its 4384 bundles fit in. No device has
measured it.

Only `execution="native"` takes it. The products of a step of two layers of width 4096 under `mxfp8`
are estimated at 49.7 M cycles by it, and at 65.8 M decoded by XLA; but what it wants in rows XLA
would keep in columns, and copies: all else is 153.0 M, and 98.4 M.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType

from fp8jax import _shims
from fp8jax.ops._cast import Codes

LANES, SUBLANES, TILE = 128, 32, 1024
SLOWER = "what XLA copies for it is estimated at more than it saves"


def refuses(lhs: Codes, rhs: Codes, extent: int) -> str:
    """Why it can't multiply these operands, in blocks of this extent; "" where it can."""
    native = (jnp.float8_e4m3fn, jnp.float8_e5m2)
    for operand in (lhs, rhs):
        if operand.data.dtype not in native:
            return f"it decodes E4M3 and E5M2, and not {operand.format.name}"
        if not operand.power_of_two:
            return "its scales are not powers of two"
    if extent % SUBLANES:
        return f"its blocks are of {extent}, no multiple of {SUBLANES}"
    return ""


def unit(extent: int) -> int:
    """How many elements a scale is for."""
    return SUBLANES if extent % LANES else LANES


def multiply(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_scale: jax.Array,
    rhs_scale: jax.Array,
    out_dtype: jnp.dtype,
    interpret: Any = False,
) -> jax.Array:
    """The product of codes `[batch, rows, sum]` with float32 scales `[batch, rows, sum / unit]`.

    Args:
      lhs, rhs: codes of E4M3 or E5M2.
      lhs_scale, rhs_scale: powers of two.
      out_dtype: of the result.
      interpret: as `jax.experimental.pallas.pallas_call`'s, to run it on a CPU.
    """
    rhs, rhs_scale = (jnp.swapaxes(part, 1, 2) for part in (rhs, rhs_scale))
    return _multiply(lhs, rhs, lhs_scale, rhs_scale, jnp.dtype(out_dtype), interpret)


@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def _multiply(lhs, rhs, lhs_scale, rhs_scale, out_dtype, interpret):
    batch, rows, total = lhs.shape
    columns, extent = rhs.shape[2], total // lhs_scale.shape[2]
    lhs, rhs = _filled(lhs, SUBLANES, LANES), _filled(rhs, LANES, LANES)
    depth = _depth(lhs.shape[2])
    height, width = (min(TILE, size) for size in (lhs.shape[1], rhs.shape[2]))
    # A row of lanes holds the scales of several tiles of a row.
    lhs_scale = _filled(lhs_scale, SUBLANES, LANES)
    rhs_scale = _filled(rhs_scale, lhs.shape[2] // extent, LANES)
    count, varying = depth // extent, _shims.varying_axes(lhs)
    rhs_scale = rhs_scale.reshape(batch, -1, count, rhs_scale.shape[2])
    grid = (
        batch,
        pl.cdiv(lhs.shape[1], height),
        pl.cdiv(rhs.shape[2], width),
        lhs.shape[2] // depth,
    )
    out = pl.pallas_call(
        functools.partial(_kernel, extent=extent),
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, height, depth), lambda b, i, j, k: (b, i, k)),
            pl.BlockSpec((None, depth, width), lambda b, i, j, k: (b, k, j)),
            pl.BlockSpec(
                (None, height, LANES), lambda b, i, j, k: (b, i, lax.div(k * count, LANES))
            ),
            pl.BlockSpec((None, None, count, width), lambda b, i, j, k: (b, k, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, height, width), lambda b, i, j, k: (b, i, j)),
        out_shape=jax.ShapeDtypeStruct(
            (batch, lhs.shape[1], rhs.shape[2]),
            out_dtype,
            manual_axis_type=ManualAxisType(varying=varying) if varying else None,
        ),
        scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 << 20,
        ),
        cost_estimate=_cost(grid, height, width, depth, jnp.dtype(out_dtype).itemsize),
        name="fp8jax_decoding_product",
        interpret=interpret,
    )(lhs, rhs, lhs_scale, rhs_scale)
    return out[:, :rows, :columns]


def _kernel(lhs, rhs, lhs_scale, rhs_scale, out, total, *, extent):
    step = pl.program_id(3)
    depth = lhs.shape[1]
    per_vector = LANES // extent

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    # The scale of each lane, of a row of scales: that is as many lanes.
    scales = lhs_scale[...]
    lane = lax.div(lax.broadcasted_iota(jnp.int32, scales.shape, 1), extent)
    first = lax.rem(step * (depth // extent), LANES)
    left = [
        lhs[:, start : start + LANES].astype(jnp.bfloat16)
        * jnp.take_along_axis(scales, lane + (first + start // LANES * per_vector), axis=1).astype(
            jnp.bfloat16
        )
        for start in range(0, depth, LANES)
    ]
    right = [
        rhs[start : start + extent, :].astype(jnp.bfloat16)
        * rhs_scale[start // extent : start // extent + 1, :].astype(jnp.bfloat16)
        for start in range(0, depth, extent)
    ]
    total[...] += lax.dot_general(
        jnp.concatenate(left, axis=1),
        jnp.concatenate(right, axis=0),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        out[...] = total[...].astype(out.dtype)


def _cost(grid, height, width, depth, itemsize) -> pl.CostEstimate:
    batch, down, across, along = grid
    tiles = batch * down * across * along
    read = tiles * depth * (height + width)
    return pl.CostEstimate(
        flops=2 * tiles * height * width * depth * 17 // 16,
        bytes_accessed=read + batch * down * across * height * width * itemsize,
        transcendentals=0,
    )


def _depth(total: int) -> int:
    """The largest tile that divides a sum."""
    return next(depth for depth in (TILE, 512, 256, LANES) if total % depth == 0)


def _filled(array: jax.Array, rows: int, columns: int) -> jax.Array:
    """With zeros behind the last two axes, up to multiples of these."""
    tails = [(0, 0, 0), *((0, -size % to, 0) for size, to in zip(array.shape[1:], (rows, columns)))]
    if not any(tail for _, tail, _ in tails):
        return array
    return lax.pad(array, jnp.zeros((), array.dtype), tails)
