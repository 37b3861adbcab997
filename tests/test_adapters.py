"""Low-rank adapters trained on a base held as FP8 codes, beside the same on the base dequantized."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from fp8jax import (
    Fp8Tensor,
    PerChannel,
    WeightRule,
    dequantize_params,
    fp8,
    quantize_params,
    recipes,
    with_delayed_scaling,
)

WIDTH, RANK, LAYERS, STEPS = 32, 4, 3, 150
RECIPES = {
    name: getattr(recipes, name)() for name in ("weight_only", "current", "rowwise", "delayed")
}
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (RNG.normal(size=shape) * scale).astype(np.float32)


X = normal(64, WIDTH)
BASE = {
    "layers": normal(LAYERS, WIDTH, WIDTH, scale=WIDTH**-0.5),
    "head": normal(WIDTH, WIDTH, scale=WIDTH**-0.5),
}
ADAPTERS = {
    "a": normal(LAYERS, WIDTH, RANK, scale=WIDTH**-0.5),
    "b": np.zeros((LAYERS, RANK, WIDTH), np.float32),
}
RULES = [WeightRule("layers", PerChannel(-1), stacked=1), WeightRule("head", PerChannel(-1))]


def layer(x, slices):
    w, a, b = slices
    return x + 0.3 * jnp.tanh(x @ w + x @ a @ b), None


def in_scan(base, adapters, x):
    x, _ = jax.lax.scan(layer, x, (base["layers"], adapters["a"], adapters["b"]))
    return x @ base["head"]


def unrolled(base, adapters, x):
    for n in range(LAYERS):
        x, _ = layer(x, (base["layers"][n], adapters["a"][n], adapters["b"][n]))
    return x @ base["head"]


def rematerialized(base, adapters, x):
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, (base["layers"], adapters["a"], adapters["b"]))
    return x @ base["head"]


def in_devices(base, adapters, x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(in_scan, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P("data"))
    return run(base, adapters, x)


# What is to be learned: a base that is some way off.
TARGET = jnp.asarray(
    in_scan(
        BASE
        | {
            "layers": BASE["layers"]
            + 0.3 * normal(LAYERS, WIDTH, RANK) @ normal(LAYERS, RANK, WIDTH, scale=WIDTH**-0.5)
        },
        ADAPTERS,
        X,
    )
)


def train(loss, trained, has_scales):
    """Losses of `STEPS` steps of Adam; `loss` of what is trained."""
    tx = optax.adam(3e-3)
    tx = with_delayed_scaling(tx) if has_scales else tx

    @jax.jit
    def step(trained, state):
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, losses = tx.init(trained), []
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it.
        for _ in range(STEPS):
            trained, state, value = step(trained, state)
            losses.append(float(value))
    return losses


def check_alike(run, base):
    """Adapters learn on the codes what they learn on the values."""
    assert all(isinstance(leaf, Fp8Tensor) for leaf in base.values())
    coded, dense = run(base), run(dequantize_params(base))
    assert dense[-1] < 0.3 * dense[0]  # There is something to learn, and it is learned.
    assert coded[-1] == pytest.approx(dense[-1], rel=0.01)
    return coded


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    "fn",
    [
        in_scan,
        pytest.param(unrolled, marks=pytest.mark.slow),
        pytest.param(rematerialized, marks=pytest.mark.slow),
        pytest.param(in_devices, marks=pytest.mark.slow),
    ],
)
def test_functions_learn(fn, recipe):
    base = quantize_params(BASE, RULES)
    loss = fp8(
        lambda base, adapters, x: jnp.square(fn(base, adapters, x) - TARGET).mean(),
        recipe,
        weights=(0, 1),
    )

    def run(base):
        trained = {"scales": loss.init(base, ADAPTERS, X), "adapters": ADAPTERS}
        return train(
            lambda t: loss(t["scales"], base, t["adapters"], X), trained, bool(trained["scales"])
        )

    check_alike(run, base)
