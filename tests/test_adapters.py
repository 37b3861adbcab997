"""Low-rank adapters trained on a base held as codes, beside the same on the base dequantized."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxprs import kept_copies
from tiers import thorough_but

import fp8jax
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
    coded, dense = run(base), run(dequantize_params(base))
    assert dense[-1] < 0.3 * dense[0]  # There is something to learn, and it is learned.
    # A recipe of one scale for a tensor casts the values once more, and the codes not.
    assert 0.95 * dense[-1] < coded[-1] < 1.01 * dense[-1]


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["delayed"]))
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
    assert all(isinstance(leaf, Fp8Tensor) for leaf in base.values())
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


STEPPED = {fn.__name__: fn for fn in (in_scan, unrolled, rematerialized, in_devices)}


@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["weight_only", "delayed"]))
@pytest.mark.parametrize("fn", thorough_but(STEPPED, ["in_scan"]))
def test_no_wide_copy_of_the_base_outlives_its_product(fn, recipe):
    base = quantize_params(BASE, RULES)
    loss = fp8(lambda *args: jnp.square(fn(*args)).mean(), recipe, weights=(0, 1))
    scales = jax.eval_shape(loss.init, base, ADAPTERS, X[:8])  # activations are smaller

    def step(scales, base):
        fp8_loss = lambda scales, adapters: loss(scales, base, adapters, X[:8])
        return jax.value_and_grad(fp8_loss, argnums=(0, 1))(scales, ADAPTERS)

    assert not kept_copies(jax.make_jaxpr(step)(scales, base).jaxpr, WIDTH * WIDTH)
    if fn is in_scan:
        dense = jax.make_jaxpr(lambda *args: step(args[0], dequantize_params(args[1])))
        assert kept_copies(dense(scales, base).jaxpr, WIDTH * WIDTH)


class Layer(nn.Module):
    """A residual layer with an adapter."""

    @nn.compact
    def __call__(self, x, _):
        down = self.param("lora_a", nn.initializers.lecun_normal(), (WIDTH, RANK))
        up = self.param("lora_b", nn.initializers.zeros, (RANK, WIDTH))
        h = nn.Dense(WIDTH, use_bias=False, name="dense")(x)
        return x + 0.3 * jnp.tanh(h + x @ down @ up), None


class Model(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x):
        stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        layers = nn.scan(nn.remat(Layer), length=LAYERS, **stacked)
        return nn.Dense(WIDTH, use_bias=False, name="head")(layers(name="layers")(x, None)[0])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_linen_modules_learn(recipe):
    adapters = {"lora_a": ADAPTERS["a"], "lora_b": ADAPTERS["b"]}
    base = {
        "layers": {"dense": {"kernel": BASE["layers"]}},
        "head": {"kernel": BASE["head"]},
    }
    rules = [
        WeightRule("layers/.*", PerChannel(-1), stacked=1),
        WeightRule("head/.*", PerChannel(-1)),
    ]
    model = fp8jax.linen.Fp8(Model(), recipe)

    def run(base):
        def variables(trained):
            layers = base["layers"] | trained["adapters"]
            others = {name: trained[name] for name in trained if name != "adapters"}
            return {"params": base | {"layers": layers}, **others}

        trained = {"adapters": adapters}
        trained |= model.apply(variables(trained), X, mutable="fp8")[1]
        loss = lambda t: jnp.square(model.apply(variables(t), X) - TARGET).mean()
        return train(loss, trained, "fp8" in trained)

    check_alike(run, quantize_params(base, rules))


class LoRAModel(nnx.Module):
    """The same with NNX's own adapters."""

    def __init__(self, rngs):
        def adapted(n):
            linear = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
            linear.kernel.set_value(jnp.asarray(BASE["layers"][n]))
            return nnx.LoRA(WIDTH, RANK, WIDTH, base_module=linear, rngs=rngs)

        self.layers = nnx.List([adapted(n) for n in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.head.kernel.set_value(jnp.asarray(BASE["head"]))

    def __call__(self, x):
        for layer in self.layers:
            x = x + 0.3 * jnp.tanh(layer(x))
        return self.head(x)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_nnx_adapters_learn(recipe):
    filters = nnx.Any(nnx.LoRAParam, fp8jax.nnx.Fp8Scale)
    model = fp8jax.nnx.Fp8(LoRAModel(nnx.Rngs(0)), recipe)
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    base = quantize_params(
        nnx.state(model.module, frozen), [WeightRule(".*kernel", PerChannel(-1))]
    )

    def run(base):
        model = fp8jax.nnx.Fp8(LoRAModel(nnx.Rngs(0)), recipe)
        nnx.update(model.module, base)
        tx = optax.adam(3e-3)
        if any(recipe.delayed_casts):
            model.init_scales(X)
            tx = with_delayed_scaling(tx)
        optimizer = nnx.Optimizer(model, tx, wrt=filters)

        @nnx.jit
        def step(model, optimizer):
            loss = lambda model: jnp.square(model(X) - TARGET).mean()
            value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, filters))(model)
            optimizer.update(model, grads)
            return value

        with jax.numpy_dtype_promotion("standard"):
            return [float(step(model, optimizer)) for _ in range(STEPS)]

    check_alike(run, base)
    asked = nnx.DiffState(0, nnx.Any(nnx.Param, fp8jax.nnx.Fp8Scale))
    nnx.update(model.module, base)
    if any(recipe.delayed_casts):
        model.init_scales(X)
    with pytest.raises(ValueError, match="have no gradient; got one asked for, of .*kernel"):
        nnx.grad(lambda model: model(X).sum(), argnums=asked)(model)


class Adapted(eqx.Module):
    """The same in Equinox."""

    base: dict
    adapters: dict

    def __call__(self, x):
        return in_scan(self.base, self.adapters, x)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_equinox_modules_learn(recipe):
    loss = fp8(lambda model, x: jnp.square(model(x) - TARGET).mean(), recipe)

    def run(base):
        model = Adapted(base, jax.tree.map(jnp.asarray, ADAPTERS))
        is_adapter = Adapted(jax.tree.map(lambda _: False, base), {"a": True, "b": True})
        adapters, rest = eqx.partition(model, is_adapter)
        trained = {"scales": loss.init(model, X), "adapters": adapters}
        return train(
            lambda t: loss(t["scales"], eqx.combine(t["adapters"], rest), X),
            trained,
            bool(trained["scales"]),
        )

    check_alike(run, quantize_params(BASE, RULES))


def test_moments_of_adapters_are_codes_too():
    base = quantize_params(BASE, RULES)
    loss = fp8(
        lambda base, adapters, x: jnp.square(in_scan(base, adapters, x) - TARGET).mean(),
        recipes.weight_only(),
        weights=(0, 1),
    )
    tx = fp8jax.optim.adamw(3e-3)
    adapters = jax.tree.map(jnp.asarray, ADAPTERS)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state):
        value, grads = jax.value_and_grad(lambda a: loss({}, base, a, X))(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(30):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.6 * losses[0]
