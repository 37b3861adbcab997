"""Every bit pattern of float32, through every format: `pytest -m exhaustive`."""

import jax
import numpy as np
import pytest

from fp8jax._codec import encode
from fp8jax._formats import E8M0, FORMATS

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
                "clip": np.clip(x, -fmt.max, fmt.max).astype(fmt.dtype).view(np.uint8),
            }
            expected["saturate"] = np.where(np.isinf(x), expected["ocp"], expected["clip"])
        for overflow, codes in expected.items():
            codes = np.where(nan, fmt.nan_code | sign, codes)
            got = codes_of(x, fmt, overflow=overflow)
            wrong = np.flatnonzero(got != codes)
            assert not wrong.size, [
                (x[i].view(np.uint32), got[i], codes[i], overflow) for i in wrong[:5]
            ]


def e8m0_codes(x):
    """The codes by their definition, in float64: {(rounding, overflow): codes}."""
    with np.errstate(all="ignore"):
        mantissa, exponent = np.frexp(np.abs(x.astype(np.float64)))  # mantissa in [0.5, 1)
    below = exponent + 126  # the code of the power of two at or below
    rounds_up = {
        "toward_zero": np.zeros(x.shape, bool),
        "up": mantissa > 0.5,
        "nearest": (mantissa > 0.75) | ((mantissa == 0.75) & (below % 2 != 0)),
    }
    is_nan, is_zero, is_inf = np.isnan(x) | (x < 0), x == 0, np.isinf(x)
    codes = {}
    for rounding, up in rounds_up.items():
        code = np.maximum(below + up, 0)
        code[is_zero], code[is_inf] = 0, 255
        for overflow, top in (("saturate", 254), ("clip", 254), ("ocp", 255)):
            past = is_nan | (is_inf & (overflow == "saturate"))
            codes[rounding, overflow] = np.where(past, 255, np.minimum(code, top)).astype(np.uint8)
    return codes


def test_every_float32_encodes_to_e8m0_by_definition():
    for x in every_float32():
        for (rounding, overflow), codes in e8m0_codes(x).items():
            got = codes_of(x, E8M0, rounding=rounding, overflow=overflow)
            wrong = np.flatnonzero(got != codes)
            assert not wrong.size, [
                (x[i].view(np.uint32), got[i], codes[i], rounding, overflow) for i in wrong[:5]
            ]
