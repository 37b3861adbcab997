"""A batch of NaN, Inf, zeros, 1e-38 or 1e30 in the middle of training: what the scales do then, and
what the counters say.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fp8jax
from fp8jax import recipes
from fp8jax.optim import with_delayed_scaling

WINDOW, STEPS, FAULT = 3, 8, 3
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "up": jax.random.normal(KEYS[0], (8, 16)) / 3,
    "down": jax.random.normal(KEYS[1], (16, 4)) / 4,
    "skip": jnp.zeros(()),
}
BATCHES = list(
    jax.random.normal(KEYS[2], (STEPS, 6, 8))
    * jnp.exp2(jax.random.randint(KEYS[3], (STEPS, 1, 1), -3, 4).astype(jnp.float32))
)
FAULTS = {"NaN": np.nan, "Inf": np.inf, "zero": 0.0, "1e-38": 1e-38, "1e30": 1e30}


def clipped(params, x):
    """All of the batch goes through a cast, where it saturates."""
    return jnp.square(jnp.tanh(x @ params["up"]) @ params["down"]).mean()


def skipping(params, x):
    """A part of it does not, and overflows."""
    y = jnp.tanh(x @ params["up"]) @ params["down"]
    return jnp.square(y + 1e-4 * params["skip"] * jnp.square(x).sum(-1, keepdims=True)).mean()


def with_clipped_infinities(recipe):
    """The recipe with `clip_infinities=True` in all of its casts."""

    def casts(product):
        return dataclasses.replace(
            product,
            **{
                field.name: dataclasses.replace(cast, clip_infinities=True)
                for field in dataclasses.fields(product)
                if (cast := getattr(product, field.name)) is not None
            },
        )

    products = {name: casts(getattr(recipe, name)) for name in ("forward", "dlhs", "drhs")}
    return dataclasses.replace(recipe, **products)


@functools.cache
def run(loss, fault=None, clip_infinities=False):
    """After each step: parameters and scales, the optimizer's state, and what was observed."""
    recipe = recipes.delayed(history_window=WINDOW)
    fp8_loss = fp8jax.fp8(loss, with_clipped_infinities(recipe) if clip_infinities else recipe)
    tx = with_delayed_scaling(optax.apply_if_finite(optax.sgd(0.05), 100))

    @jax.jit
    def step(trained, state, x):
        grads = jax.grad(lambda trained: fp8_loss(trained["fp8"], trained["params"], x))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, grads["fp8"]

    trained = {"fp8": fp8_loss.init(PARAMS, BATCHES[0]), "params": PARAMS}
    state, steps = tx.init(trained), []
    batches = (
        BATCHES
        if fault is None
        else [*BATCHES[:FAULT], jnp.full_like(BATCHES[0], FAULTS[fault]), *BATCHES[FAULT:]]
    )
    for x in batches:
        trained, state, seen = step(trained, state, x)
        steps.append((trained, state, seen))
    return steps


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def counters(steps):
    found = fp8jax.metrics.summary(steps[-1][1], steps[-1][0])
    return {
        name.removeprefix("fp8/nonfinite/"): value
        for name, value in found.items()
        if name.startswith("fp8/nonfinite/")
    }, found


