"""Casts by an accelerator's own conversion, held against the integer codec and, where the
conversion may round as it likes, against emulated conversions that do.
"""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax import recipes
from fp8jax._codec import encode_bits
from fp8jax._conversion import convert, is_convertible, rounded
from fp8jax._formats import E4M3, E4M3FNUZ, E5M2, E8M0
from fp8jax._scaling import (
    BlockWise,
    PerChannel,
    PerTensor,
    PerToken,
    _largest_by_floats,
    _largest_by_integers,
    group_amax,
    observed_amax,
)
from fp8jax.devices import Device
from fp8jax.ops._cast import cast

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
OVERFLOWS = ("saturate", "clip")


@functools.partial(jax.jit, static_argnames=("fmt", "overflow"))
def codes(wide, inverse, fmt, overflow):
    """By the integer codec, and by both conversions: bytes; and where NaNs are."""
    x = wide * inverse
    ways = [
        encode_bits(x, fmt, overflow=overflow, source=wide),
        *(convert(x, wide, fmt, overflow, round_first=first) for first in (True, False)),
    ]
    return [jax.lax.bitcast_convert_type(way, np.uint8) for way in ways]


def check_alike(wide, inverse, fmt, overflow):
    wanted, *got = (np.asarray(way) for way in codes(wide, inverse, fmt, overflow))
    is_nan = np.isnan(wanted.view(fmt.dtype))
    assert not is_nan.all()
    for way in got:
        np.testing.assert_array_equal(way[~is_nan], wanted[~is_nan])
        assert np.isnan(way[is_nan].view(fmt.dtype)).all()


@FORMATS
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_all_values_of_16_bits_times_64_scales(fmt, dtype, overflow):
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    wide = jnp.asarray(values).astype(jnp.float32)
    powers = np.float32(2.0) ** np.arange(-62, 66, 4, dtype=np.float32)
    others = np.random.default_rng(0).uniform(1, 2, 32).astype(np.float32) * powers
    for inverse in (*powers, *others):
        check_alike(wide, inverse, fmt, overflow)


def random_floats(rng, size):
    """float32 bit patterns, most of them where the formats have values."""
    bits = rng.integers(0, 1 << 32, size, dtype=np.uint32)
    exponents = rng.integers(127 - 20, 127 + 20, size, dtype=np.uint32) << 23
    return np.where(
        rng.random(size) < 0.1, bits, bits & np.uint32(0x807FFFFF) | exponents
    ).view(np.float32)  # fmt: skip


@FORMATS
def test_random_floats(fmt):
    check_alike(random_floats(np.random.default_rng(1), 1 << 20), np.float32(1), fmt, "saturate")


@pytest.mark.slow
@FORMATS
def test_a_hundred_million_random_floats(fmt):
    rng = np.random.default_rng(2)
    for _ in range(96):
        check_alike(random_floats(rng, 1 << 20), np.float32(1), fmt, "saturate")


def converted(x, fmt, direction):
    """Codes of finite float32 by a conversion that rounds up, down, or toward zero."""
    table = np.arange(256, dtype=np.uint8).view(fmt.dtype).astype(np.float64)
    table = np.unique(table[np.isfinite(table)])
    at = np.searchsorted(table, x, side="right") - 1  # the largest that is not above
    up = np.minimum(at + (table[at] != x), len(table) - 1)
    below_zero = np.signbit(x)
    chosen = {"up": up, "down": at, "zero": np.where(below_zero, up, at)}[direction]
    return np.copysign(table[chosen], x).astype(np.float32).astype(fmt.dtype)


@FORMATS
@pytest.mark.parametrize("direction", ["up", "down", "zero"])
def test_rounded_first_a_value_is_exact_whatever_the_conversion_does(fmt, direction):
    rng = np.random.default_rng(3)
    table = np.arange(256, dtype=np.uint8).view(fmt.dtype).astype(np.float32)
    table = np.unique(table[np.isfinite(table)])
    ties = (table[1:] + table[:-1]) / 2
    nearly = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    some = random_floats(rng, 1 << 18)
    x = np.concatenate([table, ties, *nearly, some[np.abs(some) <= fmt.max]])
    x[np.abs(x) < np.finfo(np.float32).tiny] = 0
    wanted = np.asarray(jax.jit(lambda x: encode_bits(x, fmt))(x)).view(np.uint8)
    before = np.asarray(jax.jit(lambda x: rounded(x, fmt))(x))
    np.testing.assert_array_equal(converted(before, fmt, direction).view(np.uint8), wanted)
    # It is not that the conversion would have got it right anyhow.
    assert (converted(x, fmt, direction).view(np.uint8) != wanted).mean() > 0.1


def test_what_accelerators_have_no_conversion_for_stays_with_the_integer_codec():
    assert [is_convertible(fmt, "nearest") for fmt in (E4M3, E5M2, E4M3FNUZ, E8M0)] == [
        True,
        True,
        False,
        False,
    ]
    assert not is_convertible(E4M3, "stochastic")


