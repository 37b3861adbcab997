"""The share of an operand that is flushed to zero: what is observed, how it merges, and how it is
read.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization

import fp8jax
from fp8jax import metrics, plots, recipes
from fp8jax._state import find_site_scales
from fp8jax.linen import Fp8

RECIPE = recipes.delayed(flushed=True)
DTYPES = {
    "lhs": ml_dtypes.float8_e4m3fn,
    "rhs": ml_dtypes.float8_e4m3fn,
    "grad": ml_dtypes.float8_e5m2,
}


def share(x, exponent, operand):
    """By ml_dtypes: the share of what is not zero that becomes zero."""
    x = np.asarray(x, np.float64)
    codes = np.clip(x * 2.0 ** -float(exponent), -448, 448).astype(DTYPES[operand])
    return np.mean(codes[x != 0].astype(np.float64) == 0)


def wide(seed, shape):
    """Values over many binades, some of them zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-24, 3, shape)
    return jnp.asarray(np.where(rng.random(shape) < 0.2, 0, values), jnp.float32)


def exponents(lhs, rhs, grad):
    zeros = fp8jax.SiteScales.zeros("dot", RECIPE.delayed_casts)
    return zeros.replace(lhs=jnp.float32(lhs), rhs=jnp.float32(rhs), grad=jnp.float32(grad))


def loss(w, x, c):
    return jnp.sum((x @ w) * c)


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"]
)
def test_shares_are_the_true_ones(wrap):
    w, x, c = wide(0, (24, 16)), wide(1, (32, 24)), wide(2, (32, 16))
    fp8_loss = fp8jax.fp8(loss, RECIPE)
    seen = jax.grad(wrap(lambda s: fp8_loss(s, w, x, c)))({"dot": exponents(-5, -2, 3)})["dot"]
    expected = [share(x, -5, "lhs"), share(w, -2, "rhs"), share(c, 3, "grad")]
    assert 0.05 < min(expected) and max(expected) < 0.95
    np.testing.assert_allclose(seen.flushed, expected, rtol=1e-6)
    (_, observed) = fp8_loss.observe({"dot": exponents(-5, -2, 3)}, w, x, c)
    np.testing.assert_allclose(observed["dot"].flushed, [*expected[:2], 0], rtol=1e-6)


def test_a_tie_goes_to_zero_and_what_is_above_does_not():
    half = np.float32(2.0**-10)  # of E4M3's smallest value
    x = jnp.array([[half, np.nextafter(half, np.float32(1)), 0.0, jnp.nan]])
    seen = jax.grad(lambda s: fp8jax.fp8(loss, RECIPE)(s, jnp.ones((4, 1)), x, jnp.ones((1, 1))))(
        {"dot": exponents(0, 0, 0)}
    )
    assert float(seen["dot"].flushed[0]) == np.float32(1 / 3)


def test_shares_merge_by_max():
    w, xs, c = wide(0, (24, 16)), wide(1, (4, 32, 24)), wide(2, (32, 16))
    xs = xs * jnp.float32([1, 0.1, 0.01, 2])[:, None, None]
    shares = [share(x, -5, "lhs") for x in xs]
    assert len(set(shares)) == 4
    scales = {"dot": exponents(-5, -2, 3)}

    def scanned(w, xs, c):
        return jax.lax.scan(lambda total, x: (total + loss(w, x, c), None), jnp.float32(0), xs)[0]

    def mapped(w, xs, c):
        return jax.vmap(lambda x: loss(w, x, c))(xs).sum()

    seen = jax.jit(jax.grad(lambda s: fp8jax.fp8(scanned, RECIPE)(s, w, xs, c)))(scales)["dot"]
    np.testing.assert_allclose(seen.flushed[0], max(shares), rtol=1e-6)
    seen = jax.jit(jax.grad(lambda s: fp8jax.fp8(mapped, RECIPE)(s, w, xs, c)))(scales)[
        "dot"
    ]  # one use of one scale
    np.testing.assert_allclose(seen.flushed[0], share(xs, -5, "lhs"), rtol=1e-6)
    each = [jax.grad(lambda s, x=x: fp8jax.fp8(loss, RECIPE)(s, w, x, c))(scales) for x in xs[:2]]
    assert float(fp8jax.accumulate(*each)["dot"].flushed[0]) == np.float32(max(shares[:2]))


