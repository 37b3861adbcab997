"""Stochastic rounding: unbiased, and a function of the key alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_codec import arrays, codes_of, each_format, formats, quick, values_of

from fp8jax._codec import decode, encode, encode_bits
from fp8jax._formats import E4M3, E5M2


def draw(fmt, x, key):
    return encode(x, fmt, rounding="stochastic", key=key)


def stochastic_points(fmt):
    """200 values: subnormals, binade edges, near the largest, both signs."""
    rng = np.random.default_rng(1)
    smallest, top = fmt.min_subnormal, fmt.max
    points = np.concatenate([
        rng.uniform(0, smallest, 20), rng.uniform(smallest, fmt.min_normal, 25),
        fmt.min_normal * (1 + rng.uniform(-0.1, 0.1, 15)),
        2.0 ** rng.integers(np.log2(fmt.min_normal), np.log2(top), 20)
        * (1 + rng.uniform(-0.05, 0.05, 20)),
        rng.uniform(0.9, 1.0, 10) * top,
        fmt.min_normal * 2 ** rng.uniform(0, np.log2(top / fmt.min_normal), 10),
    ]).astype(np.float32)  # fmt: skip
    return np.concatenate([points, -points])


def mean_of_draws(x, fmt, draws, quantize):
    """Mean of `draws` roundings of each point, and the standard error of unbiased rounding."""

    def chunk(key):
        return decode(quantize(jnp.broadcast_to(x, (draws // 8, x.size)), key)).sum(0)

    total = np.asarray(jax.lax.map(chunk, jax.random.split(jax.random.key(2), 8)), np.float64).sum(
        0
    )
    values = np.concatenate([-values_of(fmt)[::-1], values_of(fmt)])
    below, above = (
        values[np.searchsorted(values, x, "right") - 1],
        values[np.searchsorted(values, x, "left")],
    )
    return total / draws, np.sqrt((x - below) * (above - x) / draws)


def deviations(fmt, draws, quantize):
    x = stochastic_points(fmt)
    mean, error = mean_of_draws(x, fmt, draws, jax.jit(quantize))
    return np.abs(mean - x) / np.maximum(error, 1e-7 * np.abs(x))


@each_format
def test_stochastic_is_unbiased(fmt):
    assert deviations(fmt, 8_000, functools.partial(draw, fmt)).max() < 5


@pytest.mark.slow
@each_format
def test_stochastic_is_unbiased_over_a_million_draws(fmt):
    assert deviations(fmt, 1_000_000, functools.partial(draw, fmt)).max() < 5


@pytest.mark.parametrize("draws", [8_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_four_random_bits_would_be_noticed(draws, monkeypatch):
    bits = jax.random.bits
    # The noise's upper four bits alone.
    monkeypatch.setattr(
        jax.random, "bits", lambda *a: bits(*a) & jnp.asarray(0xF0000000, jnp.uint32)
    )
    assert deviations(E4M3, draws, lambda x, key: encode_bits(x, E4M3, "stochastic", key)).max() > 5


@each_format
def test_stochastic_keeps_exact_values(fmt):
    codes = np.arange(fmt.max_code + 1, dtype=np.uint8)
    x = np.tile(codes.view(fmt.dtype).astype(np.float32), 50)
    got = codes_of(x, fmt, rounding="stochastic", key=jax.random.key(0), overflow="ocp")
    np.testing.assert_array_equal(got, np.tile(codes, 50))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stochastic_rounds_up_where_the_noise_is_below_the_residue(dtype, monkeypatch):
    with jax.enable_x64(True):
        x = np.array(
            [1, 1.03125, 1.0625, 1.125 - 2.0**-20, 2.0**-9, 1.5 * 2.0**-9, 2.0**-40, 0, 448], dtype
        )
        residues = [0, 0.25, 0.5, 1 - 2.0**-17, 0, 0.5, 2.0**-31, 0, 0]
        codes = codes_of(x, E4M3, rounding="toward_zero")
        for noise in (
            0,
            2.0**-33,
            2.0**-31,
            0.25 - 2.0**-32,
            0.25,
            0.5,
            0.75,
            1 - 2.0**-17,
            1 - 2.0**-32,
        ):

            def constant(key, shape, uint, noise=noise):
                return jnp.full(shape, int(noise * 2.0 ** (8 * uint.itemsize)), uint)

            monkeypatch.setattr(jax.random, "bits", constant)
            drawn = np.asarray(
                encode_bits(jnp.asarray(x), E4M3, "stochastic", jax.random.key(0))
            ).view(np.uint8)
            noise = np.floor(noise * 2.0**32) / 2.0**32 if dtype == np.float32 else noise
            np.testing.assert_array_equal(drawn, codes + (noise < np.array(residues)))


def test_stochastic_special_values():
    x = np.float32([np.inf, -np.inf, np.nan, 1e9, -0.0, 0.0])
    draw = functools.partial(codes_of, fmt=E5M2, rounding="stochastic", key=jax.random.key(0))
    np.testing.assert_array_equal(draw(x), [0x7C, 0xFC, 0x7E, 0x7B, 0x80, 0])
    np.testing.assert_array_equal(draw(x, overflow="clip"), [0x7B, 0xFB, 0x7E, 0x7B, 0x80, 0])
    np.testing.assert_array_equal(draw(x, overflow="ocp"), [0x7C, 0xFC, 0x7E, 0x7C, 0x80, 0])


def test_stochastic_depends_on_the_key_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)
    key = jax.random.key(3)

    def draw(x, key):
        return encode(x, E4M3, rounding="stochastic", key=key)

    once = np.asarray(draw(x, key)).view(np.uint8)
    assert (once != np.asarray(draw(x, jax.random.key(4))).view(np.uint8)).any()
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("i")))
    for again in (draw(x, key), jax.jit(draw)(x, key), jax.jit(draw)(sharded, key)):
        np.testing.assert_array_equal(np.asarray(again).view(np.uint8), once)
    keys = jax.random.split(key, 8)
    batched = np.asarray(jax.vmap(draw)(x, keys)).view(np.uint8)
    single = np.stack(
        [np.asarray(draw(row, k)).view(np.uint8) for row, k in zip(x, keys, strict=True)]
    )
    np.testing.assert_array_equal(batched, single)


def test_stochastic_float64_and_float16():
    with jax.enable_x64(True):
        x = np.full(40_000, 1 + 0.125 * 2**-8, np.float64)
        up = (codes_of(x, E4M3, rounding="stochastic", key=jax.random.key(0)) == 0x39).mean()
        assert abs(up - 2**-8) < 5 * (2**-8 / x.size) ** 0.5
    up = (
        codes_of(
            np.full(40_000, 1.03125, np.float16), E4M3, rounding="stochastic", key=jax.random.key(0)
        )
        == 0x39
    ).mean()
    assert abs(up - 0.25) < 0.011


@quick
@given(arrays, formats, st.integers(0, 2**31 - 1))
def test_property_stochastic_takes_a_neighbour(x, fmt, seed):
    drawn = codes_of(x, fmt, rounding="stochastic", key=jax.random.key(seed)) & 0x7F
    below = codes_of(x, fmt, rounding="toward_zero") & 0x7F
    assert np.isin(drawn - below, [0, 1]).all() and (drawn <= fmt.max_code).all()
