"""FP8 moments: blocks, rounding, range expansion, and the randomness that they are rounded with."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax import E4M3, E4M3B11FNUZ, E5M2, BlockWise, PerTensor
from fp8jax._scaling import split_groups
from fp8jax.optim._leaves import Leaf
from fp8jax.optim._moments import Fp8Moment, blocks_of, moment_format
from fp8jax.optim._noise import key_words, leaf_words, random_bits, swapped

SHAPES = [(), (10,), (7, 129), (4, 256), (0, 5), (2, 3, 16, 32)]


@functools.partial(jax.jit, static_argnames=("fmt", "expanded"))
def held(values, fmt=E4M3, expanded=False, words=None):
    """A moment that is `values`, rounded: a second one, or a first one whose range is that of E4M3
    itself.
    """
    moment = Fp8Moment.zeros(values, fmt)
    if expanded:  # The range of a block is what it was one step earlier.
        moment = next_moment(moment, values, None)
    return next_moment(moment, values, words, expanded)


def next_moment(moment, values, words, second=True):
    # What a gradient of 2.5 of the values leaves room for.
    values = jnp.asarray(values, jnp.float32)
    split = split_groups(values, moment.scaling)[0]
    if second:
        first = jnp.zeros_like(values)
        leaf = Leaf(jnp.sqrt(np.float32(2.5) * jnp.abs(values)), (first, moment), (0.5, 0.5), words)
        return leaf.store(split, split)[1]
    finite = jnp.where(jnp.isfinite(values), jnp.abs(values), np.float32(0))
    roots = jnp.broadcast_to(finite.max(-1, keepdims=True) * np.float32(2.0**-10), values.shape)
    leaf = Leaf(np.float32(2.5) * values, (moment, jnp.square(roots)), (0.5, 0.5), words)
    return leaf.store(split, split)[0]


def mitchell(x, power):
    """`x**(2**power)` with log2(2**e * (1 + m)) taken for e + m; float64."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    log = (exponent - 1 + 2 * mantissa - 1) * 2.0**power
    return np.exp2(np.floor(log)) * (1 + log - np.floor(log))


@pytest.mark.thorough
def test_any_shape_is_held_within_a_step():
    rng = np.random.default_rng(0)
    arrays = [
        np.abs(rng.normal(size=shape)).astype(np.float32) + np.float32(1e-3) for shape in SHAPES
    ]
    for values, moment in zip(
        arrays,
        jax.jit(lambda arrays: [held(x, expanded=True) for x in arrays])(arrays),
        strict=True,
    ):
        assert (
            moment.shape == moment.data.shape == values.shape and moment.scale.ndim == values.ndim
        )
        np.testing.assert_allclose(moment.dequantize(), values, rtol=2.0**-3)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((512, 1024), BlockWise(128)),
        ((4096, 64), BlockWise((2, 64))),
        ((9, 200), BlockWise(100)),
        ((3, 129), BlockWise(128)),
        ((5, 3), BlockWise((5, 3))),
        ((2, 3, 50, 10), BlockWise((10, 10))),
        ((), PerTensor()),
    ],
    ids=str,
)
def test_blocks(shape, blocks):
    assert blocks_of(shape) == blocks


def test_unexpanded_codes_are_those_of_ml_dtypes():
    values = (
        np.random.default_rng(1).normal(size=(8, 256)).astype(np.float32)
        * np.exp2(np.arange(8, dtype=np.float32) * 7 - 30)[:, None]
    )
    moment = held(values)
    scale = np.repeat(np.asarray(moment.scale), 128, axis=1)
    assert (np.frexp(scale)[0] == 0.5).all()
    want = (values / scale).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(moment.data).view(np.uint8), want.view(np.uint8))
    top = np.abs(values.reshape(8, 2, 128)).max(-1) / np.asarray(moment.scale)
    assert (top <= 448).all() and (top > 448 / 2.6).all()


