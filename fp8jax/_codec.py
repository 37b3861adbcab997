"""Values to codes and back: rounding and overflow, on the bits.

Rounding is one idea for every format and input: a value between two powers of two is a multiple of
a *quantum* (the spacing of the format's values there, never less than the smallest subnormal), so
``n = value / quantum`` is rounded to an integer, and the code is ``n`` plus an offset for the
binade. The division is by a power of two built from exponent bits, so it is exact and the only
rounding is the intended one. A carry into the next binade needs no care: codes are consecutive
there.

Only integer operations, exact float ones and a bitcast to the float8 dtype occur, all of them
`jax.lax`'s: an operator of `jax.numpy` is a jit, traced anew for each shape, and of all that is
traced for a model the casts are the most. XLA may fold or
reorder chains of float conversions, and on CPUs it flushes f32 subnormals; neither touches this.

NaNs and zeros: NaN encodes to 7F (E4M3), 7E (E5M2), 7C (E4M3IEEE) or 78 (E3M4) with its own sign
bit, to 80 in the FNUZ formats and to FF in E8M0. The former four have both zeros, the FNUZ formats
one, and E8M0 none.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax._formats import E8M0, Format, get_format

OVERFLOWS = ("saturate", "clip", "ocp")
_DECODED = tuple(map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)))


class _Layout(typing.NamedTuple):
    """The bits of the IEEE float that values are rounded in."""

    dtype: np.dtype
    uint: np.dtype
    mantissa: int
    bias: int

    @property
    def bits(self) -> int:
        return self.uint.itemsize * 8

    @property
    def infinity(self) -> int:
        return (2 * self.bias + 1) << self.mantissa

    @property
    def magnitudes(self) -> int:
        """All bits but the sign's."""
        return (1 << (self.bits - 1)) - 1

    def pattern(self, value: float) -> int:
        """The bits of a constant."""
        return int(np.asarray(value, self.dtype).view(self.uint))


_F32 = _Layout(np.dtype(np.float32), np.dtype(np.uint32), 23, 127)
_F64 = _Layout(np.dtype(np.float64), np.dtype(np.uint64), 52, 1023)
_QUIET_NAN = 0x7FC00000  # as the bits of a float32


def widened(dtype) -> np.dtype:
    """The dtype to compute in: float32 for narrower ones; float64 keeps its width, for a second
    rounding is an error.
    """
    return max(np.dtype(dtype), np.dtype(np.float32), key=lambda d: d.itemsize)


def _widen(x: jax.Array) -> tuple[jax.Array, _Layout]:
    layout = _F64 if widened(x.dtype) == np.float64 else _F32
    return lax.convert_element_type(x, layout.dtype), layout


def encode(x, fmt, *, rounding="nearest", key=None, overflow="saturate") -> jax.Array:
    """Round values to 8-bit float codes.

    Args:
      x: array of any shape; float32, bfloat16, float16, or float64 where x64 is on. It is rounded
        once, from its own width.
      fmt: a `Format`, its name or its dtype.
      rounding: ``"nearest"`` (ties to even), ``"toward_zero"``, or ``"stochastic"``: up with the
        probability ``(x - below) / (above - below)``, at the resolution of 32 random bits (64 for
        float64). E8M0 takes ``"up"`` too, and not ``"stochastic"``.
      key: a `jax.random` key; stochastic rounding needs it, the others take none.
      overflow: ``"saturate"``: finite values beyond the range become the largest finite value;
        infinities stay infinities, or become NaN where the format has none. ``"clip"``: infinities
        become the largest finite value, too. ``"ocp"``: values that round past the largest become
        infinity, or NaN where the format has none. Toward zero, only infinities do.

    Returns:
      Array of ``fmt.dtype``, shape of `x`. NaN stays NaN, with its sign where the format has NaNs
      of both signs. Zeros keep their sign where the format has a negative zero. E8M0 turns zeros
      into its smallest value, 2^-127, and negative values into NaN.

    Gradient: straight through; zero where `x` saturates. The codes' cotangent is float32, never
    float8. Codes that a loop's body closes over have none in JAX: decode them before the loop.

    Raises:
      TypeError: where `x` is not floating.
      ValueError: where `fmt`, `rounding` or `overflow` is unknown, or `key` and `rounding` don't go
        together.

    Sources: OCP OFP8 1.0 and OCP MX 1.0 (conversion, overflow); IEEE 754, section 4.3 (directions).

    >>> import jax.numpy as jnp
    >>> encode(jnp.array([1.0, 1.95, 1000.0]), "E4M3")
    Array([1, 2, 448], dtype=float8_e4m3fn)
    """
    fmt, x = get_format(fmt), jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise TypeError(
            f"x must be float32, bfloat16, float16 or float64; got {x.dtype}. Cast it: "
            "x.astype(jnp.float32)."
        )
    check_rounding(fmt, rounding, key)
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {OVERFLOWS}; got {overflow!r}.")
    return _inline_encode(x, key, fmt, rounding, overflow)


