"""Scales of least squared error, against all scales that there are, in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import thorough_but

from fp8jax import (
    BlockWise,
    PerChannel,
    PerTensor,
    PerToken,
    WeightRule,
    get_format,
    quantize,
    quantize_params,
)
from fp8jax._fitting import FACTORS
from fp8jax.interop._convert import quantize_rows

RNG = np.random.default_rng(0)
SHAPE = (96, 24)
DRAWN = {
    "normal": RNG.normal(size=SHAPE),
    "uniform": RNG.uniform(-1, 1, size=SHAPE),
    "heavy-tailed": RNG.standard_t(1.5, size=SHAPE),
    "outliers": RNG.normal(size=SHAPE) * np.where(RNG.random(SHAPE) < 0.01, 100, 1),
}
SCALINGS = {
    "tensor": PerTensor(),
    "channel": PerChannel(-1),
    "token": PerToken(),
    "block": BlockWise((20, 7)),
}


def groups_of(x, scaling):
    """Each group as a list of values, in the order of the scales."""
    block = [
        size if extent is None else extent for size, extent in zip(x.shape, scaling.block(x.shape))
    ]
    rows = range(0, x.shape[0], block[0])
    return [
        x[row : row + block[0], column : column + block[1]].ravel()
        for row in rows
        for column in range(0, x.shape[1], block[1])
    ]


def error_at(values, scales, fmt):
    """The squared errors of values at each of some scales, in float64."""
    scales = np.float64(scales)[:, None]
    with np.errstate(over="ignore"):
        codes = np.clip(values / scales, -fmt.max, fmt.max).astype(fmt.dtype)
    return np.square(codes.astype(np.float64) * scales - values).sum(1)


@pytest.mark.parametrize("fmt", ["E4M3", "E3M4", "E5M2"])
@pytest.mark.parametrize("scaling", thorough_but(SCALINGS, ["channel", "block"]))
@pytest.mark.parametrize("x", thorough_but(DRAWN, ["normal", "heavy-tailed"]))
def test_the_best_of_all_scales_is_hardly_better(x, scaling, fmt):
    x, fmt = np.float32(x * 3e-5), get_format(fmt)
    run = jax.jit(
        lambda x, scale: quantize(x, fmt, scaling, power_of_two=False, scale=scale),
        static_argnums=1,
    )
    found, of_amax = run(x, "mse"), run(x, "amax")
    total = {"found": 0.0, "amax": 0.0, "best": 0.0}
    for values, scale, base in zip(
        groups_of(np.float64(x), scaling), found.scale.ravel(), of_amax.scale.ravel()
    ):
        error = error_at(values, [scale], fmt)[0]
        of_candidates = error_at(values, np.float64(base) * FACTORS, fmt)
        assert 1 <= scale / base < 2
        # float32 takes some values to the other of two codes that are as near.
        assert error <= of_candidates.min() * (1 + 1e-4)
        total["found"] += error
        total["amax"] += of_candidates[0]
        # Those that saturate, too: from an eighth to twice the amax's.
        total["best"] += error_at(
            values, np.float64(base) * np.exp2(np.arange(-768, 256) / 256), fmt
        ).min()
    got = np.float64(found.dequantize(np.float32))
    assert np.square(got - x).sum() == pytest.approx(total["found"], rel=1e-3)
    decibels = {
        name: 10 * np.log10(value / total["best"])
        for name, value in total.items()
        if name != "best"
    }
    assert decibels["found"] <= max(1, 0.5 * decibels["amax"])
    if isinstance(scaling, (PerChannel, PerToken)):
        assert decibels["amax"] - decibels["found"] > 0.6


@pytest.mark.parametrize("fmt, least", [("E4M3", 0.5), ("E3M4", 0.5), ("E5M2", 0.4)])
@pytest.mark.parametrize("name", DRAWN)
def test_channels_of_weights_gain(name, fmt, least):
    """As long as a small model's are; by powers of two, in the same range, they gain nothing."""
    x = {
        "normal": RNG.normal(size=(384, 64)),
        "uniform": RNG.uniform(-1, 1, size=(384, 64)),
        "heavy-tailed": RNG.standard_t(1.5, size=(384, 64)),
        "outliers": RNG.normal(size=(384, 64)) * np.where(RNG.random((384, 64)) < 0.002, 100, 1),
    }[name]
    x, scaling = np.float32(x), PerChannel(-1)

    def error(**options):
        q = quantize(x, fmt, scaling, **options)
        return np.square(np.float64(q.dequantize()) - x).sum(0)

    of_amax = error(power_of_two=False)
    assert 10 * np.log10(of_amax.sum() / error(power_of_two=False, scale="mse").sum()) > (
        0.25 if (name, fmt) == ("uniform", "E3M4") else least
    )
    base = quantize(x, fmt, scaling).scale
    powers = [error(scale=base * np.float32(2.0**k)) for k in range(-3, 2)]
    assert 10 * np.log10(error().sum() / np.min(powers, 0).sum()) < 0.1


