"""Whole models in Flax Linen's style: decoding from a cache, an LSTM over time, a network of
convolutions with batch statistics.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jaxprs import bodies_on_one_platform

import fp8jax
from fp8jax import Rule, _shims, recipes
from fp8jax._observe import seal_fits
from fp8jax.linen import Fp8

pytestmark = pytest.mark.thorough

WORDS, WIDTH = 11, 16
# Compiled in half the time: these programs run a few times.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@pytest.fixture(autouse=True)
def flax_and_optax_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def without_scales(variables):
    return {name: collection for name, collection in variables.items() if name != "fp8"}


def are_quantized(got, plain):
    return 0 < jnp.linalg.norm(got - plain) < 0.2 * jnp.linalg.norm(plain)


# --- an encoder and a decoder that keeps its keys and values
# ---------------------------------------------------------


class DecoderLayer(nn.Module):
    cached: bool

    @nn.compact
    def __call__(self, x, encoded, mask):
        x = x + nn.MultiHeadAttention(2, decode=self.cached, name="own")(
            nn.LayerNorm()(x), mask=mask
        )
        x = x + nn.MultiHeadAttention(2, name="across")(x, encoded)
        return x + nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(2 * WIDTH, name="up")(x)))


class Translator(nn.Module):
    """Called as a whole, or by `encode` once and `decode` for each further word."""

    cached: bool = False

    def setup(self):
        self.embed = nn.Embed(WORDS, WIDTH)
        self.attention = nn.MultiHeadAttention(2)
        self.decoder = DecoderLayer(self.cached)
        self.head = nn.Dense(WORDS)

    def encode(self, inputs):
        x = self.embed(inputs)
        return x + self.attention(x)

    def decode(self, encoded, targets):
        mask = None if self.cached else nn.make_causal_mask(targets)
        return self.head(self.decoder(self.embed(targets), encoded, mask))

    def __call__(self, inputs, targets):
        return self.decode(self.encode(inputs), targets)


ATTENTION = ("query", "key", "value", "out")
ENCODER_SITES = {f"attention/{name}" for name in ATTENTION}
DECODER_SITES = {f"decoder/{which}/{name}" for which in ("own", "across") for name in ATTENTION} | {
    "decoder/up",
    "decoder/down",
    "head",
}
INPUTS = jax.random.randint(jax.random.key(0), (3, 5), 0, WORDS)
TARGETS = jax.random.randint(jax.random.key(1), (3, 6), 0, WORDS)
WHOLE, CACHED = (
    Fp8(Translator(), recipes.delayed()),
    Fp8(Translator(cached=True), recipes.delayed()),
)


@pytest.fixture(scope="module")
def translator():
    with jax.numpy_dtype_promotion("standard"):
        return jit(CACHED.init)(jax.random.key(2), INPUTS, TARGETS)


def test_an_empty_cache_and_all_scales_come_from_init(translator):
    assert sorted(translator) == ["cache", "fp8", "params"]
    assert translator["cache"]["decoder"]["own"]["cached_key"].shape == (3, 6, 2, 8)
    assert not any(leaf.any() for leaf in jax.tree.leaves(translator["cache"]))
    assert set(translator["fp8"]["scales"]) == ENCODER_SITES | DECODER_SITES
    whole = jax.eval_shape(WHOLE.init, jax.random.key(2), INPUTS, TARGETS)
    assert jax.tree.structure(whole["fp8"]) == jax.tree.structure(translator["fp8"])


def test_decoding_from_the_cache_gives_the_logits_of_the_whole(translator):
    """Scales are given, so each value has its code whatever it is cast beside: the same products,
    the same logits.
    """
    trained = {name: translator[name] for name in ("params", "fp8")}
    whole = jit(WHOLE.apply)(trained, INPUTS, TARGETS)
    plain = jit(Translator().apply)({"params": trained["params"]}, INPUTS, TARGETS)
    assert are_quantized(whole, plain)
    encoded = jit(lambda variables: WHOLE.apply(variables, INPUTS, method="encode"))(trained)
    step = jit(
        lambda variables, word: CACHED.apply(
            variables, encoded, word, method="decode", mutable=["cache"]
        )
    )

    def differs(keep):
        cache, logits = translator["cache"], []
        for index in range(TARGETS.shape[1]):
            out, updated = step({**trained, "cache": cache}, TARGETS[:, index : index + 1])
            cache = updated["cache"] if keep else cache
            logits.append(out)
        return jnp.linalg.norm(jnp.concatenate(logits, axis=1) - whole), cache

    difference, cache = differs(keep=True)
    assert cache["decoder"]["own"]["cache_index"] == TARGETS.shape[1]
    assert difference < 1e-5 * jnp.linalg.norm(whole) < 1e-3 * jnp.linalg.norm(whole - plain)
    assert differs(keep=False)[0] > jnp.linalg.norm(whole - plain)


@pytest.mark.parametrize(
    ("method", "arguments", "sites"),
    [
        ("encode", (INPUTS,), ENCODER_SITES),
        ("decode", (jax.ShapeDtypeStruct((3, 5, WIDTH), jnp.float32), TARGETS), DECODER_SITES),
        ("__call__", (INPUTS, TARGETS), ENCODER_SITES | DECODER_SITES),
    ],
)
def test_each_method_needs_the_scales_of_its_own_sites(translator, method, arguments, sites):
    def apply(scales):
        return jax.eval_shape(
            lambda *args: WHOLE.apply(
                {"params": translator["params"], "fp8": {"scales": scales}}, *args, method=method
            ),
            *arguments,
        )

    own = {name: translator["fp8"]["scales"][name] for name in sites}
    assert apply(own).dtype == jnp.float32
    for missing in sites:
        with pytest.raises(ValueError, match=f"got none for {missing}\\."):
            apply({name: node for name, node in own.items() if name != missing})


@pytest.mark.slow
def test_a_translator_trains(translator):
    tx = fp8jax.with_delayed_scaling(optax.adam(1e-2))
    state = TrainState.create(
        apply_fn=WHOLE.apply, params={name: translator[name] for name in ("params", "fp8")}, tx=tx
    )

    def loss_of(apply, trained):
        logits = apply(trained, INPUTS, TARGETS)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], TARGETS[:, 1:]
        ).mean()

    @jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda trained: loss_of(state.apply_fn, trained))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss, grads

    exact = jit(jax.grad(lambda params: loss_of(Translator().apply, {"params": params})))(
        translator["params"]
    )
    losses = []
    for index in range(20):
        state, loss, grads = step(state)
        losses.append(float(loss))
        if not index:
            difference = jax.tree.map(jnp.subtract, grads["params"], exact)
            assert 0.01 < optax.tree.norm(difference) / optax.tree.norm(exact) < 0.3
    assert losses[-1] < 0.7 * losses[0]
    counters = fp8jax.metrics.summary(state.opt_state, state.params)
    assert counters["fp8/observed"] == 20 * 3 * len(ENCODER_SITES | DECODER_SITES)
    assert counters["fp8/unsealed"] == counters["fp8/nonfinite"] == 0


# --- a recurrent network whose weights are the same at each step
# -----------------------------------------------------

STEPS, FEATURES, HIDDEN = 5, 8, 8
SEQUENCES = (
    jax.random.normal(jax.random.key(4), (4, STEPS, FEATURES))
    * jnp.linspace(0.3, 2.0, STEPS)[None, :, None]
)
CELL = Fp8(nn.OptimizedLSTMCell(HIDDEN), recipes.delayed())


class OverTime(nn.Module):
    """The cell inside of a scan of Flax's own, rather than in `nn.RNN`."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda cell, carry, x: cell(carry, x),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        cell = nn.OptimizedLSTMCell(HIDDEN, name="cell")
        return scan(cell, cell.initialize_carry(jax.random.key(0), x[:, 0].shape), x)[1]


