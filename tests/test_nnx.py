"""`fp8jax.nnx.Fp8`: the wrapped module stays as it was, its products run in FP8, through NNX's own
transformations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiers import thorough_but

import fp8jax
from fp8jax import Rule, recipes
from fp8jax._observe import largest_amax, seal_fits
from fp8jax.nnx import Fp8, Fp8Scale

TOKENS = jnp.arange(24).reshape(4, 6) % 11
X = jax.random.normal(jax.random.key(5), (6, 16))
TRAINED = nnx.Any(nnx.Param, Fp8Scale)
WRT = nnx.DiffState(0, TRAINED)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Model(nnx.Module):
    """Embedding tied to the head, a list of layers and a stack of them, attention, dropout, batch
    statistics.
    """

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.first = nnx.List([Block(rngs), Block(rngs)])
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)
        self.attn = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def encode(self, tokens, rngs):
        x = self.embed(tokens)
        for block in self.first:
            x = block(x)
        run = nnx.scan(
            nnx.remat(lambda x, block: block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        with jax.named_scope("attention"):
            return self.dropout(self.norm(self.attn(run(x, self.layers))), rngs=rngs)

    def __call__(self, tokens, rngs=None):
        return self.embed.attend(self.encode(tokens, rngs))


SITES = {
    "first/0/up": (),
    "first/0/down": (),
    "first/1/up": (),
    "first/1/down": (),
    "layers/up": (3,),
    "layers/down": (3,),
    "attn/query": (),
    "attn/key": (),
    "attn/value": (),
    "attn/out": (),
    "embed/embedding": (),
}


def make(recipe=recipes.delayed(), rules=()):
    return Fp8(Model(nnx.Rngs(0)), recipe, rules)


def made(module, *args, **options):
    model = Fp8(module, recipes.delayed(), **options)
    model.init_scales(*args)
    return model


def observed(grads, site="dot", at=lambda grads: grads["scales"]):
    return at(grads)[site]


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_amax(node, **amaxes):
    for name, amax in amaxes.items():
        np.testing.assert_array_equal(getattr(node, name), amax)
    assert seal_fits(jnp.stack([node.lhs, node.rhs, node.grad], axis=-1), node.seal).all()


def test_sites_are_named_by_path_and_stacked_by_layer():
    explanation = make().explain(jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype), rngs=nnx.Rngs(1))
    assert {site.name: site.stack for site in explanation.sites if site.selected} == SITES
    assert [site.name for site in explanation.sites if not site.selected] == [
        "attn/data",
        "attn/data#1",
    ]
    abstract = nnx.eval_shape(make)
    assert abstract.explain(TOKENS, rngs=nnx.Rngs(1)) == explanation
    prefixed = Fp8(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), recipes.current(), name="decoder/head")
    assert [site.name for site in prefixed.explain(X).sites] == ["decoder/head"]


def test_everything_but_the_products_is_bitwise_that_of_the_module():
    """Outputs, batch statistics, and the counts of random keys, those of the arguments included."""
    plain, model = Model(nnx.Rngs(0)), make(recipes.current(), [Rule(".*", None)])
    ours, theirs = nnx.Rngs(1), nnx.Rngs(1)
    call = nnx.jit(lambda model, rngs: model(TOKENS, rngs=rngs))
    for _ in range(2):
        np.testing.assert_array_equal(call(model, ours), call(plain, theirs))
    assert theirs.dropout.count == ours.dropout.count == 2
    assert (model.module.norm.mean[...] != 0).any()
    assert_equal(
        nnx.to_pure_dict(nnx.state(model.module, nnx.Not(nnx.RngState))),
        nnx.to_pure_dict(nnx.state(plain, nnx.Not(nnx.RngState))),
    )
    assert type(model.module.first[0]) is Block and type(model.module) is Model


@jax.numpy_dtype_promotion("standard")  # optax's Adam needs it.
def test_an_optimizer_trains_and_moves_scales_as_the_plain_function_does():
    """The same numbers, step by step, from `fp8jax.fp8` on arrays; and other ones unquantized."""

    def loss_fn(model, x, y):
        return jnp.square(model(x) - y).mean()

    tx = fp8jax.with_delayed_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
    model = made(Block(nnx.Rngs(0)), X)
    optimizer = nnx.Optimizer(model, tx, wrt=TRAINED)
    graphdef, params = nnx.split(model.module)
    function = fp8jax.fp8(
        lambda params, x, y: loss_fn(nnx.merge(graphdef, params), x, y), recipes.delayed()
    )
    sites = {"up": "up", "down": "down"}
    trained = {
        "scales": {site: model.scales[name].replace(site=site) for site, name in sites.items()},
        "params": params,
    }
    opt_state = tx.init(trained)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(loss_fn, argnums=WRT)(model, x, y)
        optimizer.update(model, grads)
        return loss

    @jax.jit
    def plain_step(trained, opt_state, x, y):
        loss, grads = jax.value_and_grad(
            lambda trained: function(trained["scales"], trained["params"], x, y)
        )(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, loss

    first, losses = model.scales["up"], []
    for index in range(8):
        x = jax.random.normal(jax.random.key(index), X.shape) * 2.0**index
        trained, opt_state, want = plain_step(trained, opt_state, x, jnp.tanh(x))
        losses.append(step(model, optimizer, x, jnp.tanh(x)))
        assert losses[-1] == want
    for site, name in sites.items():
        assert_equal(model.scales[name].scales(), trained["scales"][site].scales())
    assert not jnp.array_equal(first.lhs, model.scales["up"].lhs)
    summary = fp8jax.metrics.summary(nnx.as_pure(optimizer.opt_state), nnx.state(model, Fp8Scale))
    assert summary["fp8/unsealed"] == 0 and summary["fp8/observed"] == 8 * 2 * 3
    for scales in (model, nnx.state(model), nnx.state(model, TRAINED)):
        assert fp8jax.metrics.summary(optimizer.opt_state, scales) == summary
        assert fp8jax.metrics.summary(optimizer, scales) == summary
    assert losses[0] != loss_fn(
        Block(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), X.shape), jnp.tanh(X)
    )


def test_nnx_defaults_take_the_scales_along():
    """`nnx.grad` and `wrt=nnx.Param` as every NNX program has them. Before, the scales stayed
    behind in silence, where only one of the two named them.
    """

    def loss_fn(model, x):
        return jnp.square(model(x) - 1).mean()

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        return loss

    def trained(tx):
        model = made(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), X)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        return model, [float(step(model, optimizer, 2.0**12 * X)) for _ in range(4)]

    model, losses = trained(fp8jax.with_delayed_scaling(optax.sgd(1e-9)))
    scales = model.scales["dot"]
    amax = float(jnp.abs(2.0**12 * X).max())
    assert scales.lhs == fp8jax._scaling.exponent_from_amax(jnp.float32(amax), fp8jax.E4M3)
    plain = loss_fn(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), 2.0**12 * X)
    assert np.isfinite(losses).all() and abs(losses[-1] / plain - 1) < 0.1
    # An optimizer that takes exponents for weights is heard of at the next call.
    assert np.isnan(trained(optax.sgd(1e-4))[1][1:]).all()


def test_gradients_which_would_lose_the_amaxes_are_refused():
    model = made(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), X)
    weights = nnx.DiffState(0, nnx.All(nnx.Param, nnx.Not(Fp8Scale)))
    for transform in (
        lambda f: nnx.grad(f, argnums=weights),
        lambda f: nnx.jit(nnx.grad(nnx.jit(nnx.remat(f)), argnums=weights)),
    ):
        with pytest.raises(
            ValueError,
            match=r"gradients with respect to the parameters must come with those of the "
            r"scales.*DiffState",
        ):
            transform(lambda model, x: model(x).sum())(model, X)
    graphdef, state = nnx.split(model)
    for transform in (jax.jacfwd, lambda f: lambda state: jax.jvp(f, (state,), (state,))):
        with pytest.raises(
            NotImplementedError, match="functions in FP8 have reverse-mode derivatives only"
        ):
            transform(lambda state: nnx.merge(graphdef, state)(X))(state)
    got = nnx.grad(lambda model, x: model(x).sum(), argnums=1)(
        model, X
    )  # Of inputs alone: nothing is trained.
    assert jnp.isfinite(got).all() and (got != 0).any()
    without_state = Fp8(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), recipes.current())
    assert nnx.grad(lambda model, x: model(x).sum())(without_state, X)["module"][
        "kernel"
    ].get_value().shape == (16, 4)


class Inner(nnx.Module):
    """An FP8 layer that is a part of a larger module."""

    def __init__(self, rngs):
        self.dense = made(nnx.Linear(16, 16, rngs=rngs), jnp.ones((2, 16)))

    def __call__(self, x):
        return nnx.relu(self.dense(x))


@nnx.jit
def stack(key):
    return nnx.vmap(lambda key: Inner(nnx.Rngs(key)))(jax.random.split(key, 3))


def test_wrappers_inside_scanned_and_rematerialized_layers_observe_each_layer():
    layers, body = stack(jax.random.key(0)), nnx.remat(lambda x, layer: layer(x))

    def loss(layers, x):
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers).sum()

    node = observed(
        nnx.jit(nnx.grad(loss, argnums=WRT))(layers, X), at=lambda grads: grads["dense"]["scales"]
    )
    (graphdef, state), apply = nnx.split(layers), nnx.jit(lambda layer, x: layer(x))
    x, amaxes = X, []
    for index in range(3):
        amaxes.append(jnp.abs(x).max())
        x = apply(nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state)), x)
    assert_amax(
        node, lhs=jnp.stack(amaxes), rhs=jnp.abs(layers.dense.module.kernel[...]).max((1, 2))
    )
    assert (node.grad > 0).all()


def test_an_ensemble_has_scales_of_its_own_and_a_batch_shares_them():
    members = stack(jax.random.key(1))
    x = jnp.stack([X, 3 * X, 100 * X])
    loss = nnx.grad(
        lambda members, x: nnx.vmap(lambda member, x: member(x))(members, x).sum(), argnums=WRT
    )
    grads = nnx.jit(loss)(members, x)
    assert_amax(
        observed(grads, at=lambda grads: grads["dense"]["scales"]), lhs=jnp.abs(x).max((1, 2))
    )

    shared = Inner(nnx.Rngs(0))
    loss = nnx.grad(
        lambda model, x: nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, x).sum(),
        argnums=WRT,
    )
    grads = nnx.jit(loss)(shared, x)
    assert_amax(observed(grads, at=lambda grads: grads["dense"]["scales"]), lhs=jnp.abs(x).max())


def test_a_wrapper_called_twice_merges_by_max():
    model = Inner(nnx.Rngs(0))
    grads = nnx.jit(nnx.grad(lambda model: (model(X) + model(7 * X)).sum(), argnums=WRT))(model)
    assert_amax(
        observed(grads, at=lambda grads: grads["dense"]["scales"]),
        lhs=7 * jnp.abs(X).max(),
        grad=1.0,
    )


class Twice(nnx.Module):
    """A layer called twice, each call transformed by itself."""

    def __init__(self, layer, transform):
        self.layer, self.transform = layer, transform

    def __call__(self, x):
        call = self.transform(lambda layer, x: layer(x))
        return call(self.layer, 5 * jnp.tanh(call(self.layer, x)))


def cond(call):
    return lambda layer, x: nnx.cond(True, call, call, layer, x)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "transform", thorough_but({"remat": nnx.remat, "jit": nnx.jit, "cond": cond}, ["remat"])
)
def test_transformed_calls_of_one_wrapper_add_and_a_wrapper_around_them_is_exact(
    transform,
):
    def grads(model):
        return nnx.jit(nnx.grad(lambda model: model(X).sum(), argnums=WRT))(model)

    node = observed(
        grads(Twice(made(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), X), transform)),
        at=lambda grads: grads["layer"]["scales"],
    )
    added = jnp.stack([node.lhs, node.rhs, node.grad], axis=-1)
    assert not seal_fits(added, node.seal).any() and node.uses == 2
    found, fits = largest_amax(added, node.seal, node.uses)
    kernel = made(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), X).module.kernel[...]
    assert fits.all() and found[0] > 0.999 * jnp.abs(X).max()
    np.testing.assert_allclose(found[1], jnp.abs(kernel).max(), rtol=1e-5)

    model = made(Twice(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), transform), X)
    nodes = list(grads(model)["scales"].values())
    for node in nodes:
        assert seal_fits(jnp.stack([node.lhs, node.rhs, node.grad], axis=-1), node.seal).all()
    assert jnp.abs(X).max() in [node.lhs for node in nodes] and len(nodes) > 1
    assert {float(node.rhs) for node in nodes} <= {
        0.0,
        float(jnp.abs(model.module.layer.kernel[...]).max()),
    }


def test_split_and_merged_it_is_a_pytree_for_jax(tmp_path):
    """And Orbax writes and reads its state."""
    model = made(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), X)
    graphdef, trained, rest = nnx.split(model, TRAINED, ...)
    grads = jax.jit(jax.grad(lambda trained: nnx.merge(graphdef, trained, rest)(X).sum()))(trained)
    assert_amax(observed(grads), lhs=jnp.abs(X).max(), rhs=jnp.abs(model.module.kernel[...]).max())

    state = nnx.to_pure_dict(nnx.state(model))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert_equal(restored, state)
    other, apply = (
        made(nnx.Linear(16, 4, rngs=nnx.Rngs(9)), 100 * X),
        nnx.jit(lambda model, x: model(x)),
    )
    assert (apply(other, X) != apply(model, X)).any()
    nnx.update(other, restored)
    np.testing.assert_array_equal(apply(other, X), apply(model, X))


class Autoencoder(nnx.Module):
    def __init__(self, rngs):
        self.encoder, self.decoder = nnx.Linear(16, 8, rngs=rngs), nnx.Linear(8, 16, rngs=rngs)

    def encode(self, x):
        return nnx.relu(self.encoder(x))

    def __call__(self, x):
        return self.decoder(self.encode(x))


def test_other_methods_run_in_fp8_on_scales_they_share():
    model, plain = Fp8(Autoencoder(nnx.Rngs(0)), recipes.delayed()), Autoencoder(nnx.Rngs(0))
    model.init_scales(X, method="encode")
    assert list(model.scales) == ["encoder"]
    model.init_scales(X)
    assert list(model.scales) == ["decoder", "encoder"]
    encode = nnx.jit(lambda model, x: model.encode(x))
    got, want = encode(model, X), encode(plain, X)
    assert 0 < jnp.linalg.norm(got - want) < 0.1 * jnp.linalg.norm(want)
    with pytest.raises(
        AttributeError, match=r"Fp8 has no attribute 'decoder', .* what is inside is at \.module"
    ):
        model.decoder


class Decoder(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.attn = (
            nnx.Embed(11, 16, rngs=rngs),
            nnx.MultiHeadAttention(2, 16, decode=True, rngs=rngs),
        )

    def start(self, tokens):
        self.attn.init_cache((*tokens.shape, 16))
        return self.embed(tokens)

    def __call__(self, x):
        return self.attn(x)


@pytest.mark.thorough
def test_a_method_without_a_product_just_runs_before_scales_are_made_too():
    model, plain = Fp8(Decoder(), recipes.delayed()), Decoder()
    for _ in range(2):
        np.testing.assert_array_equal(model.start(TOKENS), plain.start(TOKENS))
        assert_equal(nnx.to_pure_dict(nnx.state(model.module)), nnx.to_pure_dict(nnx.state(plain)))
        model.init_scales(X[:4, None])
        assert (
            jnp.isfinite(model(X[:4, None])).all()
            and model.module.attn.cache_index.get_value() == 1
        )
    with pytest.raises(ValueError, match="fn must have a product to run in FP8"):
        model.init_scales(TOKENS, method="start")


def test_tabulate_lists_the_wrapped_module():
    model = made(Block(nnx.Rngs(0)), X)
    for _ in range(2):
        table = nnx.tabulate(model, X, console_kwargs={"width": 200, "force_terminal": False})
        assert (
            all(f" {path} " in table for path in ("module", "module/up", "module/down"))
            and "Fp8Scale" in table
        )
        assert (model(X) != model.module(X)).any()


def test_fp8_is_switched_at_run_time_and_observed_in_either_case():
    model, plain = made(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), X), nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    traces = []

    @nnx.jit
    def value_and_grads(model, x, enabled):
        traces.append(enabled)
        return nnx.value_and_grad(lambda model: model.when(enabled)(x).sum(), argnums=WRT)(model)

    (off, grads), (on, _) = (
        value_and_grads(model, 3 * X, False),
        value_and_grads(model, 3 * X, True),
    )
    assert len(traces) == 1 and on == nnx.jit(lambda model: model(3 * X).sum())(model) != off
    assert off == nnx.jit(lambda model: model(3 * X).sum())(plain)
    assert_amax(
        observed(grads), lhs=3 * jnp.abs(X).max(), rhs=jnp.abs(plain.kernel[...]).max(), grad=1.0
    )


def test_small_products_and_what_rules_leave_out_stay_as_they_are():
    plain = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    small = Fp8(plain, recipes.current(), min_flops=1e6).explain(X).sites
    assert not small[0].selected and "min_flops" in small[0].reason
    without = Fp8(plain, recipes.delayed(), [Rule(".*", None)])
    without.init_scales(X)
    np.testing.assert_array_equal(without(X), plain(X))


class Counting(nnx.Module):
    def __init__(self):
        self.dense, self.calls = nnx.Linear(16, 4, rngs=nnx.Rngs(0)), 0

    def __call__(self, x, count=False):
        self.calls += count
        y = self.dense(x)
        if not count:
            self.sow(nnx.Intermediate, "y", y)
        return y


def test_intermediates_come_out():
    model = Fp8(Counting(), recipes.current())
    y, intermediates = nnx.capture(model, nnx.Intermediate)(X)
    np.testing.assert_array_equal(intermediates["module"]["y"].get_value()[0], y)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: Fp8(lambda x: x, recipes.current()),
            TypeError,
            r"module must be a flax.nnx.Module; got function\. Wrap",
        ),
        (lambda: Fp8(Counting(), "delayed"), TypeError, r"recipe must be a Recipe; got 'delayed'"),
        (
            lambda: Fp8(Counting(), recipes.current(), min_flops=-1),
            ValueError,
            r"min_flops must be a number of operations, 0 or more; got -1",
        ),
        (
            lambda: Fp8(Inner(nnx.Rngs(0)), recipes.current()),
            ValueError,
            r"module must hold no other Fp8; got one inside Inner",
        ),
        (
            lambda: Fp8(Block(nnx.Rngs(0)), recipes.delayed())(X),
            ValueError,
            r"scales of Block must be made before .* model.init_scales\(\*args\)",
        ),
        (
            lambda: Fp8(Counting(), recipes.current())(X, count=True),
            ValueError,
            r"attributes of Counting that are no variables must stay",
        ),
        (
            lambda: Fp8(Block(nnx.Rngs(0)), recipes.delayed(), [Rule("upp", None)]).init_scales(X),
            ValueError,
            r"'upp', which matches none.*up, down",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_for_the_tools_takes_the_state_of_the_module_inside():
    """And says so where it gets that of the wrapper, whose paths are others, or all variables."""
    model = fp8jax.nnx.Fp8(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), recipes.delayed())
    x = jnp.ones((2, 4))
    model.init_scales(x)
    measure = fp8jax.metrics.monitor(model.as_function(lambda module, x: module(x).sum()))
    scales = nnx.state(model, fp8jax.nnx.Fp8Scale)
    (site,) = measure(scales, nnx.state(model.module, nnx.Param), x).sites
    assert site.forward > 20
    with pytest.raises(ValueError, match=r"params must be nnx.state\(model.module, nnx.Param\)"):
        measure(scales, nnx.state(model), x)


def test_its_state_goes_through_a_pure_dict():
    model = made(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), X)
    state = nnx.state(model)
    other = nnx.state(made(nnx.Linear(16, 4, rngs=nnx.Rngs(1)), 8 * X))
    nnx.replace_by_pure_dict(other, nnx.to_pure_dict(state))
    assert_equal(nnx.to_pure_dict(other), nnx.to_pure_dict(state))
    assert float(other["scales"]["dot"].lhs) == float(model.scales["dot"].lhs)
