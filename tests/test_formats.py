import dataclasses
import pickle

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax._formats import E3M4, E4M3, E5M2, E8M0, FORMATS, Format, get_format

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)

# Name, precision, bias, max, min normal, min subnormal, infinity, NaN codes, negative zero: the
# published tables.
TABLE = [
    ("E4M3", "float8_e4m3fn", 4, 7, 448.0, 2**-6, 2**-9, False, {0x7F, 0xFF}, True),
    (
        "E5M2",
        "float8_e5m2",
        3,
        15,
        57344.0,
        2**-14,
        2**-16,
        True,
        {0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF},
        True,
    ),
    ("E4M3FNUZ", "float8_e4m3fnuz", 4, 8, 240.0, 2**-7, 2**-10, False, {0x80}, False),
    ("E5M2FNUZ", "float8_e5m2fnuz", 3, 16, 57344.0, 2**-15, 2**-17, False, {0x80}, False),
    ("E4M3B11FNUZ", "float8_e4m3b11fnuz", 4, 11, 30.0, 2**-10, 2**-13, False, {0x80}, False),
    (
        "E4M3IEEE",
        "float8_e4m3",
        4,
        7,
        240.0,
        2**-6,
        2**-9,
        True,
        {*range(0x79, 0x80), *range(0xF9, 0x100)},
        True,
    ),
    (
        "E3M4",
        "float8_e3m4",
        5,
        3,
        15.5,
        2**-2,
        2**-6,
        True,
        {*range(0x71, 0x80), *range(0xF1, 0x100)},
        True,
    ),
    ("E8M0", "float8_e8m0fnu", 1, 127, 2.0**127, 2**-127, None, False, {0xFF}, False),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_facts_are_the_published_ones(row):
    (
        name,
        dtype,
        precision,
        bias,
        top,
        min_normal,
        min_subnormal,
        has_inf,
        nan_codes,
        negative_zero,
    ) = row
    fmt = FORMATS[name]
    assert (fmt.name, str(fmt.dtype), fmt.mantissa_bits + 1, fmt.bias) == (
        name,
        dtype,
        precision,
        bias,
    )
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == (top, min_normal, min_subnormal)
    assert (fmt.has_inf, set(fmt.nan_codes), fmt.has_negative_zero) == (
        has_inf,
        nan_codes,
        negative_zero,
    )


@each_format
def test_facts_agree_with_ml_dtypes(fmt):
    values = np.arange(256, dtype=np.uint8).view(fmt.dtype).astype(np.float64)
    assert set(np.flatnonzero(np.isnan(values))) == set(fmt.nan_codes)
    assert values[np.isfinite(values)].max() == fmt.max == values[fmt.max_code]
    assert float(ml_dtypes.finfo(fmt.dtype).smallest_normal) == fmt.min_normal
    assert np.isinf(values).any() == fmt.has_inf
    assert (
        np.isinf(values[fmt.overflow_code]) if fmt.has_inf else np.isnan(values[fmt.overflow_code])
    )
    assert fmt.nan_code in fmt.nan_codes
    assert fmt.signed + fmt.exponent_bits + fmt.mantissa_bits == 8


def test_there_are_eight_formats():
    assert list(FORMATS) == [
        "E4M3",
        "E5M2",
        "E4M3FNUZ",
        "E5M2FNUZ",
        "E4M3B11FNUZ",
        "E3M4",
        "E4M3IEEE",
        "E8M0",
    ]
    assert len({fmt.dtype for fmt in FORMATS.values()}) == 8


@each_format
def test_formats_are_immutable_values(fmt):
    assert pickle.loads(pickle.dumps(fmt)) == fmt and hash(fmt) == hash(
        pickle.loads(pickle.dumps(fmt))
    )
    assert repr(fmt) == str(fmt) == fmt.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.max = 1.0


@pytest.mark.parametrize(
    "spec", ["E5M2", "e5m2", "float8_e5m2", jnp.float8_e5m2, np.dtype(jnp.float8_e5m2), E5M2]
)
def test_get_format_takes_every_spelling(spec):
    assert get_format(spec) is E5M2


@pytest.mark.parametrize("spec", ["E9M9", "", "float32", jnp.int8, None, 8, 1.5, [], {}])
def test_get_format_names_what_there_is(spec):
    with pytest.raises(
        ValueError,
        match=r"fmt must name an 8-bit float format, got .*; choose one of E4M3 \(float8_e4m3fn\)",
    ):
        get_format(spec)


def test_thresholds_lie_half_a_unit_above_the_largest_value():
    assert [fmt.overflow_threshold for fmt in (E4M3, E5M2, E3M4)] == [464.0, 61440.0, 15.75]
    assert isinstance(E8M0, Format) and not E8M0.signed