def loss_of_sequence(y):
    return jnp.square(y - 0.3).mean(axis=(0, 2))


def test_an_lstm_observes_the_largest_amaxes_of_all_steps():
    """The oracle: the cell called step by step, in a Python loop, with scales of its own at each
    step.
    """
    model = Fp8(nn.RNN(nn.OptimizedLSTMCell(HIDDEN)), recipes.delayed())
    variables = jit(model.init)(jax.random.key(5), SEQUENCES)
    scales = variables["fp8"]["scales"]
    assert [site.name for site in model.explain(variables, SEQUENCES).sites] == list(scales)
    assert sorted(scales) == [
        "cell/cell:cell/hf",
        "cell/cell:cell/if",
    ]  # The first of the four gates whose kernels are one in the product.

    def loss(variables):
        outputs = model.apply(variables, SEQUENCES)
        return loss_of_sequence(outputs).sum(), outputs

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    step = jax.jit(CELL.apply)
    own = {name.rpartition("/")[2]: node for name, node in scales.items()}
    own = {name: node.replace(site=name) for name, node in own.items()}

    def unrolled(scales, params):
        carry, losses, outputs = (jnp.zeros((4, HIDDEN)),) * 2, [], []
        for index in range(STEPS):
            carry, y = step(
                {"params": params, "fp8": {"scales": scales[index]}}, carry, SEQUENCES[:, index]
            )
            losses.append(jnp.square(y - 0.3).mean())
            outputs.append(y)
        return sum(losses), jnp.stack(outputs, 1)

    (each, want), want_outputs = jax.grad(unrolled, argnums=(0, 1), has_aux=True)(
        [own] * STEPS, variables["params"]["cell"]
    )
    np.testing.assert_array_equal(outputs, want_outputs)
    for name, node in grads["fp8"]["scales"].items():
        found = [seen[name.rpartition("/")[2]] for seen in each]
        assert len({float(one.lhs) for one in found}) == STEPS
        for operand in ("lhs", "rhs", "grad"):
            assert float(getattr(node, operand)) == max(
                float(getattr(one, operand)) for one in found
            ), (name, operand)
        assert bool(seal_fits(jnp.stack([node.lhs, node.rhs, node.grad]), node.seal).all())
    for got, true in zip(
        jax.tree.leaves(grads["params"]["cell"]), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(got, true, rtol=1e-4, atol=1e-6)


def test_an_lstm_casts_its_weights_in_front_of_the_loop():
    model = Fp8(nn.RNN(nn.OptimizedLSTMCell(HIDDEN)), recipes.delayed())
    shapes = jax.eval_shape(model.init, jax.random.key(5), SEQUENCES)

    def casts(jaxpr, inside):
        for equation in _shims.open_jaxpr(jaxpr)[0].eqns:
            if (
                equation.params.get("new_dtype") == jnp.uint8
                and equation.invars[0].aval.dtype == jnp.uint32
            ):
                yield equation.outvars[0].aval.shape, inside
            for inner in bodies_on_one_platform(equation):
                yield from casts(inner, inside or equation.primitive.name == "scan")

    found = list(casts(jax.make_jaxpr(model.apply)(shapes, SEQUENCES), False))
    weight = (HIDDEN, 4 * HIDDEN)
    assert found.count((weight, False)) == 2 and found.count((weight, True)) == 0
    assert found.count(((4, HIDDEN), True)) == 2  # the cast of what a step reads


def test_an_lstm_trains():
    model = Fp8(OverTime(), recipes.delayed())
    variables = jit(model.init)(jax.random.key(5), SEQUENCES)
    state = TrainState.create(
        apply_fn=model.apply, params=variables, tx=fp8jax.with_delayed_scaling(optax.adam(3e-2))
    )

    @jit
    def step(state):
        loss, grads = jax.value_and_grad(
            lambda v: loss_of_sequence(state.apply_fn(v, SEQUENCES)).mean()
        )(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(20):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert fp8jax.metrics.summary(state.opt_state, state.params)["fp8/unsealed"] == 0


# --- convolutions, batch statistics and a head
# -----------------------------------------------------------------------


class ResidualBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = lambda y: nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)
        y = norm(nn.Conv(8, (3, 3), use_bias=False, name="first")(x))
        y = norm(nn.Conv(8, (3, 3), use_bias=False, name="second")(nn.relu(y)))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), (2, 2), name="stem")(x)
        for index in range(2):
            x = ResidualBlock(name=f"block_{index}")(x, train)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class ResNetState(TrainState):
    batch_stats: dict


