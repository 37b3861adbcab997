"""Functions and modules of weights that are held as FP8 codes."""

import functools
import re

import compile_only
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import thorough_but

import fp8jax
from fp8jax import (
    BlockWise,
    PerChannel,
    PerTensor,
    WeightRule,
    dequantize_params,
    fp8,
    quantize_params,
    recipes,
)

RNG = np.random.default_rng(0)


def weights(*shape):
    """Channels of very different sizes: without its scales, no product of these comes out right."""
    return (RNG.normal(size=shape) * np.exp2(RNG.integers(-9, 9, shape[-1]))).astype(np.float32)


def activations(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {"w": weights(16, 24), "v": weights(24, 16), "layers": weights(3, 16, 16)}
X = activations(4, 16)


def plain(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def transposed(p, x):
    return x @ p["v"].T + (p["w"].T @ x.T).T


def in_bfloat16(p, x):
    return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32)


def heads(p, x):
    h = jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(16, 4, 6))
    return jnp.einsum("bhk,hko->bo", h, p["v"].reshape(4, 6, 16))


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]


def unrolled(p, x):
    for layer in range(3):
        x = jnp.tanh(x @ p["layers"][layer])
    return x


def by_index(p, x):
    return jax.lax.fori_loop(0, 3, lambda layer, x: jnp.tanh(x @ p["layers"][layer]), x)


def sliced(p, x):
    return x @ p["w"][:, 8:16] + x[:, :8] @ p["w"][:8, :8]


def fused(p, x):
    one, two, three = jnp.split(x @ jnp.split(p["v"], [16], axis=0)[0] @ p["w"], 3, axis=1)
    (first, second, third), (upper, lower) = (
        jnp.split(p["w"], 3, axis=1),
        jnp.split(p["v"], [8], axis=0),
    )
    return (
        one @ upper
        + two @ lower[:8]
        + jnp.concatenate([x @ first, x @ third], axis=1)
        + jnp.tile(x @ second, 2)
        + jnp.tile(three, 2)
    )


def entered(p, x):
    @jax.jit
    def across(w):
        return w.T

    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda primals, tangents: (product(*primals), tangents[0] @ primals[1]))
    x = jax.checkpoint(lambda x: x @ across(p["v"]))(x)
    return jax.lax.cond(x[0, 0] > 0, lambda x: product(x, p["v"]), lambda x: x @ p["v"] * 2, x)


def while_loop(p, x):
    return jax.lax.while_loop(
        lambda state: state[0] < 3,
        lambda state: (state[0] + 1, jnp.tanh(state[1] @ p["w"] @ p["v"])),
        (0, x),
    )[1]


FUNCTIONS = [
    plain,
    transposed,
    in_bfloat16,
    heads,
    scanned,
    unrolled,
    by_index,
    sliced,
    fused,
    entered,
    while_loop,
]
SCALINGS = {
    "tensor": (PerTensor(), 1),
    "channel": (PerChannel(-1), 1),
    "block": (BlockWise((8, 8)), 1),
    "shared": (PerChannel(-1), 0),
}


def quantized(params, scaling, stacked=1):
    """The weights of layers with scales for each layer, or, not stacked, shared between them."""
    rules = [WeightRule("layers", scaling, stacked=stacked), WeightRule("w|v", scaling)]
    return quantize_params(params, rules)


def in_float64(fn, params, x):
    """What the plain function gives, in float64."""
    with jax.enable_x64(True):
        return np.asarray(
            fn(
                jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params),
                jnp.asarray(x, jnp.float64),
            )
        )


def sqnr(got, expected):
    return 10 * np.log10(
        np.square(expected, dtype=np.float64).sum()
        / max(np.square(np.float64(got) - expected).sum(), 1e-300)
    )


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("scaling, stacked", SCALINGS.values(), ids=SCALINGS)
def test_weights_alone_are_their_values(fn, scaling, stacked):
    if fn is heads and isinstance(scaling, BlockWise):
        pytest.skip("its reshape tears blocks apart: refused, below")
    if not stacked and fn not in (scanned, unrolled, by_index):
        pytest.skip("it has no layers to share scales")
    params = quantized(PARAMS, scaling, stacked)
    got = fp8(fn, recipes.weight_only())({}, params, X)
    expected = (
        in_float64(fn, dequantize_params(params), X)
        if fn is not in_bfloat16
        else np.float64(fn(dequantize_params(params), X))
    )
    assert sqnr(got, expected) > (100 if fn is not in_bfloat16 else 45)
    if fn is not in_bfloat16:
        assert sqnr(in_float64(fn, PARAMS, X), expected) < 60  # Else the codes would not be those.


