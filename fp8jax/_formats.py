"""The immutable facts of each 8-bit float format.

Every other module reads its numbers from here; nothing else in the library knows, say, that E4M3
ends at 448.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
    """An 8-bit floating-point format.

    A code's value is ``(-1)^s * 2^(E - bias) * (1 + M / 2^mantissa_bits)``, or, where the exponent
    field ``E`` is 0, ``(-1)^s * min_subnormal * M``. E8M0 has neither sign, mantissa nor
    subnormals: its value is ``2^(code - bias)``.

    Instances are hashable and serve as static arguments of jitted functions.

    Attributes:
      name: the library's name, such as ``"E4M3"``.
      dtype: the NumPy dtype (from ml_dtypes) of arrays of such codes.
      exponent_bits, mantissa_bits: widths of the fields.
      bias: exponent bias.
      max: largest finite value.
      min_normal: smallest normal value.
      min_subnormal: smallest positive value; None where the format has no subnormals.
      has_inf: whether infinities have codes.
      has_negative_zero: whether ``-0.0`` has a code of its own.
      nan_codes: all codes that mean NaN.

    Sources: OCP OFP8 1.0 (E4M3, E5M2), IEEE P3109 and ONNX (FNUZ), OCP MX 1.0 (E8M0), ml_dtypes
    (the others).

    >>> from fp8jax import E4M3
    >>> E4M3, E4M3.max, E4M3.min_subnormal == 2**-9
    (E4M3, 448.0, True)
    """

    name: str
    dtype: np.dtype
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    min_normal: float
    min_subnormal: float | None
    has_inf: bool
    has_negative_zero: bool
    nan_codes: tuple[int, ...]

    def __repr__(self) -> str:
        return self.name

    @property
    def signed(self) -> bool:
        """Whether the format has a sign bit (all but E8M0)."""
        return self.mantissa_bits > 0

    @property
    def max_code(self) -> int:
        """The code of ``max``."""
        codes = 128 if self.signed else 256
        return codes - 1 - sum(code < codes for code in self.nan_codes) - self.has_inf

    @property
    def nan_code(self) -> int:
        """The NaN code that encoding gives (its sign bit is NaN's own, where the format has NaNs of
        both signs).
        """
        # A quiet NaN has the top mantissa bit set; a format with a single NaN (per sign) has no
        # choice.
        quiet = ((1 << self.exponent_bits) - 1 << self.mantissa_bits) | (
            1 << self.mantissa_bits >> 1
        )
        return quiet if self.has_inf else self.nan_codes[0]

    @property
    def overflow_code(self) -> int:
        """The code that a too large value gets under the non-saturating rule: infinity's, or else
        NaN's.
        """
        return self.max_code + 1 if self.has_inf else self.nan_code

    @property
    def overflow_threshold(self) -> float:
        """The magnitude beyond which rounding to nearest leaves the range: half a unit above
        ``max``.
        """
        exponent = self.max_code >> self.mantissa_bits
        return self.max + 2.0 ** (exponent - self.bias - self.mantissa_bits - 1)


def _format(
    name: str,
    dtype,
    mantissa_bits: int,
    bias: int,
    nan_codes,
    has_inf=False,
    has_negative_zero=True,
) -> Format:
    """Derive the remaining facts of a signed format from its bits."""
    exponent_bits = 7 - mantissa_bits
    max_code = 127 - sum(code < 128 for code in nan_codes) - has_inf
    exponent, mantissa = max_code >> mantissa_bits, max_code & ((1 << mantissa_bits) - 1)
    return Format(
        name=name,
        dtype=np.dtype(dtype),
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
        max=2.0 ** (exponent - bias) * (1 + mantissa / (1 << mantissa_bits)),
        min_normal=2.0 ** (1 - bias),
        min_subnormal=2.0 ** (1 - bias - mantissa_bits),
        has_inf=has_inf,
        has_negative_zero=has_negative_zero,
        nan_codes=tuple(nan_codes),
    )


def _both_signs(*codes: int) -> tuple[int, ...]:
    return codes + tuple(code + 128 for code in codes)


E4M3 = _format("E4M3", jnp.float8_e4m3fn, 3, 7, _both_signs(0x7F))
E5M2 = _format("E5M2", jnp.float8_e5m2, 2, 15, _both_signs(*range(0x7D, 0x80)), has_inf=True)
E4M3FNUZ = _format("E4M3FNUZ", jnp.float8_e4m3fnuz, 3, 8, (0x80,), has_negative_zero=False)
E5M2FNUZ = _format("E5M2FNUZ", jnp.float8_e5m2fnuz, 2, 16, (0x80,), has_negative_zero=False)
E4M3B11FNUZ = _format(
    "E4M3B11FNUZ", jnp.float8_e4m3b11fnuz, 3, 11, (0x80,), has_negative_zero=False
)
E3M4 = _format("E3M4", jnp.float8_e3m4, 4, 3, _both_signs(*range(0x71, 0x80)), has_inf=True)
E4M3IEEE = _format("E4M3IEEE", jnp.float8_e4m3, 3, 7, _both_signs(*range(0x79, 0x80)), has_inf=True)
E8M0 = Format(
    name="E8M0",
    dtype=np.dtype(jnp.float8_e8m0fnu),
    exponent_bits=8,
    mantissa_bits=0,
    bias=127,
    max=2.0**127,
    min_normal=2.0**-127,
    min_subnormal=None,
    has_inf=False,
    has_negative_zero=False,
    nan_codes=(0xFF,),
)

FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (E4M3, E5M2, E4M3FNUZ, E5M2FNUZ, E4M3B11FNUZ, E3M4, E4M3IEEE, E8M0)
}
_BY_DTYPE = {fmt.dtype: fmt for fmt in FORMATS.values()}


def get_format(spec) -> Format:
    """Look up a format.

    Args:
      spec: a `Format`, its name (any case), or its dtype in any of NumPy's spellings.

    Returns:
      The `Format`.

    Raises:
      ValueError: where there is no such format.

    >>> get_format("e5m2"), get_format("float8_e4m3fn"), get_format(jnp.float8_e3m4)
    (E5M2, E4M3, E3M4)
    """
    if isinstance(spec, Format):
        return spec
    if isinstance(spec, str) and spec.upper() in FORMATS:
        return FORMATS[spec.upper()]
    try:
        return _BY_DTYPE[np.dtype(spec)]
    except (KeyError, TypeError):
        known = ", ".join(f"{fmt.name} ({fmt.dtype})" for fmt in FORMATS.values())
        raise ValueError(
            f"fmt must name an 8-bit float format, got {spec!r}; choose one of {known}"
        ) from None