LABELS = jnp.arange(16) % 4
IMAGES = (
    jax.random.normal(jax.random.key(6), (16, 8, 8, 3))
    + jax.random.normal(jax.random.key(7), (4, 8, 8, 3))[LABELS]
)
RESNET_SITES = [
    "stem",
    "block_0/first",
    "block_0/second",
    "block_1/first",
    "block_1/second",
    "head",
]
RESNET = Fp8(ResNet(), recipes.delayed())


@pytest.fixture(scope="module")
def resnet():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jit(RESNET.init)(jax.random.key(8), IMAGES)


def test_convolutions_and_the_head_are_sites(resnet):
    assert sorted(resnet["fp8"]["scales"]) == sorted(RESNET_SITES)
    sites = RESNET.explain(resnet, IMAGES).sites
    assert [(site.name, site.product) for site in sites] == [
        *((name, "conv_general_dilated") for name in RESNET_SITES[:-1]),
        ("head", "dot_general"),
    ]
    assert all(site.selected for site in sites)


def test_batch_statistics_are_updated_as_in_the_plain_module(resnet):
    def update(model, variables):
        return jit(
            lambda v: model.apply(
                v,
                IMAGES,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
            )
        )(variables)

    plain = without_scales(resnet)
    _, want = update(ResNet(), plain)
    _, skipped = update(Fp8(ResNet(), recipes.current(), [Rule(".*", None)]), plain)
    jax.tree.map(np.testing.assert_array_equal, skipped, want)
    _, got = update(RESNET, resnet)
    for block in ("block_0", "block_1"):
        for conv, norm in (("first", "BatchNorm_0"), ("second", "BatchNorm_1")):
            (read,) = got["intermediates"][block][conv]["__call__"]
            before, after = (stats["batch_stats"][block][norm] for stats in (resnet, got))
            np.testing.assert_allclose(
                after["mean"],
                0.9 * before["mean"] + 0.1 * read.mean((0, 1, 2)),
                rtol=1e-4,
                atol=1e-6,
            )
            np.testing.assert_allclose(
                after["var"], 0.9 * before["var"] + 0.1 * read.var((0, 1, 2)), rtol=1e-4, atol=1e-6
            )
            assert are_quantized(read, want["intermediates"][block][conv]["__call__"][0])


