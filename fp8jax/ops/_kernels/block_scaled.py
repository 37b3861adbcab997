"""cuDNN's block-scaled product, on Blackwell's tensor cores.

    out[b, m, n] = sum over k of  lhs[b, m, k] 2^s[b, m, k // 32]  rhs[b, n, k] 2^t[b, n, k // 32]

which is the MX product of the OCP (MX 1.0, section 5.2): codes of E4M3 or E5M2, not E5M2 by E5M2,
one scale in E8M0 for each 32 of the sum, sums in float32. `jax.nn.scaled_matmul` is JAX's name of
it; XLA fills up the other axes to multiples of 128. Longer blocks are blocks of 32 that have the
same scale, so all recipes run by it whose scales are powers of two, for whole multiples of 32:
DeepSeek's of 128 too.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.devices import are_multiplied
from fp8jax.ops._cast import Codes

BLOCK = 32


def refuses(lhs: Codes, rhs: Codes, extent: int) -> str:
    """Why it can't multiply these operands, in blocks of this extent; "" where it can."""
    if not are_multiplied(lhs.format, rhs.format):
        return f"its formats are {lhs.format.name} and {rhs.format.name}"
    if not (lhs.power_of_two and rhs.power_of_two):
        return "its scales are not powers of two"
    if extent % BLOCK:
        return f"its blocks are of {extent}, no multiple of {BLOCK}"
    return ""


def unit(extent: int) -> int:
    """How many elements a scale is for."""
    del extent
    return BLOCK


def multiply(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_scale: jax.Array,
    rhs_scale: jax.Array,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """The product of codes `[batch, rows, sum]` with float32 scales `[batch, rows, sum / 32]`."""
    return jax.nn.scaled_matmul(
        lhs, rhs, _e8m0(lhs_scale), _e8m0(rhs_scale), preferred_element_type=out_dtype
    )


def _e8m0(scale: jax.Array) -> jax.Array:
    """Normal powers of two as E8M0, whose codes are float32's exponents."""
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    exponent = lax.shift_right_logical(bits, jnp.uint32(23)).astype(jnp.uint8)
    return lax.bitcast_convert_type(exponent, jnp.float8_e8m0fnu)