def test_what_is_not_finite_and_nothing_do_not_count():
    x = np.float32(DRAWN["normal"][:, :4])
    x[3, 0], x[4, 1], x[:, 2], x[0, 3] = np.inf, np.nan, 0, 3e-39
    clean = np.where(np.isfinite(x), x, 0)
    options = {"scaling": PerChannel(-1), "power_of_two": False, "scale": "mse"}
    q = quantize(x, **options)
    assert np.array_equal(q.scale, quantize(clean, **options).scale) and q.scale[0, 2] == 1
    assert np.isfinite(np.float32(q.data)[5:]).all() and np.isnan(np.float32(q.data)[3:5, :2]).any()
    for factor in (2.0**110, 2.0**-110):
        scale = quantize(clean * np.float32(factor), **options).scale
        assert np.array_equal(scale[0, :2], q.scale[0, :2] * np.float32(factor))
    assert quantize(np.zeros((0, 3), np.float32), **options).scale.tolist() == [[1, 1, 1]]


def test_gradients_pass_straight_through():
    x = jnp.float32(DRAWN["normal"])

    def loss(x):
        q = quantize(x, scaling=PerChannel(-1), power_of_two=False, scale="mse")
        return jnp.sum(jnp.sin(q.dequantize()))

    values = quantize(x, scaling=PerChannel(-1), power_of_two=False, scale="mse").dequantize()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), np.cos(values), rtol=1e-5)


RULE = WeightRule("w", PerChannel(-1), "E3M4", stacked=1, power_of_two=False, scale="mse")


def test_rules_fit_each_layer():
    x = np.float32(RNG.normal(size=(3, 64, 32)))
    held = quantize_params({"w": x}, [RULE])["w"]
    for layer in range(3):
        own = quantize(x[layer], "E3M4", PerChannel(-1), power_of_two=False, scale="mse")
        assert np.array_equal(held.scale[layer], own.scale)
        assert np.array_equal(held.data[layer], own.data)
    of_amax = quantize_params({"w": x}, [WeightRule("w", RULE.scaling, "E3M4", 1, False)])["w"]
    error = lambda q: np.square(q.dequantize() - x).sum()
    assert error(held) < 0.9 * error(of_amax)
    abstract = quantize_params({"w": jax.ShapeDtypeStruct(x.shape, x.dtype)}, [RULE])["w"]
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, held)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_weights_over_devices_are_fitted_alike(axis_type):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    x = np.float32(RNG.normal(size=(2, 64, 32)))
    held = quantize_params({"w": x}, [RULE])["w"]
    placed = jax.device_put(x, NamedSharding(mesh, P(None, "x", "y")))
    with jax.set_mesh(mesh):
        spread = quantize_params({"w": placed}, [RULE])["w"]
    assert spread.data.sharding.spec == P(None, "x", "y")
    # The order of a sum may decide between two scales of nearly the same error.
    same = np.mean(np.asarray(spread.scale) == np.asarray(held.scale))
    assert same > 0.95 and spread.scale.sharding.spec[-1] == "y"


def test_a_matrix_in_parts_has_one_scale(monkeypatch):
    x = np.float32(DRAWN["outliers"][:40, :16])
    monkeypatch.setattr("fp8jax.interop._convert._ELEMENTS", 100)
    rule = WeightRule("w", PerTensor(), power_of_two=False, scale="mse")
    codes, scale = quantize_rows(x, rule, PerTensor())
    whole = quantize(x, power_of_two=False, scale="mse")
    assert scale == whole.scale and np.array_equal(codes, whole.data)
    assert scale != quantize(x, power_of_two=False).scale
    rows = WeightRule("w", PerChannel(0), power_of_two=False, scale="mse")
    codes, scale = quantize_rows(x, rows, PerChannel(0))
    whole = quantize(x, scaling=PerChannel(0), power_of_two=False, scale="mse")
    assert np.array_equal(scale, whole.scale) and np.array_equal(codes, whole.data)


def test_dtypes_are_fitted_as_the_values_that_they_hold():
    x = DRAWN["normal"].astype(ml_dtypes.bfloat16)
    options = {"scaling": PerChannel(-1), "power_of_two": False, "scale": "mse"}
    narrow, wide = quantize(x, **options), quantize(np.float32(x), **options)
    assert np.array_equal(narrow.scale, wide.scale) and narrow.dtype == x.dtype


@pytest.mark.parametrize(
    "options, text",
    [
        ({"scale": None}, 'scale must be "amax", "mse" or scales; got None'),
        ({"scale": "max"}, 'scale must be "amax", "mse" or scales; got \'max\''),
        ({"scale": "mse"}, 'scale="mse" goes with power_of_two=False.*got True, 1.0 and'),
        ({"scale": "mse", "power_of_two": False, "margin": 2.0}, "got False, 2.0 and 'nearest'"),
        (
            {"scale": "mse", "power_of_two": False, "rounding": "toward_zero"},
            "and 'toward_zero'. Pass these, or scale=\"amax\"",
        ),
    ],
)
def test_errors_say_what_to_do(options, text):
    with pytest.raises(ValueError, match=text):
        quantize(jnp.ones(3), **options)
    with pytest.raises(ValueError, match='scale="mse" goes with power_of_two=False'):
        WeightRule("w", scale="mse")
