"""One product of operands that are FP8 codes or floats, two executions, the same values.

Every FP8 value is exact in bfloat16, one scaled by a power of two too, and every product of two of
them in float32; so a product on decoded codes ("emulated") and one on the codes themselves
("native") differ only in the order of their float32 sums. Scales that are constant along the
contracted axes multiply the result; others multiply the decoded values.
"""

import dataclasses
import functools
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fp8jax import _xla
from fp8jax._codec import decode_bits
from fp8jax.devices import are_multiplied
from fp8jax.ops import _kernels
from fp8jax.ops._cast import Codes, halves, halves_of_powers
from fp8jax.ops._shardings import divided_like

Execution = Literal["auto", "native", "emulated"]
DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]
Operand = Codes | jax.Array


def multiply(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    *,
    out_dtype: jnp.dtype,
    precision: jax.lax.Precision,
    execution: Execution,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """The product of two operands, of which one at least is cast, summed in float32.

    Args:
      lhs, rhs: operands, each cast or in its own precision; both cast, by scales outside of the
        sum, where `execution` is native.
      dimension_numbers: as `jax.lax.dot_general`'s.
      out_dtype: of the result.
      precision: of products that read codes alone. DEFAULT lets Hopper's tensor cores sum with
        fewer bits, HIGHEST does not; without effect elsewhere.
      execution: see `fp8jax.Recipe`.
      out_sharding: of the product, on meshes with explicit axes.

    >>> from fp8jax import CastSpec
    >>> from fp8jax import PerTensor
    >>> data = jnp.array([[1.5, -2.0]], jnp.float8_e4m3fn)
    >>> codes = Codes.of(data, jnp.float32(2), CastSpec("E4M3"), PerTensor())
    >>> multiply(codes, codes, (((1,), (1,)), ((), ())), out_dtype=jnp.float32,
    ...          precision=jax.lax.Precision.DEFAULT, execution="auto")
    Array([[25.]], dtype=float32)
    """
    contracting, _ = dimension_numbers
    factors = [
        operand.scale if isinstance(operand, Codes) and operand.is_separable(axes) else None
        for operand, axes in zip((lhs, rhs), contracting)
    ]
    # Powers of two are exact in bfloat16, so such a product may come out in it.
    narrow = out_dtype == jnp.bfloat16 and all(
        not isinstance(o, Codes) or o.power_of_two for o in (lhs, rhs)
    )
    dtype = jnp.bfloat16 if narrow else jnp.float32
    product = _unscaled(
        lhs,
        rhs,
        [factor is None for factor in factors],
        dimension_numbers,
        dtype,
        precision,
        execution,
        out_sharding,
    )
    # In float32, so that XLA's GPU compiler leaves the factors to what comes after. It would take
    # one of them into the product, by a kernel of its own that computes this one number.
    product = jax.lax.convert_element_type(product, jnp.float32)
    for factor in _factors_of_result(lhs, rhs, factors, dimension_numbers, product):
        product = jax.lax.mul(product, factor) if not factor.ndim else product * factor
    return jax.lax.convert_element_type(product, out_dtype)


def _factors_of_result(lhs, rhs, factors, dimension_numbers, product):
    """What to multiply a product by, one after the other, for the scales outside of it."""
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_kept, rhs_kept = (
        _kept(lhs.ndim, lhs_contracting, lhs_batch),
        _kept(rhs.ndim, rhs_contracting, rhs_batch),
    )
    batch = tuple(range(len(lhs_batch)))
    lhs_axes, rhs_axes = (
        (*batch, *range(len(batch), len(batch) + len(lhs_kept))),
        (*batch, *range(len(batch) + len(lhs_kept), len(batch) + len(lhs_kept) + len(rhs_kept))),
    )
    ndim = len(batch) + len(lhs_kept) + len(rhs_kept)
    scales = []
    for factor, axes, at in (
        (factors[0], (*lhs_batch, *lhs_kept), lhs_axes),
        (factors[1], (*rhs_batch, *rhs_kept), rhs_axes),
    ):
        if factor is None:
            continue
        if factor.ndim:
            factor = jnp.transpose(
                factor, (*axes, *(axis for axis in range(factor.ndim) if axis not in axes))
            )
            factor = factor.reshape(
                tuple(factor.shape[at.index(axis)] if axis in at else 1 for axis in range(ndim))
            )
        scales.append(factor)
    if len(scales) == 2 and all(
        scale.ndim for scale in scales
    ):  # Apart, since what they have in common is as large as the product.
        return [
            functools.reduce(jnp.multiply, (divided_like(factor, product) for factor in half))
            for half in zip(*map(halves_of_powers if _are_powers(lhs, rhs) else halves, scales))
        ]
    return [divided_like(half, product) for half in _halves(lhs, rhs, scales)] if scales else []


def _halves(lhs, rhs, scales):
    """Two numbers to multiply a product by; of those that were made before, if they were."""
    one, other = (operand.ready if isinstance(operand, Codes) else None for operand in (lhs, rhs))
    if one is not None and other is not None:
        return one.halves(other)
    return (halves_of_powers if _are_powers(lhs, rhs) else halves)(*scales)


def _are_powers(*operands: Operand) -> bool:
    """Whether all scales are known to be powers of two. Those that are state may be NaN."""
    return all(
        operand.power_of_two and not operand.is_state
        for operand in operands
        if isinstance(operand, Codes)
    )


def _unscaled(lhs, rhs, inner, dimension_numbers, out_dtype, precision, execution, out_sharding):
    """The product, without the scales that multiply its result; `inner` says whose multiply the
    values before.
    """
    options = {
        "dimension_numbers": dimension_numbers,
        "out_dtype": out_dtype,
        "out_sharding": out_sharding,
    }
    emulated = functools.partial(_multiply_decoded, inner=inner, **options)

    def on_cpu(lhs, rhs):
        return _xla.called(_multiply_on_cpu, lhs, rhs, inner=tuple(inner), **options)

    native = functools.partial(_multiply_natively, precision=precision, **options)
    if any(inner) and execution != "emulated":
        choice = choice_of(lhs, rhs, dimension_numbers, execution)
        if choice.engine is not None:
            return _multiply_by_kernel(
                choice, lhs, rhs, inner, on_cpu, emulated, execution, options
            )
    elif execution == "native":
        return native(lhs, rhs)
    if execution == "auto" and not any(inner) and are_multiplied(lhs.format, rhs.format):
        return jax.lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=native)
    return jax.lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=emulated)