def decode(codes, fmt=None, dtype=jnp.float32) -> jax.Array:
    """Turn 8-bit float codes into their values, exactly.

    Args:
      codes: array of any shape, of a float8 dtype or uint8.
      fmt: a `Format`, its name or its dtype; by default that of `codes`. uint8 codes need it.
      dtype: float32, bfloat16, float16 or float64. Every value of every format but E8M0 is exact in
        each of them.

    Returns:
      Array of `dtype`, shape of `codes`. Every NaN code becomes the quiet NaN of its sign.

    Gradient: straight through.

    Raises:
      TypeError: where `codes` are not 8-bit codes, or `dtype` is not one of the four.
      ValueError: where `fmt` is unknown, lacking for uint8, or not that of `codes`.

    >>> import jax.numpy as jnp
    >>> decode(jnp.array([0x38, 0x7E, 0xFF], jnp.uint8), "E4M3")
    Array([  1., 448.,  nan], dtype=float32)
    """
    codes, dtype = jnp.asarray(codes), np.dtype(dtype)
    if dtype not in _DECODED:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _DECODED))}; got {dtype}.")
    if codes.dtype == np.uint8:
        if fmt is None:
            raise ValueError(
                "fmt is needed for uint8 codes, which don't say their format; got None. Pass "
                'fmt="E4M3".'
            )
        codes = lax.bitcast_convert_type(codes, get_format(fmt).dtype)
    elif codes.dtype.itemsize != 1 or not jnp.issubdtype(codes.dtype, jnp.floating):
        raise TypeError(
            f"codes must be of a float8 dtype or uint8; got {codes.dtype}. Make them with "
            "encode(x, fmt)."
        )
    elif fmt is not None and get_format(fmt).dtype != codes.dtype:
        raise ValueError(
            f"fmt must be that of the codes, {get_format(codes.dtype)}; got {get_format(fmt)}. "
            "Leave it out."
        )
    return _inline_decode(codes, dtype)


def check_rounding(fmt: Format, rounding: str, key) -> None:
    """Raise ValueError where a format, a rounding and the presence of a key don't go together."""
    allowed = (
        ("nearest", "up", "toward_zero")
        if fmt == E8M0
        else ("nearest", "stochastic", "toward_zero")
    )
    if rounding not in allowed:
        raise ValueError(f"rounding to {fmt} must be one of {allowed}; got {rounding!r}.")
    if rounding == "stochastic" and key is None:
        raise ValueError(
            "key is needed for stochastic rounding; got None. Pass key=jax.random.key(seed)."
        )
    if rounding != "stochastic" and key is not None:
        raise ValueError(
            f"key has no effect on rounding {rounding!r}; got one. Drop it, or use "
            'rounding="stochastic".'
        )


def is_saturated(x, fmt: Format) -> jax.Array:
    """Where values lie beyond the range by more than half a unit, so that their codes don't follow
    them any more.
    """
    x, layout = _widen(x)
    return lax.abs(x) > layout.dtype.type(fmt.overflow_threshold)


def encode_bits(
    x, fmt: Format, rounding="nearest", key=None, overflow="saturate", noise=None, source=None
) -> jax.Array:
    """`encode` without its gradient rule, its jit and its checks: for use inside other rules.

    Stochastic rounding takes `noise` instead of a key too: uniform uint32 (for float64, uint64) of
    the shape of `x`. `source` is what `x` was scaled from, where scaling may have made an infinity
    of a finite value: that saturates.
    """
    x, layout = _widen(x)
    bits = lax.bitcast_convert_type(x, layout.uint)
    magnitude = lax.bitwise_and(bits, layout.uint.type(layout.magnitudes))
    if fmt == E8M0:
        code = _round_exponent(bits, layout, rounding, overflow)
    else:
        code = _round_quotient(magnitude, layout, fmt, rounding, key, overflow, noise)
        if source is not None:
            source = lax.bitcast_convert_type(
                lax.convert_element_type(source, layout.dtype), layout.uint
            )
            magnitude = lax.bitwise_and(source, layout.uint.type(layout.magnitudes))
        code = _with_special(code, magnitude, layout, fmt, overflow)
        sign = lax.shift_right_logical(bits, layout.uint.type(layout.bits - 8))
        sign = lax.bitwise_and(sign, layout.uint.type(0x80))
        if not fmt.has_negative_zero:  # 0x80 is NaN there, so zeros lose their sign
            sign = _where(lax.eq(code, layout.uint.type(0)), 0, sign)
        code = lax.bitwise_or(code, sign)
    return lax.bitcast_convert_type(lax.convert_element_type(code, np.uint8), fmt.dtype)