@pytest.mark.parametrize(
    ("loss", "fault"),
    [
        (clipped, "NaN"),
        (clipped, "Inf"),
        (clipped, "zero"),
        (clipped, "1e-38"),
        (skipping, "NaN"),
        (skipping, "Inf"),
        (skipping, "1e30"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_as_if_the_batch_had_never_been(loss, fault):
    """Parameters and scales are bitwise those of the run without it, from then on."""
    clean, steps = run(loss), run(loss, fault)
    assert (
        len({float(trained["fp8"]["up"].lhs) for trained, _, _ in clean}) > 2
    )  # They move, so that it says something.
    for (got, _, _), (want, _, _) in zip(steps[FAULT:], clean[FAULT - 1 :], strict=True):
        assert_same(got, want)
    refused = fault not in ("zero", "1e-38")
    assert bool(steps[FAULT][1].inner.last_finite) != refused
    nonfinite, totals = counters(steps)
    everything = ["down/grad", "down/lhs", "up/grad", "up/lhs"]
    expected = everything if fault in ("NaN", "Inf") else []
    if loss is skipping and fault == "1e30":  # What overflows comes back through the sum.
        expected = ["down/grad", "up/grad"]
    assert nonfinite == dict.fromkeys(expected, 1) and totals["fp8/unsealed"] == 0
    if refused:
        for got, want in zip(
            steps[-1][1].scaling.operands, clean[-1][1].scaling.operands, strict=True
        ):
            assert_same(got.amax_history, want.amax_history)
    else:  # The weights were seen once more, as they are. Nothing else was there to see.
        history = fp8jax.metrics.histories(*steps[FAULT][1::-1])
        assert history["up/rhs"][-1] == jnp.abs(steps[FAULT - 1][0]["params"]["up"]).max()
        assert totals["fp8/observed"] == counters(clean)[1]["fp8/observed"] + 2


def test_an_infinity_that_is_clipped_is_counted_and_leaves_no_amax():
    """With `clip_infinities` the step is finite, and is taken; the operand that held it moves as if
    it had never been.
    """
    clean, steps = run(clipped), run(clipped, "Inf", clip_infinities=True)
    seen = steps[FAULT][2]
    assert np.isinf(seen["up"].lhs) and all(
        np.isfinite(leaf) for leaf in (seen["up"].grad, seen["down"].lhs, seen["down"].grad)
    )
    assert bool(steps[FAULT][1].inner.last_finite)
    nonfinite, _ = counters(steps)
    assert nonfinite == {"up/lhs": 1}
    for (got, state, _), (want, wanted, _) in zip(steps[FAULT:], clean[FAULT - 1 :], strict=True):
        assert got["fp8"]["up"].lhs == want["fp8"]["up"].lhs
        np.testing.assert_array_equal(
            fp8jax.metrics.histories(state, got)["up/lhs"],
            fp8jax.metrics.histories(wanted, want)["up/lhs"],
        )
    assert (
        fp8jax.metrics.histories(steps[FAULT][1], steps[FAULT][0])["down/lhs"][-1]
        == seen["down"].lhs
    )  # 1.0, as it was.


def test_a_huge_finite_batch_is_kept_and_moves_no_scale_far():
    """Its amax is an observation like any, in the history and counted as saturated; alone in the
    window, it moves a scale by five binades, for one step.
    """
    clean, steps = run(clipped), run(clipped, "1e30")
    exponents = [float(trained["fp8"]["up"].lhs) for trained, _, _ in steps]
    expected = [float(trained["fp8"]["up"].lhs) for trained, _, _ in clean]
    assert exponents[:FAULT] == expected[:FAULT]
    before, at, after = exponents[FAULT - 1 : FAULT + 2]
    assert after <= before < at <= before + 5 < 0 and max(exponents) == at
    assert exponents[FAULT + WINDOW :] == expected[FAULT + WINDOW - 1 :]
    nonfinite, totals = counters(steps)
    assert not nonfinite and totals["fp8/saturated/up/lhs"] >= 1
    history = fp8jax.metrics.histories(*steps[FAULT][1::-1])["up/lhs"]
    assert history[-1] == np.float32(1e30)
    assert steps[FAULT + 1][2]["down"].lhs > 0


def sqnr_db(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return 10 * np.log10(np.square(want).sum() / np.square(got - want).sum())


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")  # MultiSteps needs it.
@pytest.mark.parametrize(
    ("stacked", "inner"),
    [(False, optax.sgd(1e-3)), (True, optax.MultiSteps(optax.sgd(1e-3), 2))],
    ids=["sites", "scanned, in two mini-steps"],
)
def test_quality_is_back_after_an_outlier_and_after_a_jump(stacked, inner):
    """One batch of 1e30 in one feature: within two updates. A lasting jump of 2**12: within three.
    As good as before, to 1 dB.
    """

    def layer(x, w):
        y = x @ w
        return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + np.float32(1e-12))

    def forward(params, x):
        x = layer(x, params["in"])
        if stacked:
            return jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["w"])[0]
        return layer(layer(x, params["w"][0]), params["w"][1])

    def loss(params, x):
        return jnp.square(forward(params, x) - np.float32(1)).mean()

    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(32, 32)) / 6, "w": rng.normal(size=(2, 32, 32)) / 6}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    x = [jnp.asarray(rng.normal(size=(64, 32)), jnp.float32) for _ in range(8)]
    fp8_loss, fp8_forward = (fp8jax.fp8(f, fp8jax.recipes.delayed()) for f in (loss, forward))
    tx = fp8jax.with_delayed_scaling(inner)
    first = {"params": params, "fp8": fp8_loss.init(params, x[0])}
    per_update = 2 if isinstance(inner, optax.MultiSteps) else 1

    @jax.jit
    def step(trained, state, x):
        grads = jax.grad(lambda t: fp8_loss(t["fp8"], t["params"], x))(trained)
        grads["params"] = jax.tree.map(lambda g: jnp.clip(g, -1, 1), grads["params"])
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    @jax.jit
    def outputs(trained, x):
        return fp8_forward(trained["fp8"], trained["params"], x), forward(trained["params"], x)

    def qualities(gains, spoiled=-1):
        trained, state, found = first, tx.init(first), []
        for index, gain in enumerate(gains):
            batch = x[index % 8] * gain
            found.append(sqnr_db(*outputs(trained, batch)))
            if index == spoiled:
                batch = batch.at[3, 5].set(1e30)
            for _ in range(per_update):
                trained, state = step(trained, state, batch)
        return found

    good = qualities([1.0] * 8)
    assert min(good) > 20
    for spoiled in (0, 3):
        after = qualities([1.0] * 8, spoiled)[spoiled + 2 :]
        assert min(after) > min(good) - 1, (spoiled, after)
    jumped = qualities([1.0] * 3 + [4096.0] * 6)[3:]
    assert jumped[0] < 10 and min(jumped[2:]) > min(good) - 1, jumped