@pytest.mark.parametrize(
    "recipe",
    [recipes.current(), recipes.delayed(), recipes.rowwise(), recipes.blockwise()],
    ids=lambda r: r.name,
)
@pytest.mark.parametrize(
    "fn",
    thorough_but({"plain": plain, "scanned": scanned, "transposed": transposed}, ["scanned"]),
)
def test_quantized_activations_are_those_of_the_dense_function(fn, recipe):
    params = quantized(PARAMS, PerTensor())
    served, dense = fp8(fn, recipe), dequantize_params(params)
    scales = served.init(dense, X)
    got, expected = served(scales, params, X), served(scales, dense, X)
    # The codes of a dequantized weight are those it had, so nothing but the order of sums differs.
    assert sqnr(got, np.float64(expected)) > 100
    assert sqnr(got, in_float64(fn, dense, X)) < 60
    assert sqnr(got, in_float64(fn, dense, X)) > 20


def test_static_scales_are_found_with_the_codes_too():
    served, params = fp8(plain, recipes.delayed()), quantized(PARAMS, PerChannel(-1))
    scales = served.init(params, X)
    dense = served.init(PARAMS, X)
    assert [float(node.lhs) for node in scales.values()] == [
        float(node.lhs) for node in dense.values()
    ]
    scales = fp8jax.calibrate(served, scales, [(params, X), (params, 64 * X)])
    assert scales["w"].lhs - dense["w"].lhs == 6
    _, seen = served.observe(scales, params, X)
    assert seen["w"].lhs == np.abs(X).max() and seen["w"].rhs == 0