def lowered(function, platform, *arguments):
    # The stack of names differs where a function is called from, and nothing else.
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def operations(text, kind):
    return len(re.findall(rf"\bstablehlo\.{kind}\b", text))


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA B200", "NVIDIA A100-SXM4-80GB", "unknown"])
@FORMATS
def test_each_platform_has_one_cast(fmt, gpu, monkeypatch):
    if gpu != "unknown":  # else that of the tests
        monkeypatch.setattr("fp8jax.ops._cast.device_of", lambda *arrays: Device("gpu", gpu))
    spec = recipes.current().forward.lhs
    spec = type(spec)(fmt, power_of_two=spec.power_of_two)
    x = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
    text = {
        platform: lowered(lambda x: cast(x, spec, PerTensor()).data, platform, x)
        for platform in ("cpu", "cuda", "tpu", "rocm")
    }
    narrow = {"E4M3": "f8E4M3FN", "E5M2": "f8E5M2"}[fmt.name]
    to_fp8 = rf"stablehlo.convert .*\(tensor<8x16xf32>\) -> tensor<8x16x{narrow}>"
    conversions = {platform: len(re.findall(to_fp8, one)) for platform, one in text.items()}
    known = gpu in ("NVIDIA H200", "NVIDIA B200")
    assert conversions == {"cpu": 0, "cuda": known, "tpu": 1, "rocm": 0}
    # The rounding before is the one pair of an addition and a subtraction of the operand's shape.
    sums = {
        platform: len(re.findall(r"stablehlo.subtract .*tensor<8x16xf32>", one))
        for platform, one in text.items()
    }
    assert sums["tpu"] == 1 and sums["cuda"] == 0
    # Of other platforms nothing is left: beside one cast, the operand is widened for both.
    for one in text.values():
        assert operations(one, "convert") == 2 + conversions_of_bytes(one) + len(
            re.findall(to_fp8, one)
        )
    assert operations(text["cpu"], "clamp") == 0  # Integers saturate otherwise.


def conversions_of_bytes(text):
    """Those that end the integer codec."""
    return len(re.findall(r"stablehlo.convert .*xui32>\) -> tensor<8x16xui8>", text))


@pytest.mark.parametrize("scaling", [PerTensor(), PerToken(), BlockWise(16)], ids=str)
@pytest.mark.parametrize("shape", [(8, 32), (5, 21)], ids=str)
def test_the_amax_of_accelerators_is_that_of_cpus(scaling, shape):
    """Ragged tails, groups without anything finite, and NaNs of both signs included."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=shape).astype(np.float32)
    specials = np.float32([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0])
    for index in range(20):
        x[tuple(rng.integers(0, n) for n in shape)] = specials[index % 6]
    x[0], x[1, -1:] = np.nan, np.inf
    by_integers, by_floats = (
        jax.jit(functools.partial(way, scaling=scaling))(x)
        for way in (_largest_by_integers, _largest_by_floats)
    )
    assert by_integers.dtype == by_floats.dtype == np.int32
    np.testing.assert_array_equal(by_floats, by_integers)


@pytest.mark.parametrize("scaling", [PerTensor(), PerToken(), PerChannel(1)], ids=str)
def test_the_amax_of_a_weight_in_memory_is_taken_in_parts(scaling):
    """Of bfloat16 values as they are; and of layers, each its own."""
    x = np.random.default_rng(5).normal(size=(2, 256, 24)).astype(jnp.bfloat16)
    x[0, ::9], x[1, :, 3], x[1, 200] = np.inf, np.nan, np.inf
    in_parts = functools.partial(group_amax, scaling=scaling, in_memory=True)
    whole = functools.partial(group_amax, scaling=scaling)
    by_floats = functools.partial(_largest_by_floats, scaling=scaling, in_memory=True, narrow=True)
    assert lowered(jax.vmap(in_parts), "tpu", x).count("stablehlo.slice") == 8
    assert lowered(jax.vmap(in_parts), "cuda", x).count("stablehlo.slice") == 0
    bits = jax.jit(jax.vmap(by_floats))(x)
    expected = jax.jit(jax.vmap(functools.partial(_largest_by_integers, scaling=scaling)))(x)
    np.testing.assert_array_equal(bits, expected)
    np.testing.assert_array_equal(jax.vmap(in_parts)(x), jax.vmap(whole)(x))
    if jax.device_count() > 1:
        with jax.set_mesh(jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))):
            assert "stablehlo.slice" not in lowered(jax.vmap(in_parts), "tpu", x)


def test_no_nan_reaches_the_maximum_on_accelerators():
    """Whether a maximum keeps or loses a NaN is the hardware's; so none gets there."""
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    for platform in ("cuda", "tpu"):
        lines = lowered(lambda x: observed_amax(x, PerTensor()), platform, x).splitlines()
        (reduced,) = (line for line in lines if "stablehlo.reduce(" in line)
        (select,) = (
            line for line in lines if "stablehlo.select" in line and "tensor<8x16xf32>" in line
        )
        assert "maximum" in reduced
        assert f"({select.split(' = ')[0].strip()} init" in reduced
        (finite,) = (line for line in lines if "stablehlo.compare LT" in line and "8x16" in line)
        assert f"select {finite.split(' = ')[0].strip()}," in select
