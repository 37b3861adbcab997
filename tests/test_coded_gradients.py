"""Derivatives of functions whose weights are held as FP8 codes: of all else, and never of these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_serving import (
    PARAMS,
    SCALINGS,
    X,
    entered,
    heads,
    plain,
    quantized,
    scanned,
    sqnr,
    transposed,
    unrolled,
    weights,
)
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
    quantize_params,
    recipes,
)

RECIPES = {
    name: getattr(recipes, name)() for name in ("weight_only", "current", "rowwise", "delayed")
}
SMALL = {name: (leaf * 2.0**-8).astype(np.float32) for name, leaf in PARAMS.items()}


def loss_of(fn):
    """A loss of all outputs, whose gradients are of very different sizes."""

    def loss(p, x):
        out = jnp.sin(fn(p, x) * 0.1)
        return jnp.sum(
            out * jnp.exp2(jnp.arange(out.size, dtype=out.dtype) % 11).reshape(out.shape)
        )

    return loss


def rematerialized(p, x):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w * 0.01), None))
    return jax.lax.scan(body, x, p["layers"])[0]


def left_out(p, x):
    return jnp.tanh(x @ p["w"] * 0.01) @ p["v"]


def gradient_in_float64(fn, params, x):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return np.asarray(jax.grad(loss_of(fn), argnums=1)(wide, jnp.asarray(x, jnp.float64)))


FUNCTIONS = [plain, transposed, heads, scanned, unrolled, entered, rematerialized]
FUNCTIONS = {fn.__name__: fn for fn in FUNCTIONS}


@pytest.mark.parametrize("fn", thorough_but(FUNCTIONS, ["scanned", "entered"]))
@pytest.mark.parametrize("scaling", thorough_but(SCALINGS, ["channel", "block"]))
def test_gradients_of_weights_alone_are_exact(fn, scaling):
    scaling, stacked = scaling
    if fn is heads and isinstance(scaling, BlockWise):
        pytest.skip("its reshape tears blocks apart")
    if not stacked and fn not in (scanned, unrolled):
        pytest.skip("it has no layers to share scales")
    # Sizes at which tanh has a slope.
    params = quantized(SMALL, scaling, stacked)
    served = fp8(loss_of(fn), recipes.weight_only())
    got = jax.jit(jax.grad(served, argnums=2))({}, params, X)
    expected = gradient_in_float64(fn, dequantize_params(params), X)
    assert sqnr(got, expected) > 90
    assert sqnr(gradient_in_float64(fn, SMALL, X), expected) < 60  # Else these are not the codes'.


@pytest.mark.parametrize(
    "recipe", thorough_but({k: v for k, v in RECIPES.items() if k != "weight_only"}, ["delayed"])
)
@pytest.mark.parametrize(
    "fn",
    thorough_but(
        {fn.__name__: fn for fn in (plain, transposed, rematerialized)}, ["rematerialized"]
    ),
)
def test_gradients_are_those_of_the_dense_function(fn, recipe):
    params = quantized(SMALL, PerTensor())
    served, dense = fp8(loss_of(fn), recipe), dequantize_params(params)
    scales = served.init(params, X)
    # The codes of a dequantized weight are those it had: only the order of sums differs.
    for name, node in served.init(dense, X).items():
        assert np.array_equal(node.grad, scales[name].grad)
    scales = served.init(dense, X)
    both = jax.jit(jax.grad(served, argnums=(0, 2)))
    (seen, got), (of_dense, expected) = both(scales, params, X), both(scales, dense, X)
    exact = gradient_in_float64(fn, dense, X)
    assert sqnr(got, np.float64(expected)) > 90
    assert 12 < sqnr(got, exact) < 60
    for name, node in of_dense.items():
        sides = ("rhs", "grad") if fn is transposed and name == "w" else ("lhs", "grad")
        for side in sides:
            np.testing.assert_allclose(getattr(seen[name], side), getattr(node, side), rtol=1e-4)
        of_codes = "lhs" if sides[0] == "rhs" else "rhs"
        assert not np.any(getattr(seen[name], of_codes))


@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["rowwise"]))
@pytest.mark.parametrize(
    "scaling",
    thorough_but(
        {"channel": PerChannel(-1), "rows": PerChannel(0), "block": BlockWise((8, 8))}, ["channel"]
    ),
)
def test_scales_along_what_is_summed_are_multiplied_in_before_a_cast(scaling, recipe):
    """A scale of one channel stays apart from those of the others, whichever way it is summed."""
    params = quantized(
        {"w": PARAMS["w"], "v": PARAMS["v"].T.copy().T, "layers": PARAMS["layers"]}, scaling
    )
    served = fp8(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])), recipe)
    got = jax.grad(served, argnums=2)(served.init(params, X), params, X)
    dense = dequantize_params(params)
    # The operand's cast changes the sine's argument; from there on, only the gradient's does.
    forward = fp8(lambda p, x: x @ p["w"], recipe)
    y = np.float64(forward(served.init(params, X), params, X))
    expected = np.cos(y) @ np.float64(dense["w"]).T
    assert sqnr(got, expected) > (90 if recipe.name == "weight_only" else 22)


def in_devices(p, x):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P(), P(None, "x")), out_specs=P(None, "x")
    )
    rows = jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "x"),
        mesh=mesh,
        in_specs=(P(None, "x"), P("x", None)),
        out_specs=P(),
    )
    return rows(jnp.tanh(columns(x, p["w"])), p["v"])


@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["delayed"]))
def test_gradients_pass_shard_maps(recipe):
    params = quantized(SMALL, PerChannel(-1))
    served, on_one = fp8(loss_of(in_devices), recipe), fp8(loss_of(plain), recipe)
    scales = served.init(params, X)
    seen, got = jax.jit(jax.grad(served, argnums=(0, 2)))(scales, params, X)
    on_one_scales = on_one.init(params, X)
    expected_seen, expected = jax.grad(on_one, argnums=(0, 2))(on_one_scales, params, X)
    assert sqnr(got, np.float64(expected)) > (
        90 if recipe.name in ("weight_only", "delayed") else 20
    )
    for node, other in zip(seen.values(), expected_seen.values()):
        assert float(node.grad) == pytest.approx(float(other.grad), rel=0.02)


@pytest.mark.parametrize("mirrored", [False, True])
def test_second_derivatives_are_of_the_decoded_weights(mirrored):
    if not fp8jax._shims.KEEPS_RULES:
        pytest.skip("second_order needs JAX 0.12")
    import dataclasses

    def fn(p, x):
        h = (p["w"].T @ x.T).T if mirrored else x @ p["w"]
        return jnp.sum(jnp.sin(h * 0.01))

    recipe = dataclasses.replace(recipes.weight_only(), second_order=True)
    params = quantized(PARAMS, PerChannel(-1))
    served = fp8(fn, recipe)

    def norm(fn, x):
        return jnp.sum(jnp.square(jax.grad(fn)(x)))

    got = jax.grad(lambda x: norm(lambda x: served({}, params, x), x))(jnp.asarray(X))
    dense = dequantize_params(params)
    expected = jax.grad(lambda x: norm(lambda x: fn(dense, x), x))(jnp.asarray(X))
    assert sqnr(got, np.float64(expected)) > 80
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first = fp8(fn, recipes.weight_only())
        jax.grad(lambda x: norm(lambda x: first({}, params, x), x))(jnp.asarray(X))


def test_convolutions_and_experts_have_gradients():
    def convolved(p, x):
        return jax.lax.conv_general_dilated(
            x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def experts(p, x):
        return jax.lax.ragged_dot(x, p["k"], jnp.array([3, 0, 4], jnp.int32))

    for fn, x in (
        (convolved, np.random.default_rng(1).normal(size=(2, 10, 4)).astype(np.float32)),
        (experts, np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)),
    ):
        params = quantize_params({"k": weights(3, 4, 8)}, [WeightRule("k", PerChannel(-1))])
        loss = lambda p, x: jnp.sum(jnp.sin(fn(p, x)))
        dense = dequantize_params(params)
        got = jax.grad(fp8(loss, recipes.weight_only()), argnums=2)({}, params, x)
        assert sqnr(got, np.float64(jax.grad(loss, argnums=1)(dense, x))) > 80
        served = fp8(loss, recipes.rowwise())
        got = jax.grad(served, argnums=2)({}, params, x)
        assert np.isfinite(got).all() and np.abs(got).max() > 0


def test_the_users_own_rules_see_the_values():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda kept, grad: (3 * grad @ kept[1].T, kept[0].T @ grad),
    )
    params = quantized(PARAMS, PerChannel(-1))
    for rules in ((), [Rule("w", None)]):  # with a site inside, and with none
        served = fp8(
            lambda p, x: product(x, p["w"]).sum() + (x @ p["v"].T).sum(),
            recipes.weight_only(),
            rules,
        )
        got = jax.grad(served, argnums=2)({}, params, X)
        dense = dequantize_params(params)
        expected = 3 * dense["w"].sum(1) + dense["v"].sum(0)
        assert sqnr(got, np.broadcast_to(np.float64(expected), X.shape)) > 80


REFUSED = {
    "all": (lambda served, p: jax.grad(served, argnums=1)({}, p, X), "of layers, v, w|of .*w"),
    "one": (lambda served, p: jax.grad(lambda w: served({}, p | {"w": w}, X))(p["w"]), r"of w\."),
    "under jit": (
        lambda served, p: jax.jit(jax.value_and_grad(lambda p: served({}, p, X)))(p),
        "asked for, of ",
    ),
    "in a scan": (
        lambda served, p: jax.grad(
            lambda p: jax.lax.scan(lambda total, x: (total + served({}, p, x), None), 0.0, X[None])[
                0
            ]
        )(p),
        "asked for, of ",
    ),
}


@pytest.mark.parametrize("ask, text", REFUSED.values(), ids=REFUSED)
def test_the_gradient_of_codes_is_refused_in_words(ask, text):
    params = quantized(PARAMS, PerTensor())
    served = fp8(loss_of(plain), recipes.weight_only())
    with pytest.raises(
        ValueError, match=f"(?s)held as FP8 codes have no gradient.*({text}).*adapters"
    ):
        ask(served, params)
