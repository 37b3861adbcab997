"""What is not finite, or huge, in one row: the others don't suffer, and what is not finite in plain
code isn't in FP8.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import thorough_but

import fp8jax
from fp8jax import recipes

RECIPES = {
    name: getattr(recipes, name)()
    for name in (
        "delayed", "current", "rowwise", "rowwise_hp_wgrad", "blockwise", "mxfp8", "weight_only",
    )
}  # fmt: skip
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
KEYS = jax.random.split(jax.random.key(0), 6)
X = jax.random.normal(KEYS[0], (6, 32))
IMAGES = jax.random.normal(KEYS[1], (6, 4, 4, 8))
W = {
    "dense": jax.random.normal(KEYS[2], (32, 16)) / 6,
    "convolution": jax.random.normal(KEYS[3], (3, 3, 8, 8)) / 9,
    "ragged": jax.random.normal(KEYS[4], (2, 32, 16)) / 6,
}
GROUPS = jnp.array([2, 2], jnp.int32)  # Two rows are of no group.


def products(w, x, images):
    return {
        "dense": x @ w["dense"],
        "convolution": jax.lax.conv_general_dilated(
            images, w["convolution"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        "ragged": jax.lax.ragged_dot(x, w["ragged"], GROUPS),
    }


def results(function, w, x, images, cotangents):
    """The results, and the gradients of weights and inputs for these cotangents."""
    out, back = jax.vjp(function, w, x, images)
    return out, back(cotangents)


@functools.cache
def compiled(recipe):
    """The same in FP8 under a recipe, compiled once; with the gradient of the scales, if it has
    any.
    """
    fp8_fn = fp8jax.fp8(products, RECIPES[recipe])
    scales = fp8_fn.init(W, X, IMAGES)

    def run(w, x, images, cotangents):
        out, back = jax.vjp(fp8_fn, scales, w, x, images)
        seen, *gradients = back(cotangents)
        return out, tuple(gradients), seen

    return jax.jit(run), scales


def sqnr(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return 10 * np.log10((want**2).sum() / max(((got - want) ** 2).sum(), 1e-30))


OUT = products(W, X, IMAGES)
COTANGENTS = {
    name: jax.random.normal(key, OUT[name].shape)
    for name, key in zip(OUT, jax.random.split(KEYS[5], 3))
}
PLAIN = jax.jit(functools.partial(results, products))


def spoiled(array, row, value):
    return array.at[row].set(value)


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize(
    "recipe", thorough_but(dict(zip(RECIPES, RECIPES)), ["delayed", "rowwise"])
)
def test_what_is_not_finite_in_one_row_leaves_the_others(recipe, value):
    """In an operand, or in a gradient: the results of the other rows are as exact as without, those
    of the row not finite.
    """
    run, _ = compiled(recipe)
    want, gradients = PLAIN(W, X, IMAGES, COTANGENTS)
    clean, clean_gradients, _ = run(W, X, IMAGES, COTANGENTS)
    bad = BAD[value]
    x, images = spoiled(X, 1, bad), IMAGES.at[1, 2, 2, 3].set(bad)
    got, _, seen = run(W, x, images, COTANGENTS)
    for name in want:
        kept, lost = np.delete(np.arange(6), 1), np.asarray(got[name][1])
        if name == "ragged":
            kept = kept[:3]
        assert (
            sqnr(got[name][kept], want[name][kept]) > sqnr(clean[name][kept], want[name][kept]) - 1
        )
        assert (~np.isfinite(lost)).any() and (name == "convolution" or (~np.isfinite(lost)).all())
    for node in seen.values():
        assert np.isfinite(node.lhs) and fp8jax._observe.seal_fits(node.lhs, node.seal[0])
    cotangents = {name: leaf.at[1].set(bad) for name, leaf in COTANGENTS.items()}
    _, (dw, *of_inputs), seen = run(W, X, IMAGES, cotangents)
    for one, plain, without in zip(of_inputs, gradients[1:], clean_gradients[1:]):
        kept = np.delete(np.arange(6), 1)
        assert sqnr(one[kept], plain[kept]) > sqnr(without[kept], plain[kept]) - 1
        assert not np.isfinite(one[1]).any()
    for name, leaf in dw.items():  # Summed over all rows: as in plain code, of the first group.
        assert not np.isfinite(leaf[0] if name == "ragged" else leaf).any()
    for node in seen.values():
        assert np.isfinite(node.grad) and fp8jax._observe.seal_fits(node.grad, node.seal[2])


@pytest.mark.parametrize(
    "recipe", thorough_but(dict(zip(RECIPES, RECIPES)), ["current", "rowwise"])
)
def test_a_huge_value_in_one_row_costs_the_others_only_where_they_share_its_scale(recipe):
    """Under `current` they become zeros: no scale of E4M3 holds both. Under all others they are as
    exact as without it, results and gradients of the inputs.
    """
    run, _ = compiled(recipe)
    want, gradients = PLAIN(W, X, IMAGES, COTANGENTS)
    clean, clean_gradients, _ = run(W, X, IMAGES, COTANGENTS)
    got, _, _ = run(W, X.at[1, 3].set(1e30), IMAGES.at[1, 2, 2, 3].set(1e30), COTANGENTS)
    cotangents = {name: leaf.at[1, ..., 3].set(1e30) for name, leaf in COTANGENTS.items()}
    _, (_, *of_inputs), _ = run(W, X, IMAGES, cotangents)
    triples = [(got[name], want[name], clean[name]) for name in want]
    for one, plain, without in [*triples, *zip(of_inputs, gradients[1:], clean_gradients[1:])]:
        kept = np.delete(np.arange(4), 1)  # Ragged products read these.
        if recipe == "current":
            assert not np.asarray(one[kept]).any() and np.asarray(one[1]).any()
        else:
            assert sqnr(one[kept], plain[kept]) > sqnr(without[kept], plain[kept]) - 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_no_group_are_not_read(recipe):
    """Whatever they hold, in the operand or in the gradient, everything is what it is with zeros
    there, bit for bit.
    """
    run, _ = compiled(recipe)

    def ragged(value, where):
        x, cotangents = X.at[4:].set(0), COTANGENTS
        if where == "operand":
            x = X.at[4:].set(value)
        # The dense product shares x: only the ragged one's results are looked at, and its gradient
        # has the rest zero.
        cotangents = jax.tree.map(jnp.zeros_like, COTANGENTS)
        cotangents["ragged"] = COTANGENTS["ragged"].at[4:].set(value if where == "gradient" else 0)
        out, (dw, dx, _), seen = run(W, x, IMAGES, cotangents)
        return out["ragged"], dw["ragged"], dx, jax.tree.leaves(seen.get("ragged"))

    want = ragged(0.0, "operand")
    assert np.abs(want[1]).max() > 0 and not np.asarray(want[0][4:]).any()
    for where in ("operand", "gradient"):
        for value in (*BAD.values(), 1e30):
            got = ragged(value, where)
            assert not np.asarray(got[0][4:]).any() and not np.asarray(got[2][4:]).any()
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])
            jax.tree.map(np.testing.assert_array_equal, got[3], want[3])


@pytest.mark.thorough
def test_groups_of_several_axes_leave_rows_out():
    """Batched groups, and an operand whose batch axis stands behind a kept one."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((2,), (2,)), ((1,), (1,))), [0], [0])
    lhs = jax.random.normal(KEYS[0], (5, 2, 8)).at[3:, 0].set(jnp.nan).at[4:, 1].set(jnp.inf)
    rhs, sizes = jax.random.normal(KEYS[1], (2, 2, 8, 3)), jnp.array([[1, 2], [3, 1]], jnp.int32)
    recipe = RECIPES["current"]
    got = fp8jax.ops.ragged_dot_general(lhs, rhs, sizes, numbers, recipe=recipe)
    want = jax.lax.ragged_dot_general(jnp.where(jnp.isfinite(lhs), lhs, 0), rhs, sizes, numbers)
    assert sqnr(got, want) > 25