def test_a_resnet_trains(resnet):
    state = ResNetState.create(
        apply_fn=RESNET.apply,
        params={name: resnet[name] for name in ("params", "fp8")},
        batch_stats=resnet["batch_stats"],
        tx=fp8jax.with_delayed_scaling(
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
        ),
    )

    @jit
    def step(state):
        def loss_of(trained):
            logits, updated = state.apply_fn(
                {**trained, "batch_stats": state.batch_stats}, IMAGES, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), updated[
                "batch_stats"
            ]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats), loss, grads

    losses = []
    for index in range(12):
        state, loss, grads = step(state)
        losses.append(float(loss))
        if not index:
            stem = grads["fp8"]["scales"]["stem"]
            assert (
                stem.lhs == jnp.abs(IMAGES).max()
                and stem.rhs == jnp.abs(resnet["params"]["stem"]["kernel"]).max()
                and stem.grad > 0
            )
    assert losses[-1] < 0.5 * losses[0]
    assert not jnp.array_equal(
        state.batch_stats["block_0"]["BatchNorm_0"]["mean"],
        resnet["batch_stats"]["block_0"]["BatchNorm_0"]["mean"],
    )
    assert fp8jax.metrics.summary(state.opt_state, state.params)["fp8/unsealed"] == 0
    out = state.apply_fn({**state.params, "batch_stats": state.batch_stats}, IMAGES, train=False)
    assert out.shape == (16, 4) and bool(jnp.isfinite(out).all())
