"""Every bit pattern of float32, through every format: `pytest -m exhaustive`."""

import jax
import numpy as np
import pytest

from fp8jax.codec import encode
from fp8jax.formats import E8M0, FORMATS

pytestmark = pytest.mark.exhaustive

CHUNK = 1 << 24


def every_float32():
    """All patterns, in chunks."""
    for start in range(0, 1 << 32, CHUNK):
        yield np.arange(start, start + CHUNK, dtype=np.uint64).astype(np.uint32).view(np.float32)


def codes_of(x, fmt, **options):
    return np.asarray(encode(jax.device_put(x), fmt, **options)).view(np.uint8)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt != E8M0], ids=str)
def test_every_float32_encodes_as_ml_dtypes_does(fmt):
    for x in every_float32():
        nan = np.isnan(x)
        sign = np.where(np.signbit(x) & fmt.has_negative_zero, 0x80, 0).astype(np.uint8)
        with np.errstate(all="ignore"):
            expected = {
                "ocp": x.astype(fmt.dtype).view(np.uint8),
                "saturate": np.clip(x, -fmt.max, fmt.max).astype(fmt.dtype).view(np.uint8),
            }
        for overflow, codes in expected.items():
            codes = np.where(nan, fmt.nan_code | sign, codes)
            got = codes_of(x, fmt, overflow=overflow)
            wrong = np.flatnonzero(got != codes)
            assert not wrong.size, [(x[i].view(np.uint32), got[i], codes[i], overflow) for i in wrong[:5]]


def e8m0_codes(x, rounding, overflow):
    """The codes by their definition, in float64."""
    with np.errstate(all="ignore"):
        mantissa, exponent = np.frexp(np.abs(x.astype(np.float64)))  # mantissa in [0.5, 1)
    exponent = exponent - 1 + {
        "toward_zero": np.zeros(x.shape, bool),
        "up": mantissa > 0.5,
        "nearest": (mantissa > 0.75) | ((mantissa == 0.75) & (exponent % 2 != 0)),  # code = exponent - 1 + 127: even
    }[rounding]
    code = np.where(x == 0, 0, np.maximum(exponent + 127, 0))
    code = np.where(np.isinf(x), 255, code)
    code = np.minimum(code, 254 if overflow == "saturate" else 255)
    return np.where(np.isnan(x) | (x < 0), 255, code).astype(np.uint8)


@pytest.mark.parametrize("rounding", ["up", "nearest", "toward_zero"])
def test_every_float32_encodes_to_e8m0_by_definition(rounding):
    for x in every_float32():
        for overflow in ("saturate", "ocp"):
            got, codes = codes_of(x, E8M0, rounding=rounding, overflow=overflow), e8m0_codes(x, rounding, overflow)
            wrong = np.flatnonzero(got != codes)
            assert not wrong.size, [(x[i].view(np.uint32), got[i], codes[i], overflow) for i in wrong[:5]]
