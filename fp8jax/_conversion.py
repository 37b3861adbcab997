"""Values to codes by an accelerator's own conversion: the codes of `codec`, in fewer operations.

XLA takes a clamp and a conversion into the product that makes an operand, where it costs nothing;
the integer codec's operations take longer than a quarter of such a product. The integer codec says
what is right, and CPUs run it.

Which way a device rounds in its conversion isn't written everywhere. It doesn't matter for a value
that the format has; so where nothing is known, values are rounded before.
"""

import jax
import numpy as np
from jax import lax

from fp8jax._formats import E4M3, E5M2, Format

_SIGN, _EXPONENT = np.int32(-(2**31)), np.int32(0x7F800000)  # of the bits of a float32
_MANTISSA_BITS = 23


def is_convertible(fmt: Format, rounding: str) -> bool:
    """Whether accelerators convert to this format, in this rounding.

    >>> is_convertible(E4M3, "nearest"), is_convertible(E4M3, "toward_zero")
    (True, False)
    """
    return fmt in (E4M3, E5M2) and rounding == "nearest"


def convert(
    x: jax.Array, source: jax.Array, fmt: Format, overflow: str, *, round_first: bool
) -> jax.Array:
    """Codes of values, rounded to nearest, ties to even; those of `fp8jax._codec.encode_bits`.

    Args:
      x: float32 array of any shape.
      source: float32 of that shape, what `x` was scaled from: scaling may make an infinity of a
        finite value, which saturates.
      fmt: E4M3 or E5M2.
      overflow: "saturate", or "clip", see `fp8jax.encode`.
      round_first: whether to round before the conversion, which may then round as it likes.
        Without, it must round to nearest, ties to even.

    Returns:
      Array of `fmt.dtype`. The sign of a NaN may be lost.

    >>> import jax.numpy as jnp
    >>> x = jnp.float32([1.0, 1.95, -1000.0, jnp.inf])
    >>> convert(x, x, E4M3, "saturate", round_first=True)
    Array([1, 2, -448, nan], dtype=float8_e4m3fn)
    """
    largest = np.float32(fmt.max)
    bounded = lax.clamp(-largest, x, largest)
    if round_first:
        bounded = rounded(bounded, fmt)
    # A comparison is false of NaN.
    counts = (
        lax.eq(source, source)
        if overflow == "clip"
        else lax.lt(lax.abs(source), np.float32(np.inf))
    )
    return lax.convert_element_type(lax.select(counts, bounded, source), fmt.dtype)


def rounded(x: jax.Array, fmt: Format) -> jax.Array:
    """float32 values rounded to those of a format, ties to even; magnitudes within its range.

    Added to a float whose last place is the format's quantum there, a value is rounded to a
    multiple of that.

    >>> import jax.numpy as jnp
    >>> rounded(jnp.float32([1.95, -0.0005, 300.0]), E4M3)
    Array([  2.,  -0., 288.], dtype=float32)
    """
    bits = lax.bitcast_convert_type(x, np.int32)
    # Below the normal numbers, all have one quantum.
    least = np.float32(fmt.min_normal).view(np.int32)
    binade = lax.max(lax.bitwise_and(bits, _EXPONENT), least)
    # With half of it more, sums stay in one binade whatever the sign of the value.
    raised = (_MANTISSA_BITS - fmt.mantissa_bits << _MANTISSA_BITS) + (1 << _MANTISSA_BITS - 1)
    shift = lax.bitcast_convert_type(lax.add(binade, np.int32(raised)), np.float32)
    magnitude = lax.bitcast_convert_type(lax.sub(lax.add(x, shift), shift), np.int32)
    # A negative value that becomes zero keeps its sign.
    sign = lax.bitwise_and(bits, _SIGN)
    return lax.bitcast_convert_type(lax.bitwise_or(magnitude, sign), np.float32)
