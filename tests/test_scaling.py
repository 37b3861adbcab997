import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax._formats import E3M4, E4M3, E5M2, FORMATS
from fp8jax._scaling import (
    BlockWise,
    PerChannel,
    PerTensor,
    PerToken,
    exponent_from_amax,
    fitting_scale,
    group_amax,
    group_sum,
    multiply_groups,
    observed_amax,
    scale_from_amax,
    scale_from_exponent,
)

GRANULARITIES = [
    PerTensor(), PerChannel(0), PerChannel(-1), PerChannel((0, -1)), PerToken(),
    BlockWise(3), BlockWise(64), BlockWise((2, 3)), BlockWise((2, 2, 3)),
]  # fmt: skip
SHAPES = [(3, 5, 7), (2, 2, 3, 5), (0, 2, 2), (2, 3, 0)]
each_granularity = pytest.mark.parametrize("scaling", GRANULARITIES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def groups_of(x, scaling):
    """Each group's elements, by slicing: {index of the group: array}."""
    blocks = [
        n or 1 if b is None else b for n, b in zip(x.shape, scaling.block(x.shape), strict=True)
    ]
    index = np.ndindex(
        *(
            max(-(-n // b), 1 if scaling.block(x.shape)[i] is None else 0)
            for i, (n, b) in enumerate(zip(x.shape, blocks, strict=True))
        )
    )
    return {
        i: x[tuple(slice(k * b, (k + 1) * b) for k, b in zip(i, blocks, strict=True))]
        for i in index
    }


@each_shape
@each_granularity
def test_amax_of_each_group(scaling, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = np.asarray(jax.jit(lambda x: group_amax(x, scaling))(x))
    assert got.shape == scaling.group_shape(shape) and got.dtype == np.float32
    groups = groups_of(x, scaling)
    assert len(groups) == got.size
    expected = [np.abs(values).max(initial=0) for values in groups.values()]
    np.testing.assert_array_equal(got.ravel(), expected)


@each_granularity
def test_multiply_and_sum_are_the_group_s_own(scaling):
    x = np.random.default_rng(0).integers(-9, 9, (3, 5, 7)).astype(np.float32)
    factors = np.arange(1, 1 + np.prod(scaling.group_shape(x.shape)), dtype=np.float32).reshape(
        scaling.group_shape(x.shape)
    )
    product = multiply_groups(x, factors, scaling)
    after, before = groups_of(np.asarray(product), scaling), groups_of(x, scaling)
    for values, before, factor in zip(
        after.values(), before.values(), factors.ravel(), strict=True
    ):
        np.testing.assert_array_equal(values, before * factor)
    np.testing.assert_array_equal(
        np.ravel(group_sum(x, scaling)), [v.sum() for v in groups_of(x, scaling).values()]
    )
    stacked = multiply_groups(np.stack([x, x]), np.stack([factors, factors]), scaling.normalize(3))
    np.testing.assert_array_equal(stacked, np.stack([product, product]))


@pytest.mark.parametrize("shape", [(512, 256), (500, 300), (131071,)], ids=str)
@pytest.mark.parametrize("scaling", [PerTensor(), PerChannel(-1), BlockWise(128)], ids=str)
def test_amax_of_large_arrays(shape, scaling):
    """The formulation for CPUs takes over at this size: same values, and exact beside NaNs and
    infinities.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    x.ravel()[rng.integers(0, x.size, 3)] = np.nan
    x.ravel()[rng.integers(0, x.size, 2)] = -np.inf
    groups = groups_of(np.where(np.isfinite(x), np.abs(x), np.nan), scaling).values()
    for function, of_nothing in ((group_amax, 0.0), (observed_amax, np.inf)):
        want = [np.nanmax(v) if not np.isnan(v).all() else of_nothing for v in groups]
        np.testing.assert_array_equal(np.ravel(function(x, scaling)), want)


@pytest.mark.parametrize("size", [64, 1 << 17])
@pytest.mark.parametrize("position", [0, 1, 17, 63])
def test_what_is_not_finite_is_no_amax_and_nothing_finite_is_told(size, position):
    for special in (np.nan, -np.nan, np.inf, -np.inf):
        x = np.ones(size, np.float32)
        x[position] = special
        assert group_amax(x, PerTensor()) == 1
        assert observed_amax(x, PerTensor()) == 1
        x[:] = special
        assert group_amax(x, PerTensor()) == 0 and np.isposinf(observed_amax(x, PerTensor()))
        x[position] = 0.0
        assert group_amax(x, PerTensor()) == observed_amax(x, PerTensor()) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_amax_is_float32_for_every_dtype(dtype):
    with jax.enable_x64(True):
        amax = group_amax(jnp.asarray([1, -3, 2], dtype), PerTensor())
        assert amax.dtype == np.float32 and amax.shape == () and amax == 3


def test_amaxes_below_the_normal_numbers_are_zero_everywhere():
    amax = group_amax(np.float32([[1e-40], [1.2e-38], [-2e-45]]), PerToken())
    np.testing.assert_array_equal(amax, np.float32([[0], [1.2e-38], [0]]))


def test_amax_is_not_differentiable():
    assert jax.grad(lambda x: group_amax(x, PerTensor()))(2.0) == 0
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.vmap(lambda x: group_amax(x, PerTensor()))(x), [2, 5])


def test_amax_on_meshes():
    x = np.random.default_rng(0).normal(size=(1024, 128)).astype(np.float32)
    for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("i",), axis_types=(axis_type,))
        for spec in (jax.P("i"), jax.P(None, "i")):
            sharded = jax.device_put(x, jax.NamedSharding(mesh, spec))
            assert jax.jit(lambda x: group_amax(x, PerTensor()))(sharded) == np.abs(x).max()
            got = jax.jit(lambda x: group_amax(x, PerToken()))(sharded)
            np.testing.assert_array_equal(np.asarray(got), np.abs(x).max(-1, keepdims=True))
    local = jax.shard_map(
        lambda x: group_amax(x, PerTensor())[None],
        mesh=mesh,
        in_specs=jax.P("i"),
        out_specs=jax.P("i"),
    )
    amaxes = local(jax.device_put(x, jax.NamedSharding(mesh, jax.P("i"))))
    np.testing.assert_array_equal(amaxes, np.abs(x).reshape(8, -1).max(1))


# From amax to scale


def smallest_exponent(amax, fmt):
    """By exact rational arithmetic."""
    import fractions

    ratio, exponent = fractions.Fraction(float(amax)) / fractions.Fraction(fmt.max), -300
    while fractions.Fraction(2) ** exponent < ratio:
        exponent += 1
    return min(max(exponent, -126), 126)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.signed], ids=str)
def test_exponent_is_the_smallest_that_fits(fmt):
    edges = np.float32(fmt.max) * np.float32(2.0) ** np.arange(-100, 100, 17, np.float32)
    edges = edges[np.isfinite(edges)]
    below, above = (np.nextafter(edges, np.float32(to)) for to in (0, np.inf))
    others = np.float32([1, 0.1, 1e-38, 3e38, 448, 449, 1e-37])
    amax = np.concatenate([edges, below, above, others])
    amax = amax[np.isfinite(amax)]
    np.testing.assert_array_equal(
        exponent_from_amax(amax, fmt), [smallest_exponent(a, fmt) for a in amax]
    )


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt.min_subnormal], ids=str)
def test_scales_in_few_operations_are_those_of_the_amaxes(fmt):
    """Of all exponents, with mantissas next to each place where the scale changes, and of what is
    no amax.
    """
    limit = int(np.float32(fmt.max).view(np.int32)) & 0x7FFFFF
    mantissas = np.unique(np.clip([0, 1, limit - 1, limit, limit + 1, 0x7FFFFF], 0, 0x7FFFFF))
    bits = (np.arange(256)[:, None] << 23 | mantissas).astype(np.int32)
    x = jnp.asarray(np.stack([bits, bits | np.int32(-(2**31))]).view(np.float32).reshape(-1, 1))
    expected = scale_from_amax(group_amax(x, PerToken()), fmt)
    np.testing.assert_array_equal(fitting_scale(x, PerToken(), fmt), expected)
    assert len(np.unique(expected)) > 200
    assert np.all(np.asarray(expected)[~np.isfinite(x)] == 1)
    assert float(fitting_scale(jnp.zeros((0, 3)), PerTensor(), fmt)) == 1


def test_exponent_of_special_amaxes():
    amax = np.float32([0, -0.0, 1e-45, np.inf, np.nan, np.finfo(np.float32).max])
    np.testing.assert_array_equal(exponent_from_amax(amax, E4M3), [0, 0, -126, 120, 120, 120])


def test_margin_is_headroom():
    assert exponent_from_amax(np.float32(448), E4M3, margin=1.001) == 1
    assert exponent_from_amax(np.float32(448), E4M3, margin=2.0) == 1
    assert exponent_from_amax(np.float32(448), E4M3, margin=0.5) == -1
    assert (
        exponent_from_amax(np.float32(3e38), E3M4, margin=1e30) == 126 - 1
    )  # the largest float32's
    assert scale_from_amax(np.float32(10), E4M3, 3.0, power_of_two=False) == np.float32(
        10
    ) * 3 * np.float32(1 / 448)


def test_scales_are_exact_powers_of_two():
    exponents = np.arange(-126, 128, dtype=np.float32)
    scales = np.asarray(jax.jit(scale_from_exponent)(exponents))
    np.testing.assert_array_equal(scales.view(np.uint32), (exponents.astype(np.int64) + 127) << 23)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_scales_are_normal_numbers_and_so_are_their_reciprocals(power_of_two):
    amax = np.float32([0, 1e-45, 1e-38, 1e-30, 1, 1e30, 3.4e38, np.inf])
    for fmt in (E4M3, E5M2, E3M4):
        scale = np.asarray(scale_from_amax(amax, fmt, 1.0, power_of_two))
        assert (
            (scale >= 2.0**-126).all()
            and (1 / scale >= 2.0**-126).all()
            and np.isfinite(scale).all()
        )
        assert scale[0] == 1


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([E4M3, E5M2, E3M4]))
def test_property_nothing_saturates_and_less_would(amax, fmt):
    scale = float(scale_from_amax(np.float32(amax), fmt))
    assert fmt.max / 2 < np.float32(amax) / scale <= fmt.max


# The granularities themselves


@each_granularity
def test_granularities_are_static_values(scaling):
    assert hash(scaling) == hash(pickle.loads(pickle.dumps(scaling))) and scaling == pickle.loads(
        pickle.dumps(scaling)
    )
    fields = json.loads(json.dumps(vars(scaling)))
    assert type(scaling)(**fields) == scaling


def test_axes_are_held_negative():
    assert PerChannel(0).normalize(2) == PerChannel(-2) == PerChannel(-2).normalize(2)
    assert PerChannel((0, -1)).normalize(3) == PerChannel((-3, -1))
    assert PerChannel((1,)) == PerChannel(1) and BlockWise(4) == BlockWise((4,)) == BlockWise([4])


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, r"block_shape must hold positive extents; got 0. Use "
                     r"\(1, 128\)", lambda: BlockWise(0)),
        (ValueError, r"block_shape must hold positive extents; got "
                     r"\(1, -2\)", lambda: BlockWise((1, -2))),
        (ValueError, r"block_shape must hold positive extents; got \(\)", lambda: BlockWise(())),
        (TypeError, r"block_shape must be an int or a tuple of ints; got "
                    r"1.5", lambda: BlockWise(1.5)),
        (TypeError, r"axis must be an int or a tuple of ints; got None", lambda: PerChannel(None)),
        (TypeError, r"axis must be an int or a tuple of ints; got True", lambda: PerChannel(True)),
        (ValueError, r"axis must name at least one axis; got \(\). Use "
                     r"PerTensor\(\)", lambda: PerChannel(())),
        (ValueError, r"axis must name each axis once; got \(1, 1\)", lambda: PerChannel((1, 1))),
        (ValueError, r"axis of PerChannel must lie within an operand of rank 2; got 2",
         lambda: PerChannel(2).group_shape((3, 4))),
        (ValueError, r"axis of PerChannel must name each axis once; got \(0, -2\) for rank 2",
         lambda: PerChannel((0, -2)).group_shape((3, 4))),
        (ValueError, r"PerToken needs an operand with at least one axis; got a scalar. Use "
                     r"PerTensor",
         lambda: group_amax(jnp.float32(1), PerToken())),
        (ValueError, r"block_shape \(2, 2\) must not have more axes than the operand; got rank 1",
         lambda: group_amax(jnp.ones(3), BlockWise((2, 2)))),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(error, message, call):
    with pytest.raises(error, match=message):
        call()