def _where(condition, constant: int, bits):
    """`jnp.where` with a constant, without the jit of its own that `jnp.where` brings into every
    jaxpr.
    """
    return lax.select(condition, lax.full_like(bits, constant), bits)


def _round_quotient(magnitude, layout: _Layout, fmt: Format, rounding, key, overflow, noise):
    """The code, in the input's width, of a magnitude in a signed format."""
    u = layout.uint.type
    # Beyond `ceiling` nothing new can come out of rounding; Inf and NaN are handled apart.
    truncate_overflow = overflow != "ocp" or rounding == "toward_zero"
    ceiling = fmt.max if truncate_overflow else 2 * fmt.max
    bounded = lax.min(magnitude, u(layout.pattern(ceiling)))

    # The binade's exponent field; the subnormals share the lowest normal binade's quantum.
    lowest = u(layout.pattern(fmt.min_normal))
    binade = lax.max(lax.bitwise_and(bounded, u(layout.infinity)), lowest)
    # Added to a float whose last place is the quantum, a value would be rounded without this
    # division. But with that little less work in a cast XLA's GPU compiler takes kernels apart that
    # cast and observe an operand: a launch more for each site, and more bytes read.
    inverse_quantum = lax.sub(u((2 * layout.bias + fmt.mantissa_bits) << layout.mantissa), binade)
    quotient = lax.mul(
        lax.bitcast_convert_type(bounded, layout.dtype),
        lax.bitcast_convert_type(inverse_quantum, layout.dtype),
    )
    whole = _round_to_integer(quotient, layout, rounding, key, noise)
    binades = lax.shift_right_logical(
        lax.sub(binade, lowest), u(layout.mantissa - fmt.mantissa_bits)
    )
    code = lax.add(whole, binades)

    if not truncate_overflow:  # IEEE 754, 4.3.2: finite values don't overflow toward zero
        code = _where(lax.gt(code, u(fmt.max_code)), fmt.overflow_code, code)
    return code


def _with_special(code, magnitude, layout: _Layout, fmt: Format, overflow):
    """The code of a magnitude, or an infinity's or a NaN's where `magnitude` is one."""
    infinity = layout.uint.type(layout.infinity)
    if overflow == "clip":
        return _where(lax.gt(magnitude, infinity), fmt.nan_code, code)
    if not fmt.has_inf:  # One comparison for both: a cast is short.
        return _where(lax.ge(magnitude, infinity), fmt.nan_code, code)
    code = _where(lax.eq(magnitude, infinity), fmt.overflow_code, code)
    return _where(lax.gt(magnitude, infinity), fmt.nan_code, code)


def _round_to_integer(quotient, layout: _Layout, rounding, key, noise):
    """Round a small non-negative float to an integer of the layout's width."""
    # Adding 2^mantissa leaves the integer in the low bits, and rounds to nearest, ties to even, on
    # the way.
    shift = layout.dtype.type(2.0**layout.mantissa)
    whole = quotient if rounding == "nearest" else lax.floor(quotient)
    integer = lax.sub(
        lax.bitcast_convert_type(lax.add(whole, shift), layout.uint),
        layout.uint.type(layout.pattern(shift)),
    )
    if rounding == "stochastic":
        # P(up) is the residue itself, to the last of as many random bits as the input has.
        noise = jax.random.bits(key, quotient.shape, layout.uint) if noise is None else noise
        threshold = (quotient - whole) * layout.dtype.type(2.0**layout.bits)
        integer = integer + lax.convert_element_type(
            noise < lax.convert_element_type(threshold, layout.uint), layout.uint
        )
    return integer


def _round_exponent(bits, layout: _Layout, rounding, overflow):
    """The code, in the input's width, of E8M0: the exponent alone, rounded over the mantissa below
    it.
    """
    u = layout.uint.type
    magnitude = bits & u((1 << (layout.bits - 1)) - 1)
    # Bring the exponent's bias to E8M0's, so that 2^-127 becomes 0. That value is a subnormal of
    # f32, whose binade [2^-127, 2^-126) is spread over the lower half of the patterns; smaller
    # values join it.
    if layout is _F64:
        pattern = lax.max(magnitude, u(layout.pattern(E8M0.min_normal))) - u(
            layout.bias - E8M0.bias << layout.mantissa
        )
    else:
        half, one = u(1 << layout.mantissa - 1), u(1 << layout.mantissa)
        pattern = lax.select(magnitude < one, (lax.max(magnitude, half) - half) << u(1), magnitude)
    below = u((1 << layout.mantissa) - 1)
    if rounding == "up":
        pattern = pattern + below
    elif rounding == "nearest":  # ties to the even code
        pattern = pattern + (below >> u(1)) + ((pattern >> u(layout.mantissa)) & u(1))
    top = E8M0.overflow_code if overflow == "ocp" else E8M0.max_code
    code = lax.min(pattern >> u(layout.mantissa), u(top))
    first_nan = layout.infinity + (overflow == "clip")
    is_nan = (bits > u(1 << layout.bits - 1)) | (
        magnitude >= u(first_nan)
    )  # -0.0 is a zero, not a negative
    return _where(is_nan, E8M0.nan_code, code)