def choice_of(
    lhs: Operand, rhs: Operand, dimension_numbers: DimensionNumbers, execution: Execution
) -> _kernels.Choice:
    """What multiplies operands whose scales are within the sum on the device that is traced for.

    Raises:
      ValueError: where `execution` is native and there is nothing.
    """
    arrays = [operand.data if isinstance(operand, Codes) else operand for operand in (lhs, rhs)]
    choice = _kernels.choose(
        lhs,
        rhs,
        dimension_numbers,
        _kernels.device_of(*arrays),
        _kernels.division_of(*arrays),
        execution,
    )
    if choice.engine is None and execution == "native":
        raise ValueError(
            "execution 'native' needs a kernel for scales that differ along what is summed over; "
            f"{choice.reason}. Use 'auto', which multiplies the same values in bfloat16 or float32."
        )
    return choice


def engine_of(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    execution: Execution,
    arrays: tuple,
) -> str:
    """What multiplies two operands, in words; "" where no scale is within the sum.

    Of the operands only shapes, dtypes and casts are read; `arrays` say what it is traced for.
    """
    inner = any(
        isinstance(operand, Codes) and not operand.is_separable(axes)
        for operand, axes in zip((lhs, rhs), dimension_numbers[0])
    )
    if not inner:
        return ""
    if execution == "emulated":
        return "emulated: the recipe says so"
    device, division = _kernels.device_of(*arrays), _kernels.division_of(*arrays)
    choice = _kernels.choose(lhs, rhs, dimension_numbers, device, division, execution)
    return f"emulated: {choice.reason}" if choice.engine is None else choice.engine.name


def _multiply_by_kernel(choice, lhs, rhs, inner, on_cpu, emulated, execution, options):
    def kernel(lhs, rhs):
        # Scales outside of the sum multiply the result, which the caller does for all engines.
        inside = [
            operand if within else dataclasses.replace(operand, scale=jnp.ones_like(operand.scale))
            for operand, within in zip((lhs, rhs), inner)
        ]
        return choice.multiply(*inside, options["dimension_numbers"], options["out_dtype"])

    # What is traced for one device may still be lowered for others.
    others = {} if execution == "native" else {"cpu": on_cpu, "default": emulated}
    return jax.lax.platform_dependent(lhs, rhs, **others | {choice.engine.platform: kernel})


