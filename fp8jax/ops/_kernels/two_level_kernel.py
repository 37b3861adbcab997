"""The kernel of `fp8jax.ops._kernels.two_level`, where its derivation and its limits are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NAME = "fp8jax_two_level_product"
# Warpgroups that multiply; rows of one `wgmma`; a tile's columns, and what it has of the sum.
GROUPS, WAVE, COLUMNS, DEPTH = 2, 64, 128, 128
# Bytes of shared memory that a program may have.
SHARED = 224 << 10
MULTIPROCESSORS, STRIPE = 132, 8
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def product(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_scale: jax.Array,
    rhs_scale: jax.Array,
    out_dtype: jnp.dtype,
    interpret: Any,
) -> jax.Array:
    """As `fp8jax.ops._kernels.two_level.multiply`."""
    batch, rows, total = lhs.shape
    columns, extent = rhs.shape[1], total // lhs_scale.shape[2]
    # Copies are of whole pieces, as they lie in shared memory.
    codes = (_filled(operand, 8, extent) for operand in (lhs, rhs))
    # Scales of one block lie in a row: those of a tile come by one copy.
    scales = (_filled(jnp.swapaxes(scale, 1, 2), 1, 4) for scale in (lhs_scale, rhs_scale))
    lanes = 128 // out_dtype.itemsize
    height, width = (size + -size % to for size, to in ((rows, 8), (columns, lanes)))
    # Smaller blocks need more registers, for scales, than two waves leave.
    waves = 1 if rows <= GROUPS * WAVE or extent < DEPTH else 2
    grid = (pl.cdiv(rows, GROUPS * waves * WAVE), pl.cdiv(columns, COLUMNS))
    kernel = plgpu.kernel(
        functools.partial(_kernel, waves=waves, grid=grid, extent=extent),
        out_type=jax.ShapeDtypeStruct((batch, height, width), out_dtype),
        scratch_types=[
            plgpu.SMEM((GROUPS, WAVE, COLUMNS), out_dtype, transforms=_pieces(lanes, 128))
        ],
        grid=(min(batch * grid[0] * grid[1], MULTIPROCESSORS),),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=NAME,
        cost_estimate=_cost(lhs.shape, grid, waves, columns, out_dtype.itemsize),
        interpret=interpret,
    )
    return kernel(*codes, *scales)[:, :rows, :columns]


def _kernel(lhs, rhs, lhs_scale, rhs_scale, out, staged, *, waves, grid, extent):
    batch, _, total = lhs.shape
    group = lax.axis_index("group")
    height = GROUPS * waves * WAVE
    copies = functools.partial(
        plgpu.emit_pipeline_warp_specialized,
        grid=(pl.cdiv(total, DEPTH),),
        in_specs=_tiles(height, extent),
        max_concurrent_steps=_stages(height, extent, staged),
        memory_registers=40,
        wg_axis="group",
        num_compute_wgs=GROUPS,
    )

    def all_tiles(buffers):
        @plgpu.nd_loop((batch * grid[0] * grid[1],), collective_axes="program")
        def tile(loop):
            index = lax.rem(loop.index[0], grid[0] * grid[1])
            row, column = plgpu.planar_snake(index, grid, minor_dim=0, tile_width=STRIPE)
            one = lax.div(loop.index[0], grid[0] * grid[1])
            down, across = pl.ds(row * height, height), pl.ds(column * COLUMNS, COLUMNS)

            def sums(run):
                zero = plgpu.layout_cast(
                    jnp.zeros((WAVE, COLUMNS), jnp.float32), plgpu.Layout.WGMMA
                )
                for wave, total in enumerate(run((zero,) * waves)):
                    first = row * height + (group * waves + wave) * WAVE
                    _write(total, staged.at[group], out.at[one, pl.ds(first, WAVE), across])

            step: Any = functools.partial(_step, group=group, extent=extent)
            copies(step, compute_context=sums)(
                lhs.at[one, down],
                rhs.at[one, across],
                lhs_scale.at[one, :, down],
                rhs_scale.at[one, :, across],
                allocations=buffers,
            )

    nothing = copies(lambda *_: None, compute_context=lambda *_: None)
    pl.run_scoped(
        all_tiles,
        nothing.get_allocations(*(ref.at[0] for ref in (lhs, rhs, lhs_scale, rhs_scale))),
        collective_axes="group",
    )
    plgpu.wait_smem_to_gmem(0)


def _step(_, lhs, rhs, lhs_scale, rhs_scale, totals, *, group, extent):
    """What one tile of the sum adds to a warpgroup's sums, one for each of its waves."""
    totals = list(totals)
    for block in range(DEPTH // extent):
        of_sum = pl.ds(block * extent, extent)
        for wave in range(len(totals)):
            rows = pl.ds((group * len(totals) + wave) * WAVE, WAVE)

            def multiplied(sums, rows=rows, of_sum=of_sum):
                plgpu.wgmma(sums, lhs.at[rows, of_sum], rhs.at[:, of_sum].T)
                return sums[...]

            sums = plgpu.WGMMAAccumulatorRef((WAVE, COLUMNS), jnp.float32)
            part = pl.run_scoped(multiplied, sums)
            # Read only now: they would take registers while the tensor cores work.
            left = plgpu.load(lhs_scale.at[block, rows], layout=ROW)
            right = plgpu.load(rhs_scale.at[block], layout=COLUMN)
            scale = lax.broadcast_in_dim(left, part.shape, (0,)) * lax.broadcast_in_dim(
                right, part.shape, (1,)
            )
            totals[wave] += part * scale
    return tuple(totals)


def _write(total, staged, out):
    """Sums to the result; what lies outside of it is left out."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staged[...] = total.astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, out)


def _tiles(height: int, extent: int) -> list[plgpu.BlockSpec]:
    """Of both operands and their scales, along the sum."""
    order = _pieces(extent, extent)
    blocks = DEPTH // extent
    return [
        *(
            plgpu.BlockSpec((rows, DEPTH), lambda step: (0, step), transforms=order)
            for rows in (height, COLUMNS)
        ),
        *(plgpu.BlockSpec((blocks, rows), lambda step: (step, 0)) for rows in (height, COLUMNS)),
    ]


def _stages(height: int, extent: int, staged: Any) -> int:
    """How many tiles of the sum fit beside what is staged."""
    free = SHARED - GROUPS * WAVE * COLUMNS * staged.dtype.itemsize
    return min(4, free // ((height + COLUMNS) * (DEPTH + DEPTH // extent * 4)))


def _pieces(columns: int, bytes_in_row: int) -> tuple:
    """How an array lies in shared memory: in pieces of 8 rows, whose bytes are mixed so that the
    tensor cores read them, and programs write them, without conflicts.
    """
    transforms: Any = plgpu
    return (
        transforms.TilingTransform((8, columns)),
        transforms.SwizzleTransform(bytes_in_row),
    )


def _cost(shape, grid, waves, columns, itemsize) -> pl.CostEstimate:
    batch, rows, total = shape
    tiles, height = batch * grid[0] * grid[1], GROUPS * waves * WAVE
    return pl.CostEstimate(
        flops=2 * tiles * height * COLUMNS * total,
        bytes_accessed=tiles * total * (height + COLUMNS) + batch * rows * columns * itemsize,
        transcendentals=0,
    )


def _filled(array: jax.Array, rows: int, columns: int) -> jax.Array:
    """With zeros behind the last two axes, up to multiples of these."""
    tails = [(0, 0, 0), *((0, -size % to, 0) for size, to in zip(array.shape[1:], (rows, columns)))]
    if not any(tail for _, tail, _ in tails):
        return array
    return lax.pad(array, jnp.zeros((), array.dtype), tails)