def decode_bits(codes, dtype=jnp.float32) -> jax.Array:
    """`decode` without its gradient rule, its jit and its checks: for use inside other rules."""
    fmt = get_format(codes.dtype)
    code = lax.convert_element_type(lax.bitcast_convert_type(codes, np.uint8), np.uint32)
    bits = _decode_exponent(code) if fmt == E8M0 else _decode_magnitude(code, fmt)
    if dtype == jnp.bfloat16:  # every value has at most 8 significant bits: the lower half is zero
        upper = lax.convert_element_type(lax.shift_right_logical(bits, np.uint32(16)), np.uint16)
        return lax.bitcast_convert_type(upper, jnp.bfloat16)
    return lax.convert_element_type(lax.bitcast_convert_type(bits, np.float32), dtype)


def _decode_magnitude(code, fmt: Format):
    """The f32 bits of a signed format's code."""
    u = np.uint32
    magnitude = lax.bitwise_and(code, u(0x7F))
    shifted = lax.shift_left(magnitude, u(23 - fmt.mantissa_bits))
    normal = lax.add(shifted, u((127 - fmt.bias) << 23))
    # A subnormal is read as if its exponent field were 1, which adds exactly one min_normal too
    # much.
    with_excess = lax.bitcast_convert_type(lax.add(shifted, u((128 - fmt.bias) << 23)), np.float32)
    subnormal = lax.bitcast_convert_type(lax.sub(with_excess, np.float32(fmt.min_normal)), u)
    bits = lax.select(lax.lt(magnitude, u(1 << fmt.mantissa_bits)), subnormal, normal)
    if fmt.has_inf:
        bits = _where(lax.eq(magnitude, u(fmt.overflow_code)), _F32.infinity, bits)
    is_nan = (
        lax.eq(code, u(fmt.nan_code))
        if not fmt.has_negative_zero
        else lax.gt(magnitude, u(fmt.max_code + fmt.has_inf))
    )
    bits = _where(is_nan, _QUIET_NAN, bits)
    return lax.bitwise_or(bits, lax.shift_left(lax.bitwise_and(code, u(0x80)), u(24)))


def _decode_exponent(code):
    """The f32 bits of an E8M0 code."""
    u = np.uint32
    bits = _where(code == u(0), 1 << 22, lax.shift_left(code, u(23)))  # 2^-127 is an f32 subnormal
    return _where(code == u(E8M0.nan_code), _QUIET_NAN, bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _encode(x, key, fmt, rounding, overflow):
    return encode_bits(x, fmt, rounding, key, overflow)


def _encode_forward(x, key, fmt, rounding, overflow):
    dtype_of_x = jnp.zeros(0, x.dtype)
    return encode_bits(x, fmt, rounding, key, overflow), (is_saturated(x, fmt), dtype_of_x)


def _encode_backward(fmt, rounding, overflow, residuals, cotangent):
    # The cotangent of float8 codes is float32, as `_decode_backward` gives it: see there.
    saturated, dtype_of_x = residuals
    return lax.convert_element_type(jnp.where(saturated, 0, cotangent), dtype_of_x.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _decode(codes, dtype):
    return decode_bits(codes, dtype)


def _decode_forward(codes, dtype):
    return decode_bits(codes, dtype), None


def _decode_backward(dtype, _, cotangent):
    # JAX would have a cotangent of the codes' own dtype: 660 would be NaN in it, and 1e-6 zero. A
    # custom rule may hand over a wider one, and every rule in between (jit, vmap, scan over codes,
    # reshapes) passes it on unrounded.
    return (lax.convert_element_type(cotangent, widened(dtype)),)


_encode.defvjp(_encode_forward, _encode_backward)
_decode.defvjp(_decode_forward, _decode_backward)
_inline_encode = jax.jit(_encode, static_argnums=(2, 3, 4), inline=True)
_inline_decode = jax.jit(_decode, static_argnums=(1,), inline=True)
