"""Tables of embeddings held as FP8 codes, joined kernels, experts, and products of parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_serving import sqnr, weights
from tiers import thorough_but

import fp8jax
from fp8jax import (
    BlockWise,
    PerChannel,
    PerTensor,
    Rule,
    WeightRule,
    dequantize_params,
    fp8,
    quantize,
    quantize_params,
    recipes,
)

ROWS, WIDTH = 24, 16
IDS = np.array([[3, 0, 23, 3], [7, 7, 1, 12]], np.int32)
SCALINGS = [PerTensor(), PerChannel(0), PerChannel(-1), BlockWise((8, 8)), BlockWise((1, 8))]


def table():
    """Rows of very different sizes."""
    return {"embed": {"embedding": weights(WIDTH, ROWS).T.copy()}}


def looked_up(p, ids):
    return jnp.take(p["embed"]["embedding"], ids, axis=0)


def indexed(p, ids):
    return p["embed"]["embedding"][ids, :]


def filled(p, ids):
    return jnp.take(p["embed"]["embedding"], ids * 3, axis=0, mode="fill", fill_value=2.5)


def clipped(p, ids):
    return jnp.take(p["embed"]["embedding"], ids * 3, axis=0, mode="clip")


def columns(p, ids):
    return jnp.take(p["embed"]["embedding"], ids % WIDTH, axis=1)


def along(p, ids):
    return jnp.take_along_axis(p["embed"]["embedding"], ids.reshape(1, 8).repeat(2, 1), axis=0)


def one_row(p, ids):
    return p["embed"]["embedding"][ids[0, 2]]


def in_heads(p, ids):
    return p["embed"]["embedding"].reshape(ROWS, 2, 8)[ids]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(
    "fn",
    [looked_up, indexed, filled, clipped, columns, along, one_row, in_heads],
    ids=lambda fn: fn.__name__,
)
def test_lookups_give_the_rows_values(fn, scaling):
    params = quantize_params(table(), [WeightRule(".*", scaling)])
    dense = dequantize_params(params)
    extra = {"w": np.eye(WIDTH, dtype=np.float32)}  # a function needs a site
    served = fp8(lambda p, ids: (fn(p, ids), jnp.ones((1, WIDTH)) @ p["w"]), recipes.weight_only())
    got, _ = jax.jit(served)({}, params | extra, IDS)
    assert np.array_equal(got, fn(dense, IDS))
    assert not np.array_equal(got, fn(table(), IDS))
    dtypes = [
        str(eqn.outvars[0].aval)
        for eqn in jax.make_jaxpr(served)({}, params | extra, IDS).jaxpr.eqns
    ]
    assert not any("float32[24,16]" in text for text in dtypes)


def test_what_is_out_of_bounds_is_nan():
    params = quantize_params(table(), [WeightRule(".*", PerChannel(0))])
    params["w"] = np.eye(WIDTH, dtype=np.float32)
    served = fp8(lambda p, ids: looked_up(p, ids) @ p["w"], recipes.weight_only())
    got = served({}, params, np.array([1, ROWS, -1, -ROWS - 1], np.int32))
    assert np.isnan(got).all(axis=1).tolist() == [False, True, False, True]


class Tied(nn.Module):
    """A small Gemma: its table, scaled, is what it reads and what it writes by."""

    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(ROWS, 4 * WIDTH, dtype=self.dtype, name="embed")
        x = embed(ids) * jnp.asarray(8, self.dtype)
        x = x + nn.Dense(4 * WIDTH, dtype=self.dtype, name="mlp")(jnp.tanh(x))
        return embed.attend(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "recipe", [recipes.weight_only(), recipes.rowwise(), recipes.delayed()], ids=lambda r: r.name
)
def test_a_tied_table_is_one_table(recipe, dtype):
    module = Tied(dtype)
    params = module.init(jax.random.key(0), IDS)["params"]
    rules = [WeightRule("embed/embedding", PerChannel(0)), WeightRule(".*kernel", PerChannel(-1))]
    coded = quantize_params(params, rules)
    served = fp8jax.linen.Fp8(module, recipe)
    variables = {"params": coded}
    if recipe.name == "delayed":
        variables |= served.apply({"params": coded}, IDS, mutable="fp8")[1]
    got = np.float64(jax.jit(served.apply)(variables, IDS))
    expected = np.float64(Tied().apply({"params": params}, IDS))
    assert 25 < sqnr(got, expected) < 60
    of_codes = np.float64(Tied().apply({"params": dequantize_params(coded)}, IDS))
    floor = {"weight_only": 100, "rowwise": 25, "delayed": 25}[recipe.name]
    assert sqnr(got, of_codes) > (floor if dtype == jnp.float32 else 25)


def test_nnx_tables():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(ROWS, WIDTH, rngs=rngs)
            self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(jnp.tanh(self.mlp(self.embed(ids))))

    model = fp8jax.nnx.Fp8(Model(nnx.Rngs(0)), recipes.weight_only())
    dense = model.module(IDS)
    rules = [WeightRule("embed/embedding", PerChannel(0)), WeightRule(".*kernel", PerChannel(-1))]
    state = quantize_params(nnx.state(model.module, nnx.Param), rules)
    nnx.update(model.module, state)
    assert 25 < sqnr(nnx.jit(lambda model, ids: model(ids))(model, IDS), np.float64(dense)) < 60


@pytest.mark.thorough
@pytest.mark.parametrize("scaling", [PerTensor(), PerChannel(-1), PerChannel(0), BlockWise((4, 4))])
def test_an_lstm_joins_its_kernels(scaling):
    cell = nn.RNN(nn.OptimizedLSTMCell(12))
    x = np.random.default_rng(1).normal(size=(2, 5, WIDTH)).astype(np.float32)
    params = cell.init(jax.random.key(0), x)["params"]
    coded = quantize_params(params, [WeightRule(".*kernel", scaling)])
    served = fp8jax.linen.Fp8(cell, recipes.weight_only())
    got = served.apply({"params": coded}, x)
    assert sqnr(got, np.float64(cell.apply({"params": dequantize_params(coded)}, x))) > 90
    assert 20 < sqnr(got, np.float64(cell.apply({"params": params}, x))) < 60


@pytest.mark.thorough
def test_joined_arrays_keep_their_scales():
    parts = [weights(8, 6), weights(8, 4), weights(8, 2)]
    scalings = [PerTensor(), PerChannel(-1), BlockWise((4, 2)), PerChannel(0)]
    for one in scalings:
        for other in scalings:
            q = [quantize(parts[0], scaling=one), *(quantize(p, scaling=other) for p in parts[1:])]
            joined = q[0].concatenate(q[1:], axis=-1)
            expected = np.concatenate([part.dequantize() for part in q], axis=1)
            assert np.array_equal(joined.dequantize(), expected)
            swapped = [part.transpose() for part in q]
            joined = swapped[0].concatenate(swapped[1:])
            assert np.array_equal(joined.dequantize(), expected.T)


def learned_query(p, x):
    keys = x @ p["key"]
    return jax.nn.softmax((p["probe"] @ p["query"]) @ keys.T) @ x


def both_coded(p, x):
    return x @ (p["query"] @ p["key"])


def left_out(p, x):
    return jnp.tanh(x @ p["key"]) @ p["query"]


def experts(p, x):
    def one(x):
        chosen = jnp.argmax(x[:3]).astype(jnp.int32)
        return x @ jax.lax.dynamic_index_in_dim(p["experts"], chosen, keepdims=False)

    return jax.lax.map(one, x) @ p["key"]


@pytest.mark.parametrize(
    "fn",
    thorough_but(
        {fn.__name__: fn for fn in (learned_query, both_coded, left_out, experts)}, ["left_out"]
    ),
)
def test_products_that_are_not_selected_read_codes(fn):
    rng = np.random.default_rng(3)
    normal = lambda *shape: (rng.normal(size=shape) * 0.4).astype(np.float32)
    params = {
        "probe": normal(1, WIDTH),
        "query": normal(WIDTH, WIDTH),
        "key": normal(WIDTH, WIDTH),
        "experts": normal(3, WIDTH, WIDTH),
    }
    x = np.random.default_rng(2).normal(size=(5, WIDTH)).astype(np.float32)
    rules = [
        WeightRule("experts", PerChannel(-1), stacked=1),
        WeightRule("query|key", PerChannel(-1)),
    ]
    coded = quantize_params(params, rules)
    rules = [Rule(".*query", None)] if fn is left_out else []
    served = fp8(fn, recipes.rowwise(), rules)
    got = served({}, coded, x)
    assert 18 < sqnr(got, np.float64(fn(dequantize_params(coded), x))) < 160
    exact = fp8(fn, recipes.weight_only(), rules)
    # What is a product of parameters is a weight itself, and cast by the recipe.
    bound = 80 if fn in (left_out, experts) else 25
    assert sqnr(exact({}, coded, x), np.float64(fn(dequantize_params(coded), x))) > bound
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(exact({}, coded, x))))(jnp.asarray(x))
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(fn(dequantize_params(coded), x))))(jnp.asarray(x))
    assert sqnr(gradient, np.float64(expected)) > bound - 10


LONG, SHORT = 300, 96  # of several parts, the last of them smaller
PRODUCTS = {
    "x @ w.T": (lambda p, x: x @ p["w"].T, (5, SHORT)),
    "x @ w": (lambda p, x: x @ p["w"], (5, LONG)),
    "w @ x": (lambda p, x: p["w"] @ x, (SHORT, 5)),
    "w.T @ x": (lambda p, x: p["w"].T @ x, (LONG, 5)),
    "heads": (
        lambda p, x: jnp.einsum("bhk,vhk->bvh", x, p["w"].reshape(LONG, 4, -1)),
        (5, 4, SHORT // 4),
    ),
}
GROUPS = [
    PerTensor(),
    PerChannel(0),
    PerChannel(-1),
    BlockWise((128, 32)),
    BlockWise((1, 32)),
    BlockWise((100, 1)),
]


PARTS = {
    f"{which}, {scaling}": (which, scaling)
    for which in PRODUCTS
    for scaling in GROUPS
    if which != "heads" or not isinstance(scaling, BlockWise)  # which would tear heads
}
ALWAYS = ["x @ w.T, PerChannel(axis=0)", "w @ x, BlockWise(block_shape=(128, 32))"]


@pytest.fixture
def one_device(monkeypatch):
    """As where there is one alone; over several, a weight may be divided."""
    jax.clear_caches()
    monkeypatch.setattr("fp8jax.ops._coded_dot.division_of", lambda *arrays: "")
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("part", thorough_but(PARTS, ALWAYS))
@pytest.mark.parametrize("recipe", [recipes.weight_only(), recipes.rowwise()], ids=lambda r: r.name)
def test_a_cpu_widens_a_part_of_a_weight_at_a_time(part, recipe, monkeypatch):
    """The values are those of a product with the whole weight, forward and backward."""
    monkeypatch.setattr("fp8jax.ops._coded_dot._IN_CACHE", 1 << 12)
    (fn, shape), scaling = PRODUCTS[part[0]], part[1]
    rng = np.random.default_rng(5)
    params = {"w": rng.normal(size=(LONG, SHORT)).astype(np.float32)}
    coded = quantize_params(params, [WeightRule(".*", scaling)])
    dense = {"w": np.float64(dequantize_params(coded)["w"])}
    x = rng.normal(size=shape).astype(np.float32)
    served = fp8(fn, recipe)

    def loss(x):
        return jnp.sum(jnp.sin(served({}, coded, x) / 10))

    step = jax.jit(lambda x: (served({}, coded, x), jax.grad(loss)(x)))
    loops = step.lower(x).as_text().count("stablehlo.while")
    assert loops >= 2
    out, gradient = step(x)
    with jax.enable_x64(True):
        expected = fn(dense, np.float64(x))
        of_loss = jax.grad(lambda x: jnp.sum(jnp.sin(fn(dense, x) / 10)))(np.float64(x))
    floor = 110 if recipe.name == "weight_only" else 25
    assert sqnr(out, np.float64(expected)) > floor
    assert sqnr(gradient, np.float64(of_loss)) > floor - 10


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("which", ["x @ w.T", "x @ w", "w @ x"])
def test_no_wide_table_is_made(which):
    """Of 17 million values a few are wide at a time; and of the codes no copy is made."""
    rows, width = 32768, 512
    coded = quantize_params({"w": np.ones((rows, width), np.float32)}, [WeightRule(".*")])
    shapes = {"x @ w.T": (8, width), "x @ w": (8, rows), "w @ x": (width, 8)}
    x = np.ones(shapes[which], np.float32)
    served = fp8(PRODUCTS[which][0], recipes.weight_only())
    forward = jax.jit(lambda x, p: served({}, p, x))
    backward = jax.jit(jax.grad(lambda x, p: jnp.square(served({}, p, x)).sum()))
    for step in (forward, backward):
        compiled = step.lower(x, coded).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < rows * width


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (3000, 1, 1)], ids=str)
def test_weights_without_parts_are_multiplied_whole(shape, monkeypatch):
    """Empty ones, and those of which all but the batch is one element."""
    monkeypatch.setattr("fp8jax.ops._coded_dot._IN_CACHE", 1 << 10)
    rng = np.random.default_rng(3)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(*shape[:-2], 4, shape[-2])), jnp.float32)
    coded = {"w": quantize(w, scaling=PerTensor())}
    got = jax.jit(fp8(lambda p, x: x @ p["w"], recipes.weight_only()))({}, coded, x)
    expected = np.float64(x) @ np.float64(coded["w"].dequantize())
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5)