RANGES = {1: 2, 4: 1, 11: 0, 23: -1, 50: -2, 100: -2}


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E4M3B11FNUZ], ids=str)
def test_range_expansion_fits_the_power_to_the_block(fmt):
    rng = np.random.default_rng(2)
    values = np.exp2(-rng.uniform(0, np.array([list(RANGES)]).T, size=(len(RANGES), 128))).astype(
        np.float32
    )
    moment = held(values, fmt, expanded=True)
    power = np.asarray(moment.power).ravel()
    if fmt is E4M3:
        assert list(power) == list(RANGES.values())
    scale = np.asarray(moment.scale)
    for row, k in enumerate(power):
        expected = mitchell(values[row] / scale[row], float(k))
        want = np.maximum(expected, fmt.min_subnormal).astype(fmt.dtype).astype(np.float64)
        got = np.asarray(moment.data)[row].astype(np.float64)
        assert (got > 0).all()
        ordinary = expected > fmt.min_subnormal
        np.testing.assert_array_equal(got[ordinary], want[ordinary])
        np.testing.assert_allclose(
            np.asarray(moment.dequantize())[row], mitchell(got, -float(k)) * scale[row], rtol=1e-6
        )


def test_range_expansion_beats_none_on_what_second_moments_look_like():
    squares = np.random.default_rng(3).chisquare(40, size=(16, 128)).astype(np.float32) * 1e-9
    errors = [
        np.abs(np.asarray(held(squares, expanded=e).dequantize()) / squares - 1).mean()
        for e in (False, True)
    ]
    assert errors[1] < 0.6 * errors[0] and errors[0] > 0.01  # A power of 2 would halve them.


def test_zeros_stay_and_small_values_never_become_zero():
    values = np.ones((1, 128), np.float32)
    values[0, ::2] = 0
    values[0, 1] = 1e-36
    moment = held(values, expanded=True, words=(np.uint32(1), np.uint32(2)))
    got = np.asarray(moment.dequantize())[0]
    assert (got[::2] == 0).all() and (got[1::2] > 0).all() and got[3] == 1
    assert (np.asarray(held(values).dequantize())[0, 1]) == 0  # of a first moment


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("expanded", [False, True])
def test_what_is_not_finite_stays_so_and_leaves_its_block_unharmed(bad, expanded):
    values = np.full((2, 128), 3.0, np.float32)
    values[0, 5] = bad
    got = np.array(held(values, expanded=expanded, words=(np.uint32(3), np.uint32(4))).dequantize())
    assert not np.isfinite(got[0, 5])
    got[0, 5] = 3
    np.testing.assert_allclose(got, 3, rtol=2.0**-4)


