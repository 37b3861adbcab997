"""Block-wise products on Hopper's FP8 tensor cores, summed in two levels.

    out[b, m, n] = sum over blocks c of  lhs_scale[b, m, c] rhs_scale[b, n, c] p[b, m, n, c]
    p[b, m, n, c] = sum over the k of block c of  lhs[b, m, k] rhs[b, n, k]

which is how DeepSeek-V3 multiplies (arXiv 2412.19437, section 3.3.2): the tensor cores sum one
block of 32, 64 or 128 codes (`wgmma`, into registers that start at zero), where few bits suffice;
the other units multiply that by its two scales and add it to a sum in float32. So scales may be any
float32, and one of 128 x 128 is one of 1 x 128 that is repeated. The product of two scales must be
a normal float32, or results below 2^-100 vanish.

`wgmma` reads FP8 from shared memory alone, both operands along the sum. Codes come there by copies
of the tensor memory accelerator, in pieces of 8 rows by one block. What lies outside of an array it
fills with zeros, and leaves out when it writes; so operands are filled up to whole pieces alone.

A program has two warpgroups that multiply and a third that copies for them, up to four tiles of the
sum ahead. A tile of the result is 256 x 128: each warpgroup keeps 128 x 128 sums, 128 registers of
each thread, and multiplies 64 rows at a time into 64 further ones. While the one waits for its
multiplications, the other scales what it got: for 64 x 128 x 128, the tensor cores take 256 cycles,
and to clear, scale and add takes 160. In blocks of 32 it takes 160 beside 64, and the tensor cores
wait: that is about a bfloat16 product's time. There a tile is 128 x 128, for more scales than that
are no registers left. There is one program for each of the 132 multiprocessors, which goes over
tiles in stripes of 8 x 16, that share what the cache holds.

All this is by count, and by the machine code that JAX 0.12 makes (QGMMA; in blocks of 128, no
register is spilled within the loop). Interpreted on a CPU it gives the sums. No device has run it,
so `execution="auto"` leaves it alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import _shims
from fp8jax.ops._cast import Codes

UNMEASURED = "no device has run it yet"


def refuses(lhs: Codes, rhs: Codes, extent: int) -> str:
    """Why it can't multiply these operands, in blocks of this extent; "" where it can."""
    if not _shims.HAS_GPU_KERNELS:
        return f"it needs JAX 0.12, and this is {jax.__version__}"
    native = (jnp.float8_e4m3fn, jnp.float8_e5m2)
    for operand in (lhs, rhs):
        if operand.data.dtype not in native:
            return f"it multiplies E4M3 and E5M2, and not {operand.format.name}"
    if extent % 32:
        return f"its blocks are of {extent}, no multiple of 32"
    return ""


def unit(extent: int) -> int:
    """How many elements a scale is for."""
    return next(size for size in (128, 64, 32) if extent % size == 0)


def multiply(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_scale: jax.Array,
    rhs_scale: jax.Array,
    out_dtype: jnp.dtype,
    interpret: Any = None,
) -> jax.Array:
    """The product of codes `[batch, rows, sum]` with float32 scales `[batch, rows, sum / unit]`.

    Args:
      lhs, rhs: codes of E4M3 or E5M2.
      lhs_scale, rhs_scale: of 32, 64 or 128 codes each.
      out_dtype: of the result.
      interpret: as `jax.experimental.pallas.mosaic_gpu.kernel`'s, to run it on a CPU.
    """
    # Here, since importing Mosaic takes half a second and sets variables of the environment.
    from fp8jax.ops._kernels.two_level_kernel import product

    return product(lhs, rhs, lhs_scale, rhs_scale, jnp.dtype(out_dtype), interpret)
