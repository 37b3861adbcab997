"""`fp8jax.linen.Fp8`: the module's parameters and behaviour stay, its products run in FP8."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import fp8jax
from fp8jax import Rule, SiteScales, recipes
from fp8jax._state import find_site_scales
from fp8jax.linen import Fp8

TOKENS = jnp.arange(24).reshape(4, 6) % 11
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(x)))
        h = nn.Dropout(0.5, deterministic=not train)(h)
        return x + nn.Dense(16, name="down")(h), None


class Model(nn.Module):
    """Embedding tied to the head, scanned and rematerialized layers, attention, dropout, batch
    statistics.
    """

    def setup(self):
        self.embed = nn.Embed(11, 16)
        scanned = nn.scan(
            nn.remat(Block, static_argnums=(2,)),
            variable_axes={"params": 0},
            in_axes=(nn.broadcast,),
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        self.layers = scanned()
        self.attn = nn.MultiHeadDotProductAttention(2)
        self.norm = nn.BatchNorm()

    def __call__(self, tokens, train=True):
        x, _ = self.layers(self.embed(tokens), train)
        x = self.norm(self.attn(x), use_running_average=not train)
        self.sow("intermediates", "last", x)
        return self.embed.attend(x)


SITES = {
    "layers/up": (3,),
    "layers/down": (3,),
    "attn/query": (),
    "attn/key": (),
    "attn/value": (),
    "attn/out": (),
    "embed/embedding": (),
}


@pytest.fixture(scope="module")
def wrapped():
    model = Fp8(Model(), recipes.delayed())
    return model, jax.jit(model.init)(RNGS, TOKENS)


def test_parameters_are_those_of_the_wrapped_module(wrapped):
    _, variables = wrapped
    plain = jax.jit(Model().init)(RNGS, TOKENS)
    assert sorted(variables) == sorted([*plain, "fp8"])
    for name in plain:
        assert jax.tree.structure(plain[name]) == jax.tree.structure(variables[name])
    for ours, theirs in zip(
        jax.tree.leaves(variables["params"]), jax.tree.leaves(plain["params"]), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_sites_are_named_by_module_path_and_stacked_by_layer(wrapped):
    _, variables = wrapped
    assert {name: node.lhs.shape for name, node in variables["fp8"]["scales"].items()} == SITES
    assert all(name == node.site for name, node in variables["fp8"]["scales"].items())


def test_explain_lists_every_product(wrapped):
    model, variables = wrapped
    explanation = model.explain(variables, TOKENS, rngs=RNGS)
    assert {site.name: site.stack for site in explanation.sites if site.selected} == SITES
    assert [site.name for site in explanation.sites if not site.selected] == [
        "attn/data",
        "attn/data#1",
    ]
    abstract = jax.eval_shape(lambda: variables)
    assert (
        model.explain(abstract, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype), rngs=RNGS)
        == explanation
    )


def test_everything_but_the_products_is_bitwise_that_of_the_module(wrapped):
    _, variables = wrapped
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    skipped = Fp8(Model(), recipes.current(), (Rule(".*", None),))
    options = dict(rngs={"dropout": jax.random.key(7)}, mutable=["batch_stats", "intermediates"])
    for ours, theirs in zip(
        jax.tree.leaves(skipped.apply(variables, TOKENS, **options)),
        jax.tree.leaves(Model().apply(variables, TOKENS, **options)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_outputs_are_close_and_not_the_same(wrapped):
    model, variables = wrapped
    got = model.apply(variables, TOKENS, train=False)
    want = Model().apply(
        {name: variables[name] for name in ("params", "batch_stats")}, TOKENS, train=False
    )
    assert 0 < jnp.linalg.norm(got - want) < 0.15 * jnp.linalg.norm(want)


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")  # optax's Adam needs it.
def test_a_train_state_trains_and_moves_scales(wrapped):
    model, variables = wrapped
    stats = variables["batch_stats"]
    tx = fp8jax.with_delayed_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
    state = TrainState.create(
        apply_fn=model.apply, params={name: variables[name] for name in ("params", "fp8")}, tx=tx
    )

    @jax.jit
    def step(state, stats, key):
        def loss_of(trained):
            logits, updated = model.apply(
                {**trained, "batch_stats": stats},
                TOKENS,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean(), updated[
                "batch_stats"
            ]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), stats, loss

    losses = []
    for index in range(25):
        state, stats, loss = step(state, stats, jax.random.key(index))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    before, after = (
        variables["fp8"]["scales"]["layers/up"],
        state.params["fp8"]["scales"]["layers/up"],
    )
    assert not jnp.array_equal(before.grad, after.grad) and jnp.array_equal(
        after.grad, jnp.round(after.grad)
    )
    assert fp8jax.metrics.summary(state.opt_state, state.params)["fp8/unsealed"] == 0


class Head(nn.Module):
    """FP8 layers inside a larger module, one scanned, beside layers that are not."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 16)(tokens)
        x = Fp8(nn.Dense(16, name="first"), recipes.delayed())(x)
        scanned = nn.scan(
            Inner, variable_axes={"params": 0, "fp8": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scanned(name="layers")(x, None)
        return nn.Dense(4)(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.remat(Fp8)(nn.Dense(16, name="dense"), recipes.delayed())(x), None


@pytest.mark.thorough
def test_wrapped_submodules_keep_their_scales_beside_their_params():
    variables = Head().init(jax.random.key(0), TOKENS)
    assert sorted(variables["params"]) == ["Dense_0", "Embed_0", "first", "layers"]
    shapes = {node.site: node.lhs.shape for node in find_site_scales(variables["fp8"])}
    assert shapes == {"first": (), "layers/dense": (3,)}
    observed = jax.grad(lambda v: Head().apply(v, TOKENS).sum())(variables)["fp8"]
    kernel = variables["params"]["layers"]["dense"]["kernel"]
    (node,) = (node for node in find_site_scales(observed) if node.site == "layers/dense")
    np.testing.assert_array_equal(node.rhs, jnp.abs(kernel).max((1, 2)))


@pytest.mark.thorough
def test_scales_are_added_to_a_checkpoint_of_the_plain_module():
    params = Model().init(RNGS, TOKENS)
    model = Fp8(Model(), recipes.delayed())
    given = {name: params[name] for name in ("params", "batch_stats")}
    _, added = model.apply(given, TOKENS, train=False, mutable="fp8")
    assert {name: node.lhs.shape for name, node in added["fp8"]["scales"].items()} == SITES
    assert model.apply({**given, **added}, TOKENS, train=False).shape == (4, 6, 11)


class TwoMethods(nn.Module):
    def setup(self):
        self.inner = nn.Dense(8)
        self.head = nn.Dense(3)

    def encode(self, x):
        return nn.relu(self.inner(x))

    def __call__(self, x):
        return self.head(self.encode(x))


def test_other_methods_run_in_fp8_with_the_same_names():
    model, x = Fp8(TwoMethods(), recipes.delayed()), jax.random.normal(jax.random.key(1), (2, 4))
    variables = model.init(jax.random.key(0), x)
    assert sorted(variables["fp8"]["scales"]) == ["head", "inner"]
    encoded = model.apply(variables, x, method="encode")
    plain = TwoMethods().apply({"params": variables["params"]}, x, method="encode")
    assert 0 < jnp.linalg.norm(encoded - plain) < 0.1 * jnp.linalg.norm(plain)
    for method in (model.encode, TwoMethods.encode, TwoMethods().encode):
        assert bool((encoded == model.apply(variables, x, method=method)).all())
    assert bool(
        (model.apply(variables, x) == model.apply(variables, x, method=TwoMethods.__call__)).all()
    )
    assert list(model.init(jax.random.key(0), x, method=TwoMethods.encode)["fp8"]["scales"]) == [
        "inner"
    ]
    observed = jax.grad(lambda v: model.apply(v, x, method="encode").sum())(variables)["fp8"][
        "scales"
    ]
    assert float(observed["inner"].lhs) == float(jnp.abs(x).max()) and not observed["head"].lhs
    bound = model.bind(variables)
    assert bool((bound.encode(x) == encoded).all())
    with pytest.raises(AttributeError, match="decode"):
        model.apply(variables, x, method="decode")


class Embedder(nn.Module):
    def setup(self):
        self.table, self.noise, self.head = (
            nn.Embed(11, 4),
            nn.Dropout(0.5, deterministic=False),
            nn.Dense(3),
        )

    def embed(self, tokens):
        return self.noise(self.table(tokens))

    def __call__(self, tokens):
        return self.head(self.embed(tokens))


def test_a_method_without_a_product_just_runs():
    model = Fp8(Embedder(), recipes.delayed())
    variables = model.init(RNGS, TOKENS)
    want = Embedder().apply({"params": variables["params"]}, TOKENS, method="embed", rngs=RNGS)
    for switched in (model, model.clone(enabled=jnp.array(True))):
        np.testing.assert_array_equal(
            switched.apply(variables, TOKENS, method="embed", rngs=RNGS), want
        )
    observed = jax.grad(lambda v: model.apply(v, TOKENS, method="embed", rngs=RNGS).sum())(
        variables
    )["fp8"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(observed))


class Siamese(nn.Module):
    def setup(self):
        self.tower = Fp8(nn.Dense(8), recipes.delayed())

    def __call__(self, a, b):
        return self.tower(a).sum() + self.tower(b).sum() + self.tower(a).sum()


def test_a_wrapper_called_again_observes_the_largest():
    a, b = jnp.ones((2, 4)), jnp.full((2, 4), 3.0)
    variables = Siamese().init(jax.random.key(0), a, b)
    for gradient in (jax.grad, lambda fn: jax.jit(jax.grad(fn))):
        (node,) = find_site_scales(gradient(lambda v: Siamese().apply(v, a, b))(variables)["fp8"])
        assert (
            float(node.lhs) == 3.0
            and float(node.grad) == 1.0
            and float(node.seal[0]) ** 2 == pytest.approx(3.0)
        )


class Inside(nn.Module):
    """The wrapper called inside another transformation first, then outside of it."""

    def setup(self):
        self.tower = Fp8(nn.Dense(4), recipes.delayed())

    def __call__(self, x):
        return self.tower(nn.remat(lambda module, x: module.tower(x))(self, x))


def test_calls_in_different_traces_leak_nothing():
    x = jnp.ones((2, 4))
    variables = Inside().init(jax.random.key(0), x)
    assert jax.grad(lambda v: Inside().apply(v, x).sum())(variables)["params"]["tower"][
        "kernel"
    ].shape == (4, 4)
    bound = Inside().bind(variables)
    jax.jit(lambda x: bound(x))(x)
    assert bound(x).shape == (2, 4)


def test_mutable_collections_change_no_numbers():
    x = jax.random.normal(jax.random.key(1), (2, 4))
    for recipe in (recipes.current(), recipes.delayed()):
        model = Fp8(nn.Dense(3), recipe)
        variables = model.init(jax.random.key(0), x)
        got, _ = model.apply(variables, x, mutable=True)
        assert bool((got == model.apply(variables, x)).all())
        assert not jnp.array_equal(got, nn.Dense(3).apply({"params": variables["params"]}, x))


def test_a_recipe_with_state_and_every_site_left_out_is_the_plain_module():
    x = jnp.ones((2, 4))
    model = Fp8(nn.Dense(3), recipes.delayed(), (Rule(".*", None),))
    variables = model.init(jax.random.key(0), x)
    want = nn.Dense(3).apply({"params": variables["params"]}, x)
    assert bool((model.apply(variables, x) == want).all())


def test_tabulate_knows_the_wrapper():
    assert "inner" in Fp8(TwoMethods(), recipes.delayed()).tabulate(
        jax.random.key(0), jnp.ones((2, 4)), console_kwargs={"width": 200}
    )


def test_a_rule_for_a_site_that_a_method_does_not_reach():
    model = Fp8(TwoMethods(), recipes.delayed(), (Rule("head", None),))
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    assert model.apply(variables, jnp.ones((2, 4)), method="encode").shape == (2, 8)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, x))[
            1
        ]


def test_a_module_without_a_gradient_is_initialized():
    variables = Fp8(Decoder(), recipes.delayed()).init(jax.random.key(0), jnp.ones((2, 4)))
    (node,) = find_site_scales(variables)
    assert float(node.lhs) == -8.0


def test_state_dict_goes_there_and_back(wrapped):
    _, variables = wrapped
    moved = jax.tree.map(lambda leaf: leaf + 1.0, variables["fp8"])
    restored = serialization.from_bytes(variables["fp8"], serialization.to_bytes(moved))
    assert isinstance(restored["scales"]["embed/embedding"], SiteScales)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), restored, moved))
    with pytest.raises(
        ValueError,
        match="state at .* must have the fields .*'lhs'.* of the SiteScales there; got .* Restore "
        "it",
    ):
        state = serialization.to_state_dict(moved["scales"]["embed/embedding"])
        serialization.from_state_dict(
            variables["fp8"]["scales"]["embed/embedding"],
            {name: state[name] for name in state if name != "lhs"},
        )