def test_the_power_stays_where_a_range_moves_a_little():
    """Each change of a power would round a whole block anew."""
    values = np.ones((1, 128), np.float32)

    after = jax.jit(
        lambda low, moment: next_moment(
            moment, jnp.where(np.arange(128)[None] == 0, low, values), None
        )
    )
    moment, seen = Fp8Moment.zeros(values, E4M3), []
    for low in [2.0**-5, 2.0**-5, 2.0**-6, 2.0**-6, 2.0**-10, 2.0**-6, 2.0**-6]:
        moment = after(np.float32(low), moment)
        seen.append(int(moment.power[0, 0]))
    assert seen == [-2, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("expanded", [False, True])
def test_stochastic_rounding_is_unbiased(expanded):
    """The mean of many roundings, within five standard errors; nearest is far off."""
    rng = np.random.default_rng(4)
    values = np.sort(rng.uniform(0.05, 1, size=128)).astype(np.float32)
    many = np.broadcast_to(values, (512, 128))
    moment = held(many, expanded=expanded, words=leaf_words(key_words(0), jnp.int32(7), 1)[0])
    got = np.asarray(moment.dequantize(), np.float64)
    error = got.mean(0) - values
    spread = np.maximum(
        got.std(0) / np.sqrt(len(got)), values / 16 / len(got)
    )  # Rare events may not have been seen.
    assert (np.abs(error) <= 5 * spread).all() and got.std(0).mean() > 1e-3
    nearest = np.asarray(held(many, expanded=expanded).dequantize(), np.float64).mean(0) - values
    assert (np.abs(nearest) > 5 * spread).mean() > 0.5


def test_random_bits_are_uniform_and_differ_by_step_leaf_and_key():
    def draw(key, step, leaf):
        words = leaf_words(key_words(key), jnp.int32(step), 2)[leaf]
        return np.asarray(jax.jit(lambda words: random_bits((256, 1024), words))(words))

    base = draw(0, 1, 0)
    others = [draw(0, 1, 1), draw(0, 2, 0), draw(1, 1, 0), np.asarray(swapped(base))]
    bound = 5 / np.sqrt(base.size)
    for bits in [base, *others]:
        for shift in range(32):
            assert abs(((bits >> shift) & 1).mean() - 0.5) < bound / 2
        counts = np.bincount(bits.ravel() >> 24, minlength=256)
        assert ((counts - base.size / 256) ** 2 / (base.size / 256)).sum() < 255 + 5 * np.sqrt(
            2 * 255
        )
    centered = base / 2.0**32 - 0.5
    for other in [*others, np.roll(base, 1), np.roll(base, 1, axis=0), np.roll(base, 128)]:
        assert abs((centered * (other / 2.0**32 - 0.5)).mean() * 12) < bound
    np.testing.assert_array_equal(base, draw(jax.random.key(0), 1, 0))
    with pytest.raises(
        TypeError, match=r"key must be an int or a key of jax.random; got an array of shape \(3,\)"
    ):
        key_words(jnp.zeros(3, jnp.uint32))


def test_formats():
    assert (
        moment_format("mu_dtype", None) is E4M3 and moment_format("mu_dtype", "float8_e5m2") is E5M2
    )
    assert moment_format("nu_dtype", jnp.bfloat16) == jnp.bfloat16
    for bad in ("E9M9", "E8M0", jnp.int32, 3):
        with pytest.raises(
            ValueError,
            match="nu_dtype must be an FP8 format of signed values, its name or its dtype, or a "
            "floating dtype",
        ):
            moment_format("nu_dtype", bad)


@pytest.mark.parametrize("exponent", [2, 8, 14, 20, 40])
def test_first_moments_of_wide_blocks_are_rounded_without_bias(exponent):
    """Magnitudes that span `exponent` binades, and some at the smallest roots' 2^-3; of both signs,
    in one power each.
    """
    rng = np.random.default_rng(5)
    low = 2.0**-exponent
    values = np.exp2(rng.uniform(-exponent, 0, 128)).astype(np.float32)
    values[:8] = low / 8
    values[0] = 1
    values *= rng.choice([-1, 1], 128).astype(np.float32)
    many = np.broadcast_to(values, (512, 128))

    @jax.jit
    def rounded(many):
        moment = Fp8Moment.zeros(many, E4M3)
        second = jnp.full(many.shape, np.float32(2 * low * low))
        words = leaf_words(key_words(0), jnp.int32(7), 1)[0]
        leaf = Leaf(np.float32(2) * many, (moment, second), (0.5, 0.5), words)
        return leaf.store(*[split_groups(many, moment.scaling)[0]] * 2)[0]

    moment = rounded(many)
    want = {2: 1, 8: 0, 14: 0, 20: -1, 40: -2}[exponent]
    assert (np.asarray(moment.power) == want).all()
    got = np.asarray(moment.dequantize(), np.float64)
    bits = 3 + want  # of mantissa; of what is small, as a part of the smallest root
    step = np.maximum(np.abs(values) * 2.0**-bits, low / 2)
    assert (np.abs(got - values) <= step).all() and np.abs(got - values).max() > 0
    spread = np.maximum(got.std(0) / np.sqrt(len(got)), step / len(got))
    small = (
        np.abs(values) < low / 4
    )  # where a binade of codes holds several of values, a mean may be off by a part of it
    assert (np.abs(got.mean(0) - values)[~small] <= 5 * spread[~small]).all()
    assert (np.abs(got.mean(0) - values)[small] <= np.maximum(5 * spread, low / 16)[small]).all()
