"""One product of FP8 codes, two executions, the same values.

Every FP8 value is exact in bfloat16 and every product of two of them in float32, so a product on decoded codes
("emulated") and one on the codes themselves ("native") differ only in the order of their float32 sums.
"""

import functools
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.codec import decode_bits

Execution = Literal["auto", "native", "emulated"]
DimensionNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def multiply_codes(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    *,
    out_dtype: jnp.dtype,
    precision: jax.lax.Precision,
    execution: Execution,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """The product of two arrays of FP8 codes, without their scales, summed in float32.

    Args:
      lhs, rhs: float8 arrays.
      dimension_numbers: as `jax.lax.dot_general`'s.
      out_dtype: float32, or bfloat16 where the result will be rounded to it anyway.
      precision: DEFAULT lets Hopper's tensor cores sum with fewer bits, HIGHEST does not; without effect elsewhere.
      execution: see `fp8jax.recipe.Recipe`.
      out_sharding: of the product, on meshes with explicit axes.

    >>> codes = jnp.array([[1.5, -2.0]], jnp.float8_e4m3fn)
    >>> multiply_codes(codes, codes, (((1,), (1,)), ((), ())), out_dtype=jnp.float32,
    ...                precision=jax.lax.Precision.DEFAULT, execution="auto")
    Array([[6.25]], dtype=float32)
    """
    emulated = functools.partial(_multiply_decoded, dimension_numbers=dimension_numbers, out_dtype=out_dtype,
                                 out_sharding=out_sharding)
    native = functools.partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, precision=precision,
                               preferred_element_type=out_dtype, out_sharding=out_sharding)
    on_cpu = functools.partial(_multiply_on_cpu, dimension_numbers=dimension_numbers, out_dtype=out_dtype,
                               out_sharding=out_sharding)
    if execution == "native":
        return native(lhs, rhs)
    if execution == "emulated" or not _is_native(lhs, rhs):
        return jax.lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=emulated)
    return jax.lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=native)


def _is_native(lhs: jax.Array, rhs: jax.Array) -> bool:
    """Whether there is hardware that multiplies these formats: the two of OFP8; not e5m2 by e5m2."""
    return {lhs.dtype, rhs.dtype} in ({jnp.dtype(jnp.float8_e4m3fn)}, {jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)})


def _multiply_decoded(lhs, rhs, *, dimension_numbers, out_dtype, out_sharding, decoded_dtype=jnp.bfloat16):
    product = jax.lax.dot_general(
        decode_bits(lhs, decoded_dtype), decode_bits(rhs, decoded_dtype), dimension_numbers,
        precision=jax.lax.Precision.HIGHEST if decoded_dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32, out_sharding=out_sharding)
    return product.astype(out_dtype)


def _multiply_on_cpu(lhs, rhs, *, dimension_numbers, out_dtype, out_sharding):
    """Emulated, in the layout that XLA's CPU library is fast for.

    With instructions for it, a bfloat16 product runs at a multiple of a float32 product's speed, but only where the
    lhs contracts its last axes. Where it does not, as in each weight gradient, its codes are transposed first.
    """
    if not cpu_multiplies_bfloat16():
        return _multiply_decoded(lhs, rhs, dimension_numbers=dimension_numbers, out_dtype=out_dtype,
                                 out_sharding=out_sharding, decoded_dtype=jnp.float32)
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    kept = tuple(axis for axis in range(lhs.ndim) if axis not in lhs_contracting + lhs_batch)
    order = lhs_batch + kept + lhs_contracting
    if order != tuple(range(lhs.ndim)):
        lhs = _transposed_codes(lhs, order)
    contracting = tuple(range(lhs.ndim - len(lhs_contracting), lhs.ndim))
    batch = tuple(range(len(lhs_batch)))
    return _multiply_decoded(lhs, rhs, dimension_numbers=((contracting, rhs_contracting), (batch, rhs_batch)),
                             out_dtype=out_dtype, out_sharding=out_sharding)


def _transposed_codes(codes: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """`jnp.transpose(codes, order)`, done for good and fast on CPUs.

    Four codes of the last axis move as one uint32 and are taken apart where they arrive, which makes a quarter of the
    strided accesses. The barrier keeps XLA from folding the transposition into the product, and the reshape behind it
    gives the result the row-major layout without which XLA takes the product for unfit for its library.
    """
    last = codes.ndim - 1
    if order[-1] == last or codes.shape[-1] % 4 or _is_explicit(codes):
        moved = jax.lax.optimization_barrier(jnp.expand_dims(jnp.transpose(codes, order), 0))
        return jnp.squeeze(moved, 0)
    quads = jax.lax.bitcast_convert_type(codes, jnp.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // 4, 4)
    words = jax.lax.optimization_barrier(jnp.transpose(jax.lax.bitcast_convert_type(quads, jnp.uint32), order))
    axis = order.index(last) + 1
    shape = (*words.shape[:axis], 4, *words.shape[axis:])
    shifts = jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(8)
    words = jax.lax.broadcast_in_dim(words, shape, tuple(i for i in range(len(shape)) if i != axis))
    taken = jax.lax.shift_right_logical(words, shifts).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(taken.reshape(*(codes.shape[i] for i in order)), codes.dtype)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions that multiply bfloat16 and sum in float32 (AMX or AVX512-BF16).

    Only Linux tells, in /proc/cpuinfo; elsewhere the answer is no, and products run in float32.
    """
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else ()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def sharding_of_product(operand: jax.Array, order: tuple[int, ...]) -> NamedSharding | None:
    """The sharding to give a product whose axes are `operand`'s in `order`; None where no mesh axis is explicit.

    A gradient is sharded like the operand it belongs to, which JAX can't infer once a contracted axis is sharded.
    """
    if not _is_explicit(operand):
        return None
    sharding = jax.typeof(operand).sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[axis] for axis in order)))


def _is_explicit(operand: jax.Array) -> bool:
    mesh = jax.typeof(operand).sharding.mesh
    return bool(mesh.axis_names) and mesh.are_all_axes_explicit