def test_sites_and_shapes_are_those_of_the_dense_function():
    served = fp8(scanned, recipes.delayed())
    abstract = quantized(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS)), PerTensor())
    assert str(served.explain(abstract, X)) == str(served.explain(PARAMS, X))
    assert (
        jax.eval_shape(served, jax.eval_shape(served.init, abstract, X), abstract, X).shape
        == X.shape
    )


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_weights_serve(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    placed = {"w": P(None, "x"), "v": P(None, "x"), "layers": P(None, None, "x")}
    here = quantized(PARAMS, PerChannel(-1))
    params = quantized(
        {
            name: jax.device_put(leaf, NamedSharding(mesh, placed[name]))
            for name, leaf in PARAMS.items()
        },
        PerChannel(-1),
    )
    assert params["w"].scale.sharding.spec == P(None, "x")
    served = fp8(lambda p, x: jnp.tanh(x @ p["w"]), recipes.rowwise())
    with jax.set_mesh(mesh):
        got = served({}, params, X)
    assert sqnr(got, np.float64(served({}, here, X))) > 110


@pytest.mark.parametrize("scaling", [PerTensor(), PerChannel(-1), BlockWise((8, 8))], ids=str)
def test_partitioned_linen_modules_serve(scaling):
    """Flax constrains their weights' shardings within `jax.set_mesh`: that of the codes then."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    module = nn.Dense(
        32, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "m"))
    )
    params = quantize_params(
        module.init(jax.random.key(0), X)["params"], [WeightRule("kernel", scaling)]
    )
    served = fp8jax.linen.Fp8(module, recipes.weight_only())
    expected = served.apply({"params": params}, X)
    with jax.set_mesh(mesh):
        got = jax.jit(served.apply)({"params": params}, X)
        program = str(jax.make_jaxpr(served.apply)({"params": params}, X))
    assert sqnr(got, np.float64(expected)) > 110
    assert (
        "u8[16,32] = sharding_constraint" in program
        and "f32[16,32] = sharding_constraint" not in program
    )


def test_a_shard_map_inside_serves():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(p, x):
        inner = jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(P(), P(None, "x")), out_specs=P(None, "x")
        )
        return inner(x, p["w"])

    for scaling in (PerTensor(), PerChannel(-1), BlockWise((8, 4))):
        params = quantized(PARAMS, scaling)
        assert (
            sqnr(
                fp8(fn, recipes.weight_only())({}, params, X),
                in_float64(fn, dequantize_params(params), X),
            )
            > 110
        )
    with pytest.raises(
        ValueError,
        match="weight w is held as FP8 codes.*shard_map takes it apart within blocks of 8",
    ):
        fp8(fn, recipes.weight_only())({}, quantized(PARAMS, BlockWise((8, 8))), X)


def test_convolutions_serve():
    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    kernel, x = {"k": weights(3, 4, 8)}, activations(2, 10, 4)
    params = quantize_params(kernel, [WeightRule("k", PerChannel(-1))])
    assert (
        sqnr(
            fp8(fn, recipes.weight_only())({}, params, x),
            in_float64(fn, dequantize_params(params), x),
        )
        > 100
    )


class Model(nn.Module):
    """Stacked layers behind an embedding."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 16, name="embed")(tokens)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(8, name="head")(layers(name="layers")(x, None)[0])


class Layer(nn.Module):
    """A multi-head product and a residual connection."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((4, 6), name="heads")(x)
        return x + nn.DenseGeneral(16, axis=(-2, -1), name="out")(jnp.tanh(h)), None


@pytest.mark.parametrize(
    "recipe",
    thorough_but(
        {recipe.name: recipe for recipe in (recipes.weight_only(), recipes.delayed())},
        ["weight_only"],
    ),
)
def test_linen_modules_serve(recipe):
    tokens = RNG.integers(0, 11, (2, 5))
    served = fp8jax.linen.Fp8(Model(), recipe)
    variables = served.init(jax.random.key(0), tokens)
    params = quantize_params(
        variables["params"],
        [WeightRule("layers/.*kernel", stacked=1), WeightRule("head/kernel", PerChannel(-1))],
    )
    got = jax.jit(served.apply)(variables | {"params": params}, tokens)
    dense = dequantize_params(params)
    if recipe.name == "weight_only":
        assert sqnr(got, np.float64(Model().apply({"params": dense}, tokens))) > 110
    else:
        # The head's channels are cast once more, to one scale for all, where they are dense.
        assert sqnr(got, np.float64(served.apply(variables | {"params": dense}, tokens))) > 40
    assert 15 < sqnr(got, np.float64(Model().apply(variables, tokens))) < 60
    assert "layers/heads" in str(served.explain(variables | {"params": params}, tokens))


def test_nnx_modules_serve():
    model = fp8jax.nnx.Fp8(
        nnx.Sequential(
            nnx.Linear(16, 24, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(24, 8, rngs=nnx.Rngs(1))
        ),
        recipes.weight_only(),
    )
    state = quantize_params(
        nnx.state(model.module, nnx.Param), [WeightRule(".*kernel", PerChannel(-1))]
    )
    expected = nnx.merge(nnx.graphdef(model.module), dequantize_params(state))(X)
    nnx.update(model.module, state)
    assert sqnr(nnx.jit(lambda model, x: model(x))(model, X), np.float64(expected)) > 110
    assert sqnr(model(X), np.float64(expected)) > 110


REFUSED = {
    "an addition": (
        lambda p, x: x @ (p["w"] + 1),
        {},
        "weight w is held as FP8 codes.*got another use: it is read by add",
    ),
    "a return": (lambda p, x: (x @ p["w"], p["w"]), {}, "weight w .*it is returned"),
    "a sum": (lambda p, x: x @ p["w"] + p["v"].sum(), {}, "weight v .*it is read by reduce_sum"),
    "a cast to integers": (
        lambda p, x: (x @ p["w"], p["v"].astype(jnp.int32)),
        {},
        "weight v .*it is cast to int32",
    ),
    "torn blocks": (
        heads,
        {},
        r"(?s)got 2 other uses:.*weight w: it is reshaped to \[16, 4, 6\], which tears the groups",
    ),
    "a torn slice": (
        lambda p, x: x @ p["w"][:, 4:12],
        {},
        "weight w .*it is sliced within a block of 8, from 4 to 12",
    ),
    "a torn split": (
        lambda p, x: x @ jnp.split(p["w"], 2, axis=1)[0],
        {},
        "weight w .*it is sliced within a block of 8, from 0 to 12",
    ),
    "stretching": (
        lambda p, x: jnp.einsum("bd,ndf->nbf", x, jnp.broadcast_to(p["w"], (2, 16, 24))),
        {},
        r"weight w .*broadcast to \[2, 16, 24\]",
    ),
}


@pytest.mark.parametrize("fn, options, text", REFUSED.values(), ids=REFUSED)
def test_what_needs_the_values_is_refused_by_name(fn, options, text):
    with pytest.raises(ValueError, match=text):
        fp8(fn, recipes.weight_only(), **options)({}, quantized(PARAMS, BlockWise((8, 8))), X)


def test_all_that_needs_the_values_is_said_at_once():
    def fn(p, x):
        x = jax.lax.scan(lambda x, w: (x @ (w * 2), None), x, p["layers"])[0]
        return jax.nn.softmax(p["v"])[:4, :4] @ (x @ p["w"]).reshape(4, -1), p["w"]

    served, params = fp8(fn, recipes.weight_only()), quantized(PARAMS, PerTensor())
    found = served.explain(params, X)
    assert list(dict.fromkeys(weight for weight, _ in found.refused)) == ["layers", "v", "w"]
    told = [
        r"weight layers: it is read by mul",
        "weight v: it is read by",
        "weight w: it is returned",
    ]
    text = r"(?s)got \d other uses:.*" + ".*".join(told) + ".*scaling=None"
    assert re.search(text, str(found))
    with pytest.raises(ValueError, match=text):
        served({}, params, X)
    assert served.explain(PARAMS, X).refused == ()
    assert fp8(plain, recipes.weight_only()).explain(params, X).refused == ()


MODES = {
    "weights alone": recipes.weight_only(),
    "dynamic": recipes.rowwise(),
    "static": recipes.delayed(),
}
LARGE = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {"w": (256, 1024), "v": (1024, 256), "layers": (3, 256, 256)}.items()
}


@pytest.mark.parametrize("recipe", MODES.values(), ids=MODES)
@pytest.mark.parametrize("scaling", [PerTensor(), PerChannel(-1), BlockWise((128, 128))])
@pytest.mark.parametrize("fn", [plain, scanned])
def test_no_wide_weight_is_in_the_program_for_a_gpu(recipe, scaling, fn):
    params, x = quantized(LARGE, scaling), jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    served = fp8(
        lambda p, x: fn(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p), x), recipe
    )
    lowered = (
        jax.jit(served)
        .trace(jax.eval_shape(served.init, params, x), params, x)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    sizes = [
        np.prod([int(n) for n in shape.split("x")[:-1]])
        for shape in re.findall(r"tensor<([0-9x]+x)(?:f32|bf16|f16)>", lowered)
    ]
    assert sizes and max(sizes) < (256 * 1024 if fn is plain else 256 * 256)
    # As the dense function has: this sees what it is to see.
    dense = (
        jax.jit(fn)
        .trace(LARGE, jax.ShapeDtypeStruct((8, 256), jnp.float32))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert "256x1024xf32" in dense or "256x256xf32" in dense


@pytest.mark.parametrize("recipe", [MODES["dynamic"], MODES["static"]], ids=["dynamic", "static"])
@pytest.mark.parametrize("scaling", [PerTensor(), PerChannel(-1), BlockWise((128, 128))])
def test_products_are_fp8_gemms_on_an_h200(recipe, scaling):
    mesh = compile_only.h200_mesh()
    place = functools.partial(compile_only.place, mesh)
    params, x = quantized(LARGE, scaling), jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    served = fp8(
        lambda p, x: plain(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p), x), recipe
    )
    compiled = compile_only.compile_for(
        mesh, served, place(jax.eval_shape(served.init, params, x)), place(params), place(x)
    )
    gemms = compile_only.gemms(compiled.as_text())
    assert (
        gemms.fp8 == (4 if isinstance(scaling, BlockWise) else 2) and gemms.other == 0
    )  # The first block, and a loop over the others.
    assert not re.search(r"(?:f32|bf16|f16)\[(?:256,1024|1024,256)\]", compiled.as_text())
