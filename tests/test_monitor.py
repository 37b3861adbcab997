"""`metrics.monitor`: each product's error against float64, through JAX's transformations, the worst
site first.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from tiers import thorough_but

import fp8jax
from fp8jax import metrics, recipes
from fp8jax._state import find_site_scales, map_site_scales

KEYS = jax.random.split(jax.random.key(0), 4)
X, W, V = (jax.random.normal(key, shape) for key, shape in zip(KEYS, ((32, 16), (16, 16), (16, 8))))


def cast(values, format, exponent):
    """By ml_dtypes, in float64."""
    scaled = np.clip(
        np.asarray(values, np.float64) * 2.0 ** -np.float64(exponent), -format.max, format.max
    )
    return scaled.astype(np.float32).astype(format.dtype).astype(np.float64) * 2.0 ** np.float64(
        exponent
    )


def decibels(got, exact):
    return 10 * np.log10(np.square(exact).sum() / np.square(got - exact).sum())


def test_errors_are_those_of_a_float64_computation():
    """Of an output, and of both gradients of a known cotangent; one so small that its squares
    vanish in float32.
    """
    cotangent = 1e-30 * jax.random.normal(KEYS[3], (32, 8))
    fp8_loss = fp8jax.fp8(lambda v, x: jnp.sum((x @ v) * cotangent), recipes.delayed())
    scales = fp8_loss.init(V, X)
    (node,) = scales.values()
    (site,) = metrics.monitor(fp8_loss)(scales, V, X).sites
    x, v, g = (np.asarray(value, np.float64) for value in (X, V, cotangent))
    xq, vq = cast(x, fp8jax.E4M3, node.lhs), cast(v, fp8jax.E4M3, node.rhs)
    gq = cast(g, fp8jax.E5M2, node.grad)
    assert site.name == node.site
    assert site.forward == pytest.approx(decibels(xq @ vq, x @ v), abs=1e-3)
    assert site.dlhs == pytest.approx(decibels(gq @ vq.T, g @ v.T), abs=1e-3)
    assert site.drhs == pytest.approx(decibels(xq.T @ gq, x.T @ g), abs=1e-3)
    assert site.lowest == min(site.forward, site.dlhs, site.drhs)


def layered(params, x, power=2):
    h, _ = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, params["layers"])
    h = jax.vmap(lambda row: row @ params["v"])(h)
    return jnp.mean(jnp.abs(jax.lax.cond(h.sum() > -1e9, lambda h: h, lambda h: -h, h)) ** power)


PARAMS = {"layers": jnp.stack([W, 2 * W, W]) / 4, "v": V}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "recipe",
    thorough_but({"delayed": recipes.delayed(), "current": recipes.current()}, ["delayed"]),
)
def test_worst_site_comes_first_and_the_worst_layer_shows(recipe):
    """Where a scale of one layer is spoilt, that layer's site comes first; the others stay as they
    were.
    """
    fp8_loss = fp8jax.fp8(layered, recipe)
    measure, scales = metrics.monitor(fp8_loss), fp8_loss.init(PARAMS, X)
    before = measure(scales, PARAMS, X, power=2)
    lows = [min(site.forward, site.dlhs, site.drhs) for site in before.sites]
    assert lows == sorted(lows) and lows[0] > 24 and len(lows) == 2
    assert before == measure(scales, PARAMS, X, power=2)
    if not scales:
        return
    layers = next(name for name, node in scales.items() if node.lhs.shape == (3,))

    def spoil(node):
        return node.replace(rhs=node.rhs.at[1].add(-6)) if node.site == layers else node

    after = measure(map_site_scales(spoil, scales), PARAMS, X, power=2)
    assert after.sites[0].name == layers and after.sites[0].lowest < 15 < after.sites[1].lowest
    assert after.sites[0].lowest < after.sites[0].forward


@pytest.mark.parametrize(
    "name",
    thorough_but(
        {name: name for name in ("delayed", "rowwise_hp_wgrad", "blockwise")}, ["delayed"]
    ),
)
def test_each_recipe_and_product_is_measured(name):
    """A convolution, experts, and a weight that is cast before a loop; what a recipe leaves wide is
    exact to bfloat16 at least.
    """

    def loss(params, x):
        x = jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ params["dense"]), x)
        x = jax.lax.conv_general_dilated(
            x[None], params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )[0]
        sizes = jnp.array([jnp.sum(x[0] > 0), 0], jnp.int32)
        return jnp.square(
            jax.lax.ragged_dot(x, params["experts"], sizes.at[1].set(32 - sizes[0]))
        ).mean()

    params = {"dense": W / 4, "conv": jnp.stack([W, W, W]) / 8, "experts": jnp.stack([V, 2 * V])}
    fp8_loss = fp8jax.fp8(loss, getattr(recipes, name)())
    sites = {
        site.name: site
        for site in metrics.monitor(fp8_loss)(fp8_loss.init(params, X), params, X).sites
    }
    assert sites.keys() == params.keys()
    assert all(20 < value < 60 for site in sites.values() for value in (site.forward, site.dlhs))
    least = 40 if name == "rowwise_hp_wgrad" else 20
    assert all(site.drhs > least for site in sites.values())


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(8, name="down")(linen.relu(linen.Dense(16, name="up")(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@pytest.mark.thorough
def test_models_of_flax_are_measured_and_calibrated_on_their_own_scales():
    """The measure is that of the scales given; and a calibrated gradient's scale fits the loss's
    gradient.
    """

    def loss(module, x):
        return jnp.square(module(x)).mean()

    wrapped = fp8jax.linen.Fp8(Linen(), recipes.delayed())
    variables = jax.jit(wrapped.init)(KEYS[0], X)
    model = fp8jax.nnx.Fp8(Nnx(nnx.Rngs(0)), recipes.delayed())
    model.init_scales(X)
    for fp8_model, scales, params in (
        (wrapped, variables["fp8"], variables["params"]),
        (model, nnx.state(model, fp8jax.nnx.Fp8Scale), nnx.state(model.module, nnx.Param)),
    ):
        fp8_loss = fp8_model.as_function(loss)
        measure = metrics.monitor(fp8_loss)
        good = measure(scales, params, X)
        assert {site.name for site in good.sites} == {"up", "down"} and good.sites[0].forward > 25
        spoilt = measure(
            map_site_scales(
                lambda node: node.replace(lhs=node.lhs - 6) if node.site == "down" else node, scales
            ),
            params,
            X,
        )
        assert spoilt.sites[0].name == "down" and spoilt.sites[0].forward < 15
        down = {
            node.site: node
            for node in find_site_scales(fp8jax.calibrate(fp8_loss, scales, [(params, X)]))
        }["down"]
        gradient = jnp.abs(
            2
            / 256
            * (
                wrapped.module.apply({"params": params}, X)
                if fp8_model is wrapped
                else model.module(X)
            )
        ).max()
        assert down.grad == jnp.ceil(jnp.log2(gradient / fp8jax.E5M2.max))


class Normalized(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.BatchNorm(use_running_average=not train)(linen.Dense(8, name="down")(x))


def test_a_linen_model_is_measured_and_calibrated_on_the_other_collections_that_it_reads():
    model = fp8jax.linen.Fp8(Normalized(), recipes.delayed())
    variables = model.init(KEYS[0], X, train=True)
    variables["batch_stats"] = jax.tree.map(
        lambda leaf: 4 * jnp.ones_like(leaf), variables["batch_stats"]
    )
    fp8_loss = model.as_function(lambda apply, x: apply(x, train=False).sum(), variables)
    (site,) = metrics.monitor(fp8_loss)(variables["fp8"], variables["params"], X).sites
    assert site.name == "down" and site.forward > 25
    calibrated = fp8jax.calibrate(fp8_loss, variables["fp8"], [(variables["params"], X)])
    assert calibrated["scales"]["down"].grad == jnp.ceil(
        jnp.log2(0.5 / fp8jax.E5M2.max)
    )  # by the variance of 4


def test_what_is_not_finite_or_zero_is_told_apart():
    fp8_loss = fp8jax.fp8(lambda v, x: jnp.sum(x @ v) * 0, recipes.current())
    (site,) = metrics.monitor(fp8_loss)({}, V, X).sites
    assert site.forward > 27 and site.dlhs is None and site.drhs is None
    errors = metrics.monitor(fp8_loss)({}, V, X.at[0, 0].set(jnp.inf))
    assert np.isnan(errors.sites[0].forward)
    assert json.loads(errors.to_json())[0]["forward"] is None
    exact = metrics.monitor(fp8jax.fp8(lambda v, x: jnp.sum(x @ v), recipes.current()))(
        {}, jnp.ones((4, 2)), jnp.ones((2, 4))
    )
    assert exact.sites[0].forward == np.inf


def test_it_prints_as_a_table():
    errors = metrics.Errors((metrics.SiteError("mlp/up", 28.06, 24.94, None, 20.0),))
    lines = str(errors).splitlines()
    assert [line.split() for line in lines if "mlp/up" in line] == [
        ["mlp/up", "28.1", "24.9", "-", "20.0", "0.0e+00"]
    ]
    (row,) = json.loads(errors.to_json())
    want = {"name": "mlp/up", "forward": 28.06, "dlhs": 24.94, "drhs": None, "lowest": 20.0}
    assert want.items() <= row.items() and row["forward_slice"] is None and row["saturated"] == 0


def test_what_energy_hides_shows_in_the_worst_slice():
    """One input feature times 1e5: the ratio of the weight's gradient is that of one row, and those
    of all others are lost.
    """
    x = X.at[:, 3].multiply(1e5)
    cotangent = jax.random.normal(KEYS[3], (32, 8))
    fp8_loss = fp8jax.fp8(lambda v, x: jnp.sum((x @ v) * cotangent), recipes.delayed())
    scales = fp8_loss.init(V, x)
    (node,) = scales.values()
    (site,) = metrics.monitor(fp8_loss)(scales, V, x).sites
    want = np.asarray(x, np.float64).T @ np.asarray(cotangent, np.float64)
    got = cast(x, fp8jax.E4M3, node.lhs).T @ cast(cotangent, fp8jax.E5M2, node.grad)
    slices = [decibels(a, b) for a, b in [*zip(got, want), *zip(got.T, want.T)]]
    assert site.drhs == pytest.approx(decibels(got, want), abs=1e-3) and site.drhs > 20
    assert site.drhs_slice == pytest.approx(min(slices), abs=1e-2) and site.drhs_slice < 10
    assert f"{site.drhs:.1f} ({site.drhs_slice:.1f})" in str(metrics.Errors((site,)))


def test_rows_that_are_lost_beside_a_huge_value_are_named_and_a_finer_recipe_keeps_them():
    spiked = X.at[0, 0].set(1e30)
    for recipe, lost in ((recipes.current(), True), (recipes.rowwise(), False)):
        fp8_fn = fp8jax.fp8(lambda v, x: x @ v, recipe)
        (site,) = metrics.monitor(fp8_fn)({}, V, spiked).sites
        assert site.forward > 20 and (site.forward_slice == 0.0) == lost
        named = "rows lost beside larger ones, which a finer recipe may keep:\ndot"
        assert (named in str(metrics.Errors((site,)))) == lost


@pytest.mark.thorough
@pytest.mark.parametrize(
    "factor", thorough_but({"1e9": 1e9, "nan": np.nan, "inf": np.inf}, ["1e9"])
)
def test_a_run_that_diverges_shows(factor):
    """Stacked layers of a scan, their scales those of tame weights; and `current`, whose ratios
    stay as they are.
    """
    for recipe in (recipes.delayed(), recipes.current()):
        fp8_loss = fp8jax.fp8(layered, recipe)
        scales = fp8_loss.init(PARAMS, X)
        wild = jax.tree.map(lambda leaf: leaf.at[..., 0].multiply(factor), PARAMS)
        measure = metrics.monitor(fp8_loss)
        tame, errors = measure(scales, PARAMS, X), measure(scales, wild, X)
        assert all(site.saturated < 0.1 and site.nonfinite == 0 for site in tame.sites)
        assert max(site.largest for site in tame.sites) < 100
        text = str(errors)
        if not np.isfinite(factor):
            assert max(site.nonfinite for site in errors.sites) > 0.05 and "not finite" in text
        else:
            assert max(site.largest for site in errors.sites) > 1e8 and "e+" in text
            if scales:
                assert max(site.saturated for site in errors.sites) > 0.05
                assert "of an operand saturated" in text


def test_errors():
    with pytest.raises(
        TypeError, match=r"fp8_fn must be what fp8jax.fp8 returns; got function\. Wrap the loss"
    ):
        metrics.monitor(layered)
