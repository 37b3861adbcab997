"""Models of other libraries go through `fp8jax.fp8` as they are: readable sites, true amaxes, close
gradients, and they train.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fp8jax
from fp8jax import Rule, recipes

X = jax.random.normal(jax.random.key(0), (64, 8))
Y = jnp.stack([jnp.sin(X).sum(-1), jnp.cos(X).sum(-1)], -1) / 4
TOKENS = jnp.arange(48).reshape(4, 12) % 11


def equinox_mlp():
    """Its leaves hold functions, too: activations, static to JAX."""
    model = eqx.nn.MLP(8, 2, 16, 2, key=jax.random.key(1))

    def loss(model, x, y):
        return jnp.square(jax.vmap(model)(x) - y).mean()

    return (
        loss,
        model,
        (X, Y),
        {"layers/0/weight": X, "layers/1/weight": None, "layers/2/weight": None},
    )


class HaikuTransformer(hk.Module):
    def __call__(self, tokens):
        x = hk.Embed(11, 16, name="embed")(tokens)
        for layer in range(1):
            norm = hk.LayerNorm(-1, create_scale=True, create_offset=True, name=f"norm_{layer}")
            x = x + hk.MultiHeadAttention(
                2, 8, w_init=hk.initializers.VarianceScaling(), name=f"attn_{layer}"
            )(*[norm(x)] * 3)
            x = x + hk.nets.MLP([32, 16], name=f"mlp_{layer}")(x)
        return hk.Linear(11, name="head")(x)


def haiku_transformer():
    net = hk.without_apply_rng(hk.transform(lambda tokens: HaikuTransformer(name="model")(tokens)))

    def loss(params, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(
            net.apply(params, tokens), tokens
        ).mean()

    layers = (
        "attn_{}/query/w",
        "attn_{}/key/w",
        "attn_{}/value/w",
        "attn_{}/linear/w",
        "mlp_{}/linear_0/w",
        "mlp_{}/linear_1/w",
    )
    sites = [f"model/{name.format(layer)}" for layer in range(1) for name in layers] + [
        "model/head/w"
    ]
    return loss, jax.jit(net.init)(jax.random.key(1), TOKENS), (TOKENS,), dict.fromkeys(sites)


def plain_function():
    def loss(params, x, y):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return jnp.square(x @ params["out"] - y).mean()

    keys = jax.random.split(jax.random.key(1), 3)
    layers = [
        {"w": jax.random.normal(key, (inputs, 16)) / 4, "b": jnp.zeros((1, 16))}
        for key, inputs in zip(keys, (8, 16))
    ]
    params = {"layers": layers, "out": jax.random.normal(keys[2], (16, 2)) / 4}
    return loss, params, (X, Y), {"layers/0/w": X, "layers/1/w": None, "out": None}


@jax.numpy_dtype_promotion("standard")  # optax's Adam, and Haiku's attention, need it.
@jax.numpy_rank_promotion("allow")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(equinox_mlp, marks=pytest.mark.thorough),
        pytest.param(haiku_transformer, marks=pytest.mark.slow),
        plain_function,
    ],
)
def test_a_model_as_it_is(make):
    loss, model, batch, sites = make()
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    explanation = fp8_loss.explain(model, *batch)
    assert [site.name for site in explanation.sites if site.selected] == list(sites)
    assert all(
        site.name.endswith(("/data", "/data#1")) for site in explanation.sites if not site.selected
    )

    trained = {"scales": fp8_loss.init(model, *batch), "model": model}
    tx = fp8jax.with_delayed_scaling(optax.adam(1e-2))
    state = jax.jit(tx.init)(eqx.filter(trained, eqx.is_array))

    def value_and_grad(trained):
        return eqx.filter_value_and_grad(
            lambda trained: fp8_loss(trained["scales"], trained["model"], *batch)
        )(trained)

    @eqx.filter_jit
    def step(trained, state):
        value, grads = value_and_grad(trained)
        updates, state = tx.update(grads, state, eqx.filter(trained, eqx.is_array))
        return eqx.apply_updates(trained, updates), state, value, grads

    grads = step(trained, state)[-1]
    exact = eqx.filter_jit(eqx.filter_grad(loss))(model, *batch)
    for got, want in zip(jax.tree.leaves(grads["model"]), jax.tree.leaves(exact), strict=True):
        if want.ndim > 1 and want.shape[0] > 1:
            assert 0 < jnp.linalg.norm(got - want) < 0.2 * jnp.linalg.norm(want)
    for name, node in grads["scales"].items():
        if sites[name] is not None:
            assert jnp.abs(sites[name]).max() in (node.lhs, node.rhs)
    losses = []
    for _ in range(15):
        trained, state, value, _ = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.6 * losses[0]
    assert fp8jax.metrics.summary(state, trained)["fp8/unsealed"] == 0


def test_rules_select_the_attention_of_haiku():
    loss, params, batch, _ = haiku_transformer()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rules = (Rule(r".*attn_\d/data(#1)?", recipes.current()), Rule("model/head/w", None))
        explanation = fp8jax.fp8(loss, recipes.delayed(), rules).explain(params, *batch)
    assert [
        site.recipe and site.recipe.name for site in explanation.sites if "data" in site.name
    ] == ["current"] * 2
    assert explanation.sites[-1].reason == "left out by rule 'model/head/w'"
    np.testing.assert_allclose(
        explanation.share, 1 - explanation.sites[-1].flops / explanation.flops
    )
