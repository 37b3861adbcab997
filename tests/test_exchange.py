"""Gradient exchange in FP8 over eight host devices."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fp8jax import E5M2, optim

SHAPES = {"w": (16, 40), "b": (7,), "s": (), "empty": (0, 3)}


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def exchanger(tx, checked=True):
    """`(gradients [devices, ...], state) -> (means, state)`."""

    def update(gradients, state):
        return tx.update(jax.tree.map(lambda g: g[0], gradients), state)

    return jax.jit(
        jax.shard_map(
            update,
            mesh=mesh(),
            in_specs=(P("data"), P("data")),
            out_specs=(P(), P("data")),
            check_vma=checked,
        )
    )


def draw(key):
    return {
        name: jax.random.normal(jax.random.fold_in(key, index), (8, *shape))
        * 10.0 ** (2 * index - 4)
        for index, (name, shape) in enumerate(SHAPES.items())
    }


PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("checked", "fmt", "decibels"),
    [(True, "E4M3", 27), (False, E5M2, 18)],
    ids=["checked", "unchecked"],
)
def test_means_are_close_each_leaf_on_its_own_scales(checked, fmt, decibels):
    tx = optim.exchange_gradients("data", 8, fmt)
    gradients = draw(jax.random.key(0))
    means, state = exchanger(tx, checked)(gradients, tx.init(PARAMS))
    for name, mean in means.items():
        want = np.asarray(gradients[name], np.float64).mean(0)
        error = ((np.asarray(mean) - want) ** 2).sum()
        assert (
            mean.shape == want.shape
            and mean.dtype == jnp.float32
            and mean.sharding.is_fully_replicated
        )
        if mean.size > 1:
            assert 10 * np.log10((want**2).sum() / error) > decibels and error > 0
    # Each device remembers what was lost: with that, the sum is exact.
    lost = jax.tree.map(lambda e: np.asarray(e, np.float64).mean(0), state.gradients)
    # Of the flat blocks, "b" and "s" have one each, and "w" comes last.
    flat = np.asarray(state.means, np.float64).reshape(-1)[256 : 256 + 640].reshape(16, 40)
    want = np.asarray(gradients["w"], np.float64).mean(0)
    np.testing.assert_allclose(
        np.asarray(means["w"]) + lost["w"] + flat, want, rtol=1e-5, atol=1e-9
    )


@functools.cache
def thousand(feedback):
    """The means of one small gradient, exchanged a thousand times, on other noise each time; and
    what they should be.
    """
    tx = optim.exchange_gradients("data", 8)
    signal = jnp.linspace(-1, 1, 96) ** 3

    def update(state, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        gradient = signal + 0.3 * jax.random.normal(key, (96,))
        mean, new = tx.update(gradient, state)
        return (new if feedback else state), (mean, jax.lax.pmean(gradient, "data"))

    def run(state, keys):
        return jax.lax.scan(update, state, keys)[1]

    run = jax.shard_map(run, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P(), check_vma=False)
    got, exact = jax.jit(run)(tx.init(jnp.zeros(96)), jax.random.split(jax.random.key(2), 1000))
    return np.asarray(got, np.float64), np.asarray(exact, np.float64)


@pytest.mark.thorough
def test_a_thousand_exchanges_are_unbiased():
    got, exact = thousand(True)
    error = (got - exact).mean(0)
    assert (np.abs(error) <= 5 * (got - exact).std(0) / math.sqrt(1000)).all() and (
        got != exact
    ).mean() > 0.9
    # Each remembers what it lost, so that the error of the sum is that of one exchange.
    assert np.abs((got - exact).sum(0)).max() < 0.2
    # Without memory it grows.
    assert np.abs((thousand(False)[0] - exact).sum(0)).max() > 1.0


def test_what_is_not_finite_arrives_and_leaves_nothing_behind():
    tx = optim.exchange_gradients("data", 8)
    exchange = exchanger(tx)
    gradients = draw(jax.random.key(1))
    state = tx.init(PARAMS)
    bad = gradients | {"w": gradients["w"].at[3, 2, 1].set(jnp.inf).at[5, 2, 2].set(jnp.nan)}
    means, state = exchange(bad, state)
    assert (
        np.isnan(np.asarray(means["w"])[2, 1:3]).all()
        and np.isnan(np.asarray(means["w"])).sum() == 2
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    means, _ = exchange(gradients, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(means))


@pytest.mark.thorough
def test_training_loses_nothing():
    """A regression by Adam, its batch over eight devices: the loss is that of exact exchange to
    half a percent.
    """
    keys = jax.random.split(jax.random.key(3), 4)
    x, truth = jax.random.normal(keys[0], (512, 32)), jax.random.normal(keys[1], (32, 8))
    y = jnp.tanh(x @ truth) + jax.random.normal(keys[2], (512, 8))
    start = {"up": jax.random.normal(keys[3], (32, 64)) / 8, "down": jnp.zeros((64, 8))}

    def loss(params, x, y):
        return jnp.square(jnp.tanh(x @ params["up"]) @ params["down"] - y).mean()

    def train(first):
        tx = optax.chain(first, optax.adam(optax.cosine_decay_schedule(1e-2, 150)))

        def step(carry, _):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(
                jax.lax.pcast(params, "data", to="varying"), *data
            )
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), jax.lax.pmean(value, "data")

        def run(params, state, x, y):
            nonlocal data
            data = x, y
            return jax.lax.scan(step, (params, state), length=150)[1]

        data = None
        spec = (P("data") if isinstance(tx.init(start)[0], optim.ExchangeState) else P(), P())
        run = jax.jit(
            jax.shard_map(
                run, mesh=mesh(), in_specs=(P(), spec, P("data"), P("data")), out_specs=P()
            )
        )
        with jax.numpy_dtype_promotion("standard"):
            return float(run(start, tx.init(start), x, y)[-20:].mean())

    exact = train(optax.stateless(lambda g, _: jax.lax.pmean(g, "data")))
    ours = train(optim.exchange_gradients("data", 8))
    assert 0.98 < ours / exact < 1.005 and ours != exact and exact < 0.7 * float(loss(start, x, y))


@pytest.mark.parametrize(
    ("devices", "grads", "text"),
    [
        (
            4,
            {"w": jnp.ones((8, 3))},
            "devices must be the size of the axis 'data'; got 4, and the axis has 8",
        ),
        (8, {"v": jnp.ones((8, 3))}, "must be of the same structure"),
        (8, {"w": jnp.ones((8, 4))}, r"got \(1, 3\) for \(4,\) at \['w'\]"),
    ],
    ids=["devices", "structure", "shape"],
)
def test_bad_input(devices, grads, text):
    tx = optim.exchange_gradients("data", devices)
    state = optim.exchange_gradients("data", 8).init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=text):
        exchanger(tx)(grads, state)


def test_gradients_that_are_summed_already_are_refused():
    tx = optim.exchange_gradients("data", 8)
    run = jax.shard_map(
        lambda w, state, x: tx.update(jax.grad(lambda w: (x[0] * w).sum())(w), state),
        mesh=mesh(),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(), P("data")),
    )
    with pytest.raises(
        ValueError, match="already a sum. Differentiate with respect to jax.lax.pcast"
    ):
        jax.jit(run)(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones((8, 3)))
    with pytest.raises(ValueError, match="fmt must be a format of signed values; got E8M0"):
        optim.exchange_gradients("data", 8, "E8M0")


@pytest.mark.slow
def test_the_example_learns_what_it_learns_from_exact_means(monkeypatch):
    """The example's model, its batch over eight devices: on held-out text half a percent at most,
    on average over seeds.
    """
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "examples"))
    import train_lm

    text = train_lm.load_text(None)
    training, held_out = text[: -len(text) // 20], text[-len(text) // 20 :]

    def train(first, seed):
        config = train_lm.Config(steps=400, layers=2, width=128, seed=seed)
        model = train_lm.linen_model(config)
        tx = optax.chain(
            first,
            optax.clip_by_global_norm(1.0),
            optax.adamw(train_lm.learning_rate_of(config), b2=0.95, weight_decay=0.1),
        )

        def loss(params, tokens, targets):
            logits = model.apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        params = jax.jit(model.init)(
            jax.random.key(seed), train_lm.batch_at(training, 0, config)[0]
        )["params"]
        state = tx.init(params)
        spec = (
            P("data") if isinstance(state[0], optim.ExchangeState) else P(),
            *(P() for _ in state[1:]),
        )

        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh(),
            in_specs=(P(), spec, P("data"), P("data")),
            out_specs=(P(), spec),
        )
        def step(params, state, tokens, targets):
            updates, state = tx.update(
                jax.grad(loss)(jax.lax.pcast(params, "data", to="varying"), tokens, targets),
                state,
                params,
            )
            return optax.apply_updates(params, updates), state

        for index in range(config.steps):
            params, state = step(params, state, *train_lm.batch_at(training, index, config))
        fixed = dataclasses.replace(config, seed=0)
        return np.mean(
            [
                jax.jit(loss)(params, *train_lm.batch_at(held_out, index, fixed))
                for index in range(32)
            ]
        )

    with jax.numpy_dtype_promotion("standard"):
        gaps = [
            train(optim.exchange_gradients("data", 8), seed)
            / train(optax.stateless(lambda g, _: jax.lax.pmean(g, "data")), seed)
            - 1
            for seed in range(3)
        ]
    print(gaps)
    assert 0 < np.abs(gaps).max() and np.mean(gaps) <= 0.005


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")
def test_bfloat16_weights_train_with_fp8_moments_and_exchange():
    """All of it together: what travels, what is kept and what is added to are bytes or bfloat16."""
    specs = P("data"), P()  # what the exchange remembers is each device's own
    tx = optax.chain(optim.exchange_gradients("data", 8), optim.adamw(1e-3))

    def loss(params, batch):
        return jnp.square(batch @ params["w"].astype(jnp.float32) - 1).mean()

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh(), in_specs=(P(), specs, P("data"), P()), out_specs=(P(), specs)
    )
    def step(params, state, batch, key):
        own = jax.lax.pcast(params, "data", to="varying")
        updates, state = tx.update(jax.grad(loss)(own, batch), state, params)
        return optim.apply_updates(params, updates, key=key), state

    key, params = jax.random.key(0), {"w": jnp.zeros((16, 4), jnp.bfloat16)}
    state, batch = tx.init(params), jax.random.normal(key, (64, 16)) + 1
    start = float(loss(params, batch))
    for index in range(60):
        params, state = step(params, state, batch, jax.random.fold_in(key, index))
    assert params["w"].dtype == jnp.bfloat16 and float(loss(params, batch)) < 0.5 * start