def _multiply_natively(lhs, rhs, *, dimension_numbers, out_dtype, precision, out_sharding):
    return jax.lax.dot_general(
        lhs.data,
        rhs.data,
        dimension_numbers,
        precision=precision,
        preferred_element_type=out_dtype,
        out_sharding=out_sharding,
    )


def in_rows(codes: Codes, contracted: tuple[int, ...], execution: Execution) -> Codes:
    """The same codes; where a GPU multiplies them natively, they lie in its memory row by row.

    To be said once, where codes are made, and not at each product: XLA gathers divided codes behind
    it, and would do so for each product alone.

    Args:
      codes: an operand.
      contracted: its axes that are summed over.
      execution: of the product, see `fp8jax.Recipe`.
    """
    device = _kernels.device_of(codes.data)
    natively = codes.is_separable(contracted) or _kernels.has_engine(device, execution)
    if execution == "emulated" or not natively:
        return codes

    data = _xla.row_major_on_gpu(codes.data)
    # Of codes that are kept as they are, XLA would have the axis of the stack between the others.
    order = None
    if device.platform == "gpu" and not codes.is_separable(contracted):
        order = (*(axis for axis in range(codes.ndim) if axis not in contracted), *contracted)
    return dataclasses.replace(codes, data=data, order=order)


def is_exact_in_bfloat16(operand: Operand) -> bool:
    """Whether an operand's values, inner scales multiplied in, are exact there."""
    return operand.power_of_two if isinstance(operand, Codes) else operand.dtype == jnp.bfloat16


def _multiply_decoded(
    lhs,
    rhs,
    *,
    inner,
    dimension_numbers,
    out_dtype,
    out_sharding,
    bfloat16=True,
    decode=decode_bits,
):
    exact = all(
        is_exact_in_bfloat16(operand) or isinstance(operand, Codes) and not scaled
        for operand, scaled in zip((lhs, rhs), inner)
    )
    dtype = jnp.bfloat16 if bfloat16 and exact else jnp.float32
    lhs, rhs = (
        operand.values(dtype, scaled=scaled, decode=decode)
        if isinstance(operand, Codes)
        else operand.astype(dtype)
        for operand, scaled in zip((lhs, rhs), inner)
    )
    product = jax.lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
    return product.astype(out_dtype)


def _multiply_on_cpu(lhs, rhs, *, inner, dimension_numbers, out_dtype, out_sharding):
    """Emulated, in the layout that XLA's CPU library is fast for.

    With instructions for it, a bfloat16 product runs at a multiple of a float32 product's speed,
    but only where the lhs contracts its last axes. Where it does not, as in each weight gradient,
    its codes are transposed first.
    """
    # Decoded by XLA's own conversion, as fast here as ours and one instruction to compile instead
    # of forty.
    lhs, rhs = (
        dataclasses.replace(operand, data=_xla.in_memory(operand.data))
        if isinstance(operand, Codes)
        else operand
        for operand in (lhs, rhs)
    )
    options = {
        "inner": inner,
        "out_dtype": out_dtype,
        "out_sharding": out_sharding,
        "decode": jax.lax.convert_element_type,
    }
    if not cpu_multiplies_bfloat16():
        return _multiply_decoded(
            lhs, rhs, dimension_numbers=dimension_numbers, bfloat16=False, **options
        )
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    order = lhs_batch + _kept(lhs.ndim, lhs_contracting, lhs_batch) + lhs_contracting
    if order != tuple(range(lhs.ndim)):
        lhs = (
            lhs.transpose(order, move=_xla.transposed)
            if isinstance(lhs, Codes)
            else jnp.transpose(lhs, order)
        )
    contracting = tuple(range(lhs.ndim - len(lhs_contracting), lhs.ndim))
    batch = tuple(range(len(lhs_batch)))
    product = _multiply_decoded(
        lhs, rhs, dimension_numbers=((contracting, rhs_contracting), (batch, rhs_batch)), **options
    )
    # With nothing to multiply between them, a transposition would be folded into the product.
    return _xla.before_transposition(product) if all(inner) else product


def _kept(ndim: int, contracting: tuple[int, ...], batch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in contracting + batch)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions that multiply bfloat16 and sum in float32 (AMX or
    AVX512-BF16).

    Only Linux tells, in /proc/cpuinfo; elsewhere the answer is no, and products run in float32.
    """
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else ()
    return "amx_bf16" in flags or "avx512_bf16" in flags