def test_init_works_abstractly_and_without_jit():
    model = Fp8(nn.Dense(3), recipes.delayed())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 4)))
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda model, variables: model.apply({"params": variables["params"]}, jnp.ones((2, 4))),
            r"variables must hold the collection 'fp8' with the scales of Dense; got the "
            r"collections \['params'\]. Make it with init",
        ),
        (
            lambda model, variables: model.apply(
                {
                    **variables,
                    "fp8": {
                        "scales": {"other": variables["fp8"]["scales"]["dot"].replace(site="other")}
                    },
                },
                jnp.ones((2, 4)),
            ),
            "scales must hold every site that the arguments lead through; got none for dot",
        ),
        (
            lambda model, variables: model.apply(
                {**variables, "fp8": {"scales": {"dot": None}}}, jnp.ones((2, 4))
            ),
            "scales must hold every site that the arguments lead through; got none for dot",
        ),
        (
            lambda model, variables: model.apply(
                {**variables, "fp8": {"scales": {}}}, jnp.ones((2, 4))
            ),
            "scales must hold every site that the arguments lead through; got none for dot",
        ),
        (
            lambda model, variables: model.apply(
                {
                    **variables,
                    "fp8": {"scales": {"dot": variables["fp8"]["scales"]["dot"].replace(lhs=None)}},
                },
                jnp.ones((2, 4)),
            ),
            r"scales of site 'dot' must have lhs of float32\[\]; got None\. They are of another "
            r"model",
        ),
        (
            lambda model, variables: Fp8(
                nn.Dense(3), recipes.delayed(), (Rule("heads", None),)
            ).init(jax.random.key(0), jnp.ones((2, 4))),
            "pattern of a rule must match the name of a site; got 'heads'",
        ),
        (
            lambda model, variables: Fp8(Siamese(), recipes.delayed()).init(
                jax.random.key(0), jnp.ones((2, 4)), jnp.ones((2, 4))
            ),
            "collection 'fp8' must be mutable while scales of Dense are made; .* inside another "
            "Fp8, or holds one: wrap either",
        ),
        (
            lambda model, variables: model.init(
                jax.random.key(0), jnp.ones((2, 4)), mutable=["params"]
            ),
            "got it immutable. Call init without `mutable`",
        ),
        (
            lambda model, variables: Fp8(nn.LayerNorm(), recipes.delayed()).init(
                jax.random.key(0), jnp.ones((2, 4))
            ),
            "fn must have a product to run in FP8",
        ),
    ],
)
def test_errors(make, text):
    model = Fp8(nn.Dense(3), recipes.delayed())
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=text):
        make(model, variables)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((nn.Dense, recipes.delayed()), "module must be a linen Module; got .*Make one"),
        ((nn.Dense(3), "delayed"), "recipe must be a Recipe; got 'delayed'"),
        ((nn.Dense(3), recipes.delayed(), None), "rules must be a sequence of Rule; got None"),
    ],
)
def test_fields_of_another_type_are_refused(arguments, text):
    with pytest.raises(TypeError, match=text):
        Fp8(*arguments)


def test_rules_may_be_a_list():
    model = Fp8(nn.Dense(3), fp8jax.recipes.current(), rules=[fp8jax.Rule("nothing", None)])
    assert model.rules == (fp8jax.Rule("nothing", None),) and hash(model) == hash(model.clone())
