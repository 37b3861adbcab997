"""`Fp8Function.when`: FP8 on and off at run time, in one program, with the scales kept fresh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import recipes
from fp8jax._state import find_site_scales
from fp8jax.linen import Fp8

X = jax.random.normal(jax.random.key(0), (8, 16))
W = jax.random.normal(jax.random.key(1), (16, 16)) / 4.0
PARAMS = {"layers": jnp.stack([W, 2.0 * W]), "head": W.T}


@jax.custom_vjp
def own_rule(w, x):
    return x @ w


own_rule.defvjp(
    lambda w, x: (own_rule(w, x), (w, x)), lambda kept, g: (2.0 * kept[1].T @ g, g @ kept[0].T)
)


def loss(params, x):
    """A product in a scan and a checkpoint, one of each in both branches of a conditional, one with
    a rule of its own.
    """
    block = jax.checkpoint(lambda w, x: jax.nn.gelu(x @ w))
    x, _ = jax.lax.scan(lambda x, w: (block(w, x), None), x, params["layers"])
    x = jax.lax.cond(x.mean() > 100.0, lambda w: x @ w.T, lambda w: jnp.sin(x @ w), params["head"])
    return jnp.square(own_rule(params["head"], x)).mean()


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture(scope="module")
def switched():
    """The step with a switch, its scales, and a count of its traces."""
    traces = []

    def counted(params, x):
        traces.append(None)
        return loss(params, x)

    scales = fp8jax.fp8(loss, recipes.delayed()).init(PARAMS, X)
    fp8_loss = fp8jax.fp8(counted, recipes.delayed())
    step = jax.jit(
        lambda on, scales, params, x: jax.value_and_grad(fp8_loss.when(on), argnums=(0, 1, 2))(
            scales, params, x
        )
    )
    return step, scales, traces


@pytest.mark.thorough
def test_off_it_is_the_function_itself_and_on_it_is_the_quantized_one(switched):
    step, scales, _ = switched
    plain = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(PARAMS, X)
    quantized = jax.jit(jax.value_and_grad(fp8jax.fp8(loss, recipes.delayed()), argnums=(0, 1, 2)))(
        scales, PARAMS, X
    )
    off, on = step(False, scales, PARAMS, X), step(True, scales, PARAMS, X)
    assert_equal((off[0], off[1][1:]), plain)
    assert_equal(on, quantized)
    assert not jnp.array_equal(on[1][1]["head"], plain[1][0]["head"])


def test_off_it_observes_what_it_would_have_cast(switched):
    step, scales, _ = switched
    observed = step(False, scales, PARAMS, X)[1][0]
    np.testing.assert_array_equal(observed["layers"].rhs, jnp.abs(PARAMS["layers"]).max((1, 2)))
    assert float(observed["layers"].lhs[0]) == float(jnp.abs(X).max())
    assert (
        not observed["head#1"].grad and not observed["head#1"].lhs
    )  # of the branch that was not taken
    for name in ("layers", "head"):
        node, quantized = observed[name], step(True, scales, PARAMS, X)[1][0][name]
        seen = jnp.stack([node.lhs, node.rhs, node.grad], axis=-1)
        np.testing.assert_array_equal(node.seal, jnp.sqrt(seen))
        assert (seen > 0).all()
        np.testing.assert_allclose(
            seen, jnp.stack([quantized.lhs, quantized.rhs, quantized.grad], axis=-1), rtol=0.2
        )


def test_switching_traces_once(switched):
    step, scales, traces = switched
    for on in (jnp.array(True), jnp.array(False)):
        step(on, scales, PARAMS, X)
        if on:
            before = len(traces), step._cache_size()
    assert (len(traces), step._cache_size()) == before


def test_a_warm_up_leaves_the_scales_that_its_amaxes_ask_for():
    fn = lambda params, x: jnp.square(x @ params["w"]).mean()
    fp8_fn = fp8jax.fp8(fn, recipes.delayed(history_window=2))
    params = {"w": W}
    trained = {"scales": fp8_fn.init(params, X), "params": params}
    tx = fp8jax.with_delayed_scaling(optax.sgd(1e-3))
    state = tx.init(trained)

    @jax.jit
    def step(trained, state, x, index):
        grads = jax.grad(lambda t: fp8_fn.when(index >= 3)(t["scales"], t["params"], x))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    for index in range(3):
        trained, state = step(trained, state, X * 2.0**index, index)
    node = trained["scales"]["w"]
    assert float(node.lhs) == np.ceil(np.log2(4.0 * float(jnp.abs(X).max()) / 448))
    assert fp8jax.metrics.summary(state, trained)["fp8/observed"] == 9


def test_a_switch_in_a_batch_merges_by_max():
    fp8_fn = fp8jax.fp8(lambda w, x: (x @ w).sum(), recipes.delayed())
    scales = fp8_fn.init(W, X)
    xs, on = jnp.stack([X, 4.0 * X]), jnp.array([True, False])
    values = jax.vmap(lambda x, on: fp8_fn.when(on)(scales, W, x))(xs, on)
    assert_equal(values[1], jax.jit(lambda x: (x @ W).sum())(4.0 * X))
    observed = jax.jit(
        jax.grad(lambda s: jax.vmap(lambda x, on: fp8_fn.when(on)(s, W, x))(xs, on).sum())
    )(scales)["dot"]
    assert float(observed.lhs) == float(4.0 * jnp.abs(X).max()) and float(observed.grad) == 1.0


def test_a_switch_inside_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    fp8_fn = fp8jax.fp8(lambda w, x: jnp.square(x @ w).mean(), recipes.delayed())
    scales = fp8_fn.init(W, X)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P(), P("data"), P()), out_specs=P())
    def gradient(scales, w, x, on):
        return jax.grad(
            lambda s, w: jax.lax.pmean(fp8_fn.when(on)(s, w, x), "data"), argnums=(0, 1)
        )(scales, w)

    for on in (True, False):
        observed, dw = gradient(scales, W, X, on)
        assert float(observed["dot"].lhs) == float(jnp.abs(X).max())
    np.testing.assert_allclose(
        dw, jax.grad(lambda w: jnp.square(X @ w).mean())(W), rtol=1e-5, atol=1e-6
    )


def test_observing_goes_with_the_switch():
    fp8_fn = fp8jax.fp8(lambda w, x: x @ w, recipes.delayed())
    out, observed = fp8_fn.when(False).observe(fp8_fn.init(W, X), W, X)
    assert_equal(out, jax.jit(jnp.matmul)(X, W))
    assert float(observed["dot"].lhs) == float(jnp.abs(X).max())


def test_linen_modules_switch():
    module = nn.Dense(4)
    model = Fp8(module, recipes.delayed())
    variables = model.init(jax.random.key(0), X)

    @jax.jit
    def apply(variables, on):
        return jax.value_and_grad(lambda v: model.clone(enabled=on).apply(v, X).sum())(variables)

    plain = jax.jit(jax.value_and_grad(lambda p: module.apply({"params": p}, X).sum()))(
        variables["params"]
    )
    (value, grads), (on_value, _) = apply(variables, False), apply(variables, True)
    assert_equal((value, grads["params"]), plain)
    assert on_value == model.apply(variables, X).sum() != value
    assert float(find_site_scales(grads)[0].lhs) == float(jnp.abs(X).max())


@pytest.mark.parametrize(
    "enabled, got",
    [
        (1, "1"),
        (jnp.ones(2, bool), r"bool\[2\]"),
        (jnp.float32(1.0), r"float32\[\]"),
        ("on", "'on'"),
    ],
)
def test_errors(enabled, got):
    with pytest.raises(
        TypeError,
        match=rf"enabled must be a bool or a boolean scalar array; got {got}\. Compare to get one",
    ):
        fp8jax.fp8(loss, recipes.delayed()).when(enabled)