@pytest.mark.parametrize(
    "recipe",
    thorough_but({name: name for name in RECIPES if name != "weight_only"}, ["delayed"]),
)
def test_apply_if_finite_skips_the_steps_that_it_skips_without_fp8(recipe):
    """For an infinity in the input, in a weight, in the loss's scale; and the scales go on from
    finite values.
    """

    def loss(params, x, scale):
        return jnp.square(jax.nn.relu(x @ params["up"]) @ params["down"]).mean() * scale

    params = {"up": W["dense"], "down": jax.random.normal(KEYS[1], (16, 4)) / 4}
    fp8_loss = fp8jax.fp8(loss, RECIPES[recipe])
    tx = optax.apply_if_finite(optax.sgd(1e-3), 100)
    full = fp8jax.with_delayed_scaling(tx)

    @jax.jit
    def fp8_step(trained, state, x, scale):
        grads = jax.grad(lambda t: fp8_loss(t["fp8"], t["params"], x, scale))(trained)
        updates, state = full.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    @jax.jit
    def plain_step(params, state, x, scale):
        updates, state = tx.update(jax.grad(loss)(params, x, scale), state, params)
        return optax.apply_updates(params, updates), state

    def with_infinity(tree):
        return tree | {"up": tree["up"].at[3, 3].set(jnp.inf)}

    trained = {"fp8": fp8_loss.init(params, X, 1.0), "params": params}
    state, plain_state, skipped = full.init(trained), tx.init(params), []
    bad = X.at[2, 3].set(jnp.inf)
    for x, scale, weight in [
        (X, 1.0, 0), (bad, 1.0, 0), (X, 1.0, 0), (X, 1.0, 1), (X, jnp.inf, 0), (X, 1.0, 0),
    ]:  # fmt: skip
        broken = (
            (trained | {"params": with_infinity(trained["params"])}, with_infinity(params))
            if weight
            else (trained, params)
        )
        after, state = fp8_step(broken[0], state, x, scale)
        plain_after, plain_state = plain_step(broken[1], plain_state, x, scale)
        trained, params = (trained, params) if weight else (after, plain_after)
        skipped.append((not bool(state.inner.last_finite), not bool(plain_state.last_finite)))
    assert [fp8 for fp8, _ in skipped] == [plain for _, plain in skipped]
    assert [plain for _, plain in skipped] == [False, True, False, True, True, False]


