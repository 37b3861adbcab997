"""Eight microbatches through a real model: by hand, in a scan, by MultiSteps, the same histories;
and the first step's error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax.optim import accumulate, with_delayed_scaling

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "up": jax.random.normal(KEYS[0], (16, 32)) * 0.25,
    "down": jax.random.normal(KEYS[1], (32, 8)) * 0.2,
}
X = jax.random.normal(KEYS[2], (2, 8, 4, 16)) * jnp.exp2(
    jax.random.randint(KEYS[3], (2, 8, 1, 1), -6, 7).astype(jnp.float32)
)


def loss(params, x):
    return jnp.square(
        jnp.tanh(x @ params["up"]) @ params["down"]
    ).sum()  # a sum: each microbatch's cotangent is 1


FP8_LOSS = fp8jax.fp8(loss, fp8jax.recipes.delayed(history_window=4))


@jax.jit
def gradients_of(trained, x):
    return jax.grad(lambda trained: FP8_LOSS(trained["fp8"], trained["params"], x))(trained)


@jax.jit
def gradients_of_all(trained, batches):
    def body(total, x):
        return accumulate(total, gradients_of(trained, x)), None

    return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, trained), batches)[0]


@jax.numpy_dtype_promotion("standard")  # for optax
def states(way):
    """The state of the scales and the exponents after two updates of eight microbatches each;
    parameters stay.
    """
    inner = optax.sgd(0.0)
    tx = with_delayed_scaling(optax.MultiSteps(inner, 8) if way == "MultiSteps" else inner)
    trained = {"fp8": FP8_LOSS.init(PARAMS, X[0, 0]), "params": PARAMS}
    state, update = tx.init(trained), jax.jit(tx.update)
    for batches in X:
        if way == "MultiSteps":
            found = [gradients_of(trained, x) for x in batches]
        elif way == "scan":
            found = [gradients_of_all(trained, batches)]
        else:
            found = [functools.reduce(accumulate, (gradients_of(trained, x) for x in batches))]
        for gradients in found:
            updates, state = update(gradients, state, trained)
            trained = optax.apply_updates(trained, updates)
    return state.scaling, trained["fp8"]


def test_three_ways_to_accumulate_give_bitwise_the_same_histories():
    by_hand = states("by hand")
    for way in ("scan", "MultiSteps"):
        scaling, scales = states(way)
        for got, want in zip(scaling.operands, by_hand[0].operands, strict=True):
            np.testing.assert_array_equal(got.amax_history, want.amax_history)
            np.testing.assert_array_equal(got.stored, want.stored)
            np.testing.assert_array_equal(got.unsealed, 0)
        jax.tree.map(np.testing.assert_array_equal, scales, by_hand[1])
    found = fp8jax.metrics.histories(by_hand[0], by_hand[1])
    site = next(
        name
        for name, node in by_hand[1].items()
        if (found[f"{name}/lhs"] == np.abs(X).max((1, 2, 3))).all()
    )
    np.testing.assert_array_equal(found[f"{site}/rhs"], np.abs(PARAMS["up"]).max())
    assert all(len(history) == 2 for history in found.values())


@jax.numpy_dtype_promotion("standard")
def test_each_entry_is_the_largest_of_the_eight_amaxes():
    tx = with_delayed_scaling(optax.sgd(0.0))
    trained = {"fp8": FP8_LOSS.init(PARAMS, X[0, 0]), "params": PARAMS}
    separate = [gradients_of(trained, x)["fp8"] for x in X[0]]
    _, state = jax.jit(tx.update)(gradients_of_all(trained, X[0]), tx.init(trained), trained)
    found = fp8jax.metrics.histories(state, trained)
    for name in trained["fp8"]:
        for operand in ("lhs", "rhs", "grad"):
            amaxes = [float(getattr(seen[name], operand)) for seen in separate]
            assert found[f"{name}/{operand}"].tolist() == [max(amaxes)]
            assert operand == "rhs" or min(amaxes) < max(amaxes)


@jax.numpy_dtype_promotion("standard")
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="XLA for CPUs leaves conversions to float16 and back out there: nothing overflows",
)
def test_dynamic_loss_scaling_skips_what_overflows_and_leaves_no_trace():
    """In float16: the loss's scale doubles until gradients overflow; those steps change neither
    parameters nor scales.
    """

    def half(params, x, scale):
        params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (params, x))
        return loss(params, x).astype(jnp.float32) * scale

    fp8_half = fp8jax.fp8(half, fp8jax.recipes.delayed(history_window=4))
    tx = with_delayed_scaling(optax.apply_if_finite(optax.sgd(1e-3), 100))
    x = X[0, 0] / jnp.abs(X[0, 0]).max()
    trained = {"fp8": fp8_half.init(PARAMS, x, 1.0), "params": PARAMS}
    state, scale, skipped, losses = tx.init(trained), 2.0**6, 0, []

    @jax.jit
    def step(trained, state, scale):
        value, gradients = jax.value_and_grad(lambda t: fp8_half(t["fp8"], t["params"], x, scale))(
            trained
        )
        gradients["params"] = jax.tree.map(lambda leaf: leaf / scale, gradients["params"])
        updates, state = tx.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value / scale

    for _ in range(24):
        after, state, value = step(trained, state, jnp.float32(scale))
        finite = bool(state.inner.last_finite)
        scale, skipped = (scale * 2 if finite else scale / 2), skipped + (not finite)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after))
        if not finite:
            jax.tree.map(np.testing.assert_array_equal, after, trained)
        trained = after
        losses.append(float(value))
    assert 2 < skipped < 20
    assert min(losses[-2:]) < 0.9 * losses[0]
    assert all(np.isfinite(operand.amax_history).all() for operand in state.scaling.operands)


def test_first_gradient_of_a_tiny_loss_is_right_after_calibrate():
    """At loss x 1e-5 on a scale of 1 every gradient flushes to zero; `calibrate` gives scales that
    fit.
    """
    x, w = jax.random.normal(KEYS[2], (256, 128)), jax.random.normal(KEYS[3], (128, 64)) * 128**-0.5
    labels = jnp.arange(256) % 64

    def tiny(w, x):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels).mean() * 1e-5

    fp8_tiny = fp8jax.fp8(tiny, fp8jax.recipes.delayed())
    scales = fp8jax.calibrate(fp8_tiny, fp8_tiny.init(w, x), [(w, x)])
    want = jax.jit(jax.grad(tiny))(w, x)
    gradient = jax.jit(jax.grad(fp8_tiny, argnums=1))
    for given, least, most in (
        (scales, 0.005, 0.06),
        (jax.tree.map(jnp.zeros_like, scales), 0.5, 1.01),
    ):
        error = float(jnp.linalg.norm(gradient(given, w, x) - want) / jnp.linalg.norm(want))
        assert least < error < most


@pytest.mark.thorough
def test_the_size_of_the_loss_changes_no_bit_of_the_first_gradients_of_a_deep_model():
    """After `calibrate`: scales move with the gradients, so that their codes are the same at
    2**-17, which is about 1e-5, as at 1.
    """
    layers = jax.random.normal(KEYS[0], (6, 32, 32)) * 0.25

    def scaled(size):
        def loss(layers, x):
            return (
                jnp.square(
                    jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, layers)[0]
                ).mean()
                * size
            )

        fp8_loss, x = (
            fp8jax.fp8(loss, fp8jax.recipes.delayed()),
            jax.random.normal(KEYS[2], (64, 32)),
        )
        scales = fp8jax.calibrate(fp8_loss, fp8_loss.init(layers, x), [(layers, x)])
        return jax.jit(jax.grad(fp8_loss, argnums=1))(scales, layers, x), jax.jit(jax.grad(loss))(
            layers, x
        )

    (tiny, exact_tiny), (whole, exact) = scaled(2.0**-17), scaled(1.0)
    np.testing.assert_array_equal(tiny * 2.0**17, whole)
    for got, want in ((tiny, exact_tiny), (whole, exact)):
        assert 0.005 < float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.2


@pytest.mark.thorough
@pytest.mark.parametrize("merge", [jax.lax.pmean, jax.lax.psum], ids=["mean", "sum"])
def test_observations_merged_over_devices_by_hand_move_scales(merge):
    """Each device differentiates its own batch, and all gradients are merged alike, amaxes too."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    w, x = jnp.ones((8, 4)), jax.random.normal(jax.random.key(0), (16, 8))
    x = x * jnp.exp2(jnp.arange(16.0) / 3)[:, None]
    fp8_loss = fp8jax.fp8(lambda w, x: jnp.square(x @ w).mean(), fp8jax.recipes.delayed())
    tx = fp8jax.with_delayed_scaling(optax.sgd(0.0))
    trained = {"scales": fp8_loss.init(w, x / 4), "w": w}

    def gradients(trained, x):
        return jax.grad(lambda t: fp8_loss(t["scales"], t["w"], x))(trained)

    def step(trained, x):
        own = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), trained)
        return jax.tree.map(lambda leaf: merge(leaf, "data"), gradients(own, x))

    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    seen = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(trained, x)
    moved, state = tx.update(seen, tx.init(trained), trained)
    expected, _ = tx.update(gradients(trained, x), tx.init(trained), trained)
    assert fp8jax.metrics.summary(state, trained)["fp8/observed"] == 3
    for name, most in {"lhs": 5, "rhs": 0}.items():
        more = getattr(moved["scales"]["dot"], name) - getattr(expected["scales"]["dot"], name)
        assert 0 <= more <= most, name
    assert getattr(moved["scales"]["dot"], "lhs") != 0
