"""A batch of NaN, Inf, zeros, 1e-38 or 1e30 in the middle of training: what the scales do then, and what the counters say."""

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
    """With `clip_infinities` the step is finite, and is taken; the operand that held it moves as if it had never been."""
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


def test_a_huge_finite_batch_is_an_observation_for_as_long_as_the_window():
    clean, steps = run(clipped), run(clipped, "1e30")
    exponents = [float(trained["fp8"]["up"].lhs) for trained, _, _ in steps]
    assert (
        exponents[FAULT : FAULT + WINDOW] == [91.0] * WINDOW
    )  # 448 * 2**91 is the first to hold 1e30
    assert (
        exponents[FAULT + WINDOW :]
        == [float(trained["fp8"]["up"].lhs) for trained, _, _ in clean][FAULT + WINDOW - 1 :]
    )
    assert max(exponents[:FAULT] + exponents[FAULT + WINDOW :]) < 0
    nonfinite, totals = counters(steps)
    assert not nonfinite and totals["fp8/saturated/up/lhs"] >= 1
    # Meanwhile what is of the usual size is cast to zeros.
    assert not steps[FAULT + 1][2]["down"].lhs and steps[FAULT + WINDOW + 1][2]["down"].lhs > 0