@pytest.mark.thorough
def test_means_over_steps_are_counted_read_and_reset():
    model = Fp8(nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)]), RECIPE)
    x = wide(0, (32, 8))
    variables = model.init(jax.random.key(0), x)
    tx = fp8jax.with_delayed_scaling(optax.sgd(1e-3))
    state = tx.init(variables)
    expected = []

    @jax.jit
    def step(variables, state, x):
        seen = jax.grad(lambda v: jnp.square(model.apply(v, x)).sum())(variables)
        updates, state = tx.update(seen, state, variables)
        return optax.apply_updates(variables, updates), state, seen

    for factor in (1.0, 1e-3, 0.1):
        variables, state, seen = step(variables, state, x * np.float32(factor))
        (first, *_) = find_site_scales(seen["fp8"])
        expected.append(float(first.flushed[0]))
    assert len(set(expected)) == 3
    shares = metrics.flushed_shares(state, variables)
    assert shares[f"{first.site}/lhs"] == pytest.approx(np.mean(expected))
    found = metrics.summary(state, variables)
    assert found["fp8/flushed_share"] == pytest.approx(np.mean(list(shares.values())))
    assert found[f"fp8/flushed/{first.site}/lhs"] == shares[f"{first.site}/lhs"]
    assert [bar.get_width() for bar in plots.plot_shares(shares, title="Flushed share").patches][
        0
    ] == pytest.approx(100 * max(shares.values()))
    assert set(metrics.flushed_shares(metrics.reset(state), variables).values()) == {0.0}
    restored = serialization.from_state_dict(variables, serialization.to_state_dict(variables))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, restored, variables))


@pytest.mark.thorough
def test_what_is_no_observation_is_not_counted():
    scales = {"dot": exponents(-5, -2, 3)}
    tx = fp8jax.delayed_scaling()
    w, x, c = wide(0, (24, 16)), wide(1, (32, 24)), wide(2, (32, 16))
    seen = jax.grad(lambda s: fp8jax.fp8(loss, RECIPE)(s, w, x, c))(scales)
    _, state = tx.update(seen, tx.init(scales), scales)
    _, after = tx.update(jax.tree.map(jnp.negative, seen), state, scales)
    assert metrics.flushed_shares(after, scales) == metrics.flushed_shares(state, scales)
    assert metrics.summary(after, scales)["fp8/unsealed"] == 3


def test_no_share_is_kept_where_none_is_asked_for():
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    scales = fp8_loss.init(*map(jnp.ones, ((4, 4), (4, 4), (4, 4))))
    assert scales["dot"].flushed is None
    assert [leaf.shape for leaf in jax.tree.leaves(scales)] == [
        (1, 8)
    ]  # exponents, seals, uses, a 0
    with pytest.raises(
        ValueError,
        match=r"scales must be of a recipe that observes .*; got none that does. Use "
        r"DelayedScaling\(flushed=True\)",
    ):
        metrics.flushed_shares(fp8jax.delayed_scaling().init(scales), scales)
    with pytest.raises(TypeError, match="flushed must be True or False; got 1"):
        fp8jax.DelayedScaling(flushed=1)


def test_in_loops_over_sharded_batches_it_is_that_of_the_part_with_the_most():
    ws, x = (
        wide(0, (2, 16, 16)),
        wide(1, (32, 16)) * jnp.repeat(jnp.float32([1, 0.1, 3, 0.01]), 8)[:, None],
    )
    c = wide(2, (32, 16))

    def layers(ws, x, c):
        return jnp.sum(
            jax.lax.scan(lambda total, w: (total + (x @ w) * c, None), jnp.zeros_like(c), ws)[0]
        )

    fp8_layers = fp8jax.fp8(layers, RECIPE)
    scales = {"dot": jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), exponents(-5, -2, 3))}
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P("data"))
        seen = jax.jit(jax.grad(lambda s, x, c: fp8_layers(s, ws, x, c)))(
            scales, *jax.device_put((x, c), rows)
        )["dot"]
    parts = [
        [
            max(share(part, e, name) for part in np.split(np.asarray(of), 4))
            for e, name, of in ((-5, "lhs", x), (3, "grad", c))
        ]
    ] * 2
    np.testing.assert_allclose(seen.flushed[:, [0, 2]], parts, rtol=1e-6)
    np.testing.assert_allclose(seen.flushed[:, 1], [share(w, -2, "rhs") for w in ws], rtol=1e-6)