def test_a_padding_row_of_nan_in_each_batch_does_not_freeze_the_scale():
    """Its amax is that of the other rows, and moves the scale."""
    fp8_loss = fp8jax.fp8(
        lambda w, x: jnp.square((x @ w)[1:]).mean(), recipes.delayed(history_window=1)
    )
    w, padded = W["dense"], X.at[0].set(jnp.nan)
    trained = {"fp8": fp8_loss.init(w, padded), "w": w}
    assert float(trained["fp8"]["dot"].lhs) < 0
    tx = fp8jax.with_delayed_scaling(optax.sgd(0.0))
    state = tx.init(trained)

    @jax.jit
    def step(trained, state, x):
        grads = jax.grad(lambda t: fp8_loss(t["fp8"], t["w"], x))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, grads["fp8"]

    for size in (1.0, 64.0, 4096.0):
        trained, state, seen = step(trained, state, padded * size)
        np.testing.assert_array_equal(seen["dot"].lhs, jnp.abs(X[1:] * size).max())
        exponent = fp8jax._scaling.exponent_from_amax(seen["dot"].lhs, fp8jax.E4M3)
        assert trained["fp8"]["dot"].lhs == exponent
    found = fp8jax.metrics.summary(state, trained)
    # The operand had an amax each time; the weights are NaN after a step, as in plain code.
    faults = {name: count for name, count in found.items() if count and "nonfinite/" in name}
    assert faults == {"fp8/nonfinite/dot/rhs": 2} and found["fp8/unsealed"] == 0
    # Negated from outside it is refused all the same.
    off = jax.tree.map(jnp.negative, seen)
    before = trained["fp8"]["dot"].lhs
    updates, state = tx.update({"fp8": off, "w": jnp.zeros_like(w)}, state, trained)
    assert updates["fp8"]["dot"].lhs == 0 and before == trained["fp8"]["dot"].lhs
    assert fp8jax.metrics.summary(state, trained)["fp8/unsealed"] > 0


def test_nans_are_seen_by_jax_debug_nans():
    fp8_fn = fp8jax.fp8(lambda w, x: x @ w, recipes.current())
    x = X.at[0, 0].set(jnp.inf)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.block_until_ready(jax.jit(fp8_fn)({}, W["dense"], x))


def test_infinities_are_clipped_on_request():
    """And finite they are, as the large values of the cast."""
    recipe = recipes.current()
    casts = {
        name: dataclasses.replace(getattr(recipe.forward, name), clip_infinities=True)
        for name in ("lhs", "rhs")
    }
    recipe = dataclasses.replace(recipe, forward=dataclasses.replace(recipe.forward, **casts))
    out = fp8jax.fp8(lambda w, x: x @ w, recipe)(
        {}, jnp.eye(4), jnp.ones((3, 4)).at[2].set(jnp.inf)
    )
    np.testing.assert_array_equal(out[:2], 1)
    np.testing.assert_array_equal(out[2], 448 * 2.0**-8)
    assert fp8jax.Recipe.from_json(recipe.to_json()) == recipe
