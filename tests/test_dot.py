"""`ops.dot_general` against float64 products, in all shapes, with and without grad, native and
emulated.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fitting import fitting
from tiers import thorough_but

import fp8jax
from fp8jax import recipes
from fp8jax._recipe import CastSpec
from fp8jax._scaling import PerTensor
from fp8jax._site_scales import SiteScales
from fp8jax.ops import dot_general
from fp8jax.ops._cast import Codes, halves, halves_of_powers
from fp8jax.ops._dot import Dot
from fp8jax.ops._execution import cpu_multiplies_bfloat16, multiply

# Name: lhs shape, rhs shape, dimension numbers.
SHAPES = {
    "matrix": ((128, 256), (256, 64), (((1,), (0,)), ((), ()))),
    "transposed rhs": ((128, 256), (64, 256), (((1,), (1,)), ((), ()))),
    "transposed lhs": ((256, 128), (256, 64), (((0,), (0,)), ((), ()))),
    "sequence": ((4, 32, 256), (256, 64), (((2,), (0,)), ((), ()))),
    "heads out": ((4, 32, 8, 16), (8, 16, 64), (((2, 3), (0, 1)), ((), ()))),
    "heads out, swapped": ((4, 32, 16, 8), (8, 16, 64), (((3, 2), (0, 1)), ((), ()))),
    "batched": ((4, 8, 64, 32), (4, 8, 32, 48), (((3,), (2,)), ((0, 1), (0, 1)))),
    "batched, crossed": ((32, 8, 64, 4), (8, 4, 48, 32), (((0,), (3,)), ((3, 1), (1, 0)))),
    "vector": ((512,), (512, 384), (((0,), (0,)), ((), ()))),
    "outer": ((512,), (384,), (((), ()), ((), ()))),
}
BASIC_SHAPES = ["matrix", "heads out, swapped", "batched, crossed", "outer"]


def sqnr_db(exact, got) -> float:
    """Signal over noise of `got`, in decibels, against a float64 array."""
    noise = np.square(exact - np.asarray(got, np.float64)).sum()
    return float(10 * np.log10(np.square(exact).sum() / max(noise, 1e-300)))


def exact_products(lhs, rhs, cotangent, dimension_numbers):
    """The product and both gradients in float64, by NumPy alone."""
    letters = iter("abcdefghijklmnop")
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    left, right = [next(letters) for _ in lhs.shape], [next(letters) for _ in rhs.shape]
    for ours, theirs in (*zip(lhs_contracting, rhs_contracting), *zip(lhs_batch, rhs_batch)):
        right[theirs] = left[ours]
    out = [left[axis] for axis in lhs_batch]
    out += [left[axis] for axis in range(lhs.ndim) if axis not in (*lhs_contracting, *lhs_batch)]
    out += [right[axis] for axis in range(rhs.ndim) if axis not in (*rhs_contracting, *rhs_batch)]
    left, right, out = map("".join, (left, right, out))
    lhs, rhs, cotangent = (np.asarray(x, np.float64) for x in (lhs, rhs, cotangent))
    return (
        np.einsum(f"{left},{right}->{out}", lhs, rhs),
        np.einsum(f"{out},{right}->{left}", cotangent, rhs),
        np.einsum(f"{left},{out}->{right}", lhs, cotangent),
    )


def run(name, recipe, dtype=jnp.float32, scale=1.0, **options):
    """Exact and FP8 product and gradients of one shape on normal data, and the observations."""
    lhs_shape, rhs_shape, dimension_numbers = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    lhs = (jax.random.normal(keys[0], lhs_shape) * scale).astype(dtype)
    rhs = jax.random.normal(keys[1], rhs_shape).astype(dtype)
    scales = SiteScales.zeros("dot", recipe.delayed_casts) if any(recipe.delayed_casts) else None

    def product(lhs, rhs, scales):
        return dot_general(lhs, rhs, dimension_numbers, scales, recipe=recipe, **options)

    product = jax.jit(product)
    out, backward = jax.vjp(product, lhs, rhs, scales)
    cotangent = jax.random.normal(keys[2], out.shape).astype(out.dtype)
    if scales is not None:
        out, backward = jax.vjp(product, lhs, rhs, fitting(scales, backward(cotangent)[2]))
    return (
        exact_products(lhs, rhs, cotangent, dimension_numbers),
        (out, *jax.jit(backward)(cotangent)),
        (lhs, rhs, cotangent),
    )


RECIPES = {
    "delayed": recipes.delayed(),
    "current": recipes.current(),
    "rowwise": recipes.rowwise(),
    "rowwise, exact scales": recipes.rowwise(power_of_two=False),
    "rowwise_hp_wgrad": recipes.rowwise_hp_wgrad(),
    "blockwise": recipes.blockwise(),
    "blockwise, small": recipes.blockwise(block=24),
    "blockwise, exact scales": recipes.blockwise(power_of_two=False),
    "mxfp8": recipes.mxfp8(),
}


@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["delayed", "rowwise", "mxfp8"]))
@pytest.mark.parametrize("name", thorough_but(dict(zip(SHAPES, SHAPES)), BASIC_SHAPES))
def test_product_and_gradients_are_close_to_the_exact_ones(name, recipe):
    if recipe.name not in ("delayed", "rowwise") and name not in (
        "transposed rhs",
        "heads out, swapped",
        "batched, crossed",
    ):
        pytest.skip("all shapes under two recipes, three shapes under each")
    exact, (out, dlhs, drhs, _), _ = run(name, recipe)
    assert [array.shape for array in exact] == [array.shape for array in (out, dlhs, drhs)]
    gradients = 24 if recipe.dlhs.grad.format == fp8jax.E5M2 else 27
    assert sqnr_db(exact[0], out) >= 27
    assert sqnr_db(exact[1], dlhs) >= gradients
    assert sqnr_db(exact[2], drhs) >= gradients


def test_the_bounds_reject_what_is_wrong():
    exact, (out, dlhs, drhs, _), _ = run("batched", recipes.delayed())
    assert sqnr_db(exact[1], np.zeros_like(dlhs)) < 1
    assert sqnr_db(exact[2], -drhs) < 1
    swapped = jnp.swapaxes(dlhs, 0, 1).reshape(dlhs.shape)
    assert sqnr_db(exact[1], swapped) < 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_operands_keep_their_dtype(dtype):
    exact, (out, dlhs, drhs, _), _ = run("sequence", recipes.delayed(), dtype)
    assert {out.dtype, dlhs.dtype, drhs.dtype} == {jnp.dtype(dtype)}
    assert (
        sqnr_db(exact[0], out) >= 27
        and sqnr_db(exact[1], dlhs) >= 24
        and sqnr_db(exact[2], drhs) >= 24
    )


def test_float16_operands_near_their_limit_do_not_overflow():
    _, (out, dlhs, drhs, _), _ = run(
        "matrix", recipes.current(), jnp.float16, scale=4000.0, preferred_element_type=jnp.float32
    )
    assert (
        all(bool(jnp.isfinite(array).all()) for array in (out, dlhs))
        and float(jnp.abs(out).max()) > 65504
    )


@pytest.mark.parametrize("name", thorough_but(dict(zip(SHAPES, SHAPES)), BASIC_SHAPES))
def test_native_and_emulated_differ_in_the_order_of_sums_only(name):
    emulated = run(name, recipes.delayed(execution="emulated"))[1]
    native = run(name, recipes.delayed(execution="native"))[1]
    for ours, theirs in zip(jax.tree.leaves(emulated), jax.tree.leaves(native), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_observations_are_the_amaxes_themselves():
    _, (_, _, _, observed), operands = run("batched", recipes.delayed())
    assert [float(x) for x in (observed.lhs, observed.rhs, observed.grad)] == [
        float(jnp.abs(x).max()) for x in operands
    ]


def test_a_product_of_tiny_scales_is_not_lost_between_them():
    recipe = recipes.delayed()
    scales = SiteScales.zeros("dot", recipe.delayed_casts).replace(
        lhs=jnp.float32(-120.0), rhs=jnp.float32(110.0)
    )
    lhs, rhs = jnp.full((1, 1), 2.0**-118), jnp.full((1, 1), 2.0**112)
    out = dot_general(lhs, rhs, (((1,), (0,)), ((), ())), scales, recipe=recipe)
    assert float(out[0, 0]) == 2.0**-6


def test_halves_of_powers_are_halves():
    scales = np.exp2(np.arange(-126, 127)).astype(np.float32)
    one, other = (jnp.asarray(grid.ravel()) for grid in np.meshgrid(scales, scales))
    for found, expected in zip(halves_of_powers(one, other), halves(one, other), strict=True):
        np.testing.assert_array_equal(found, expected)
    first, second = (np.asarray(half, np.float64) for half in halves_of_powers(one, other))
    np.testing.assert_array_equal(first * second, np.float64(one) * np.float64(other))
    np.testing.assert_array_equal(halves_of_powers(one), halves(one))


def test_residuals_are_a_byte_each():
    recipe = recipes.delayed()
    lhs, rhs = jnp.ones((32, 64), jnp.bfloat16), jnp.ones((64, 16), jnp.bfloat16)
    scales = SiteScales.zeros("dot", recipe.delayed_casts)
    _, backward = jax.vjp(
        lambda *a: dot_general(a[0], a[1], (((1,), (0,)), ((), ())), a[2], recipe=recipe),
        lhs,
        rhs,
        scales,
    )
    arrays = [
        leaf for leaf in jax.tree.leaves(backward) if leaf.size > 8
    ]  # beside a few single numbers
    assert sum(leaf.nbytes for leaf in arrays) == lhs.size + rhs.size
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype(jnp.uint8)}


def test_no_float8_cotangent_and_no_narrow_output():
    recipe = recipes.delayed()
    scales = SiteScales.zeros("dot", recipe.delayed_casts)
    jaxpr = jax.make_jaxpr(
        jax.grad(
            lambda x, w, s: dot_general(x, w, (((1,), (0,)), ((), ())), s, recipe=recipe).sum(),
            argnums=(0, 1, 2),
        )
    )(jnp.ones((4, 8)), jnp.ones((8, 2)), scales)
    assert all(aval.dtype == jnp.float32 for aval in jaxpr.out_avals)
    text = str(jaxpr)
    assert "convert_element_type[new_dtype=float8" not in text.replace("\n", "")


def test_explicit_mesh_gives_each_gradient_its_operands_sharding():
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    recipe = recipes.delayed()
    spec = jax.sharding.PartitionSpec
    keys = jax.random.split(jax.random.key(0), 2)
    lhs, rhs = jax.random.normal(keys[0], (8, 4, 16)), jax.random.normal(keys[1], (16, 32))
    scales = SiteScales.zeros("dot", recipe.delayed_casts)

    def loss(lhs, rhs, scales):
        return jnp.square(
            dot_general(lhs, rhs, (((2,), (0,)), ((), ())), scales, recipe=recipe)
        ).sum()

    scales = fitting(scales, jax.grad(loss, argnums=2)(lhs, rhs, scales))
    want = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(lhs, rhs, scales)
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(lhs, jax.NamedSharding(mesh, spec("data", None, None))),
            jax.device_put(rhs, jax.NamedSharding(mesh, spec(None, "model"))),
            scales,
        )
        got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*placed)
    assert got[0].sharding.spec == spec("data", None, None) and got[1].sharding.spec == spec(
        None, "model"
    )
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("x64", [False, True])
def test_float64_operands(x64):
    if not x64:
        return
    with jax.enable_x64(True):
        exact, (out, dlhs, drhs, _), _ = run("matrix", recipes.delayed(), jnp.float64)
        assert out.dtype == dlhs.dtype == jnp.float64
        assert (
            sqnr_db(exact[0], out) >= 27
            and sqnr_db(exact[1], dlhs) >= 24
            and sqnr_db(exact[2], drhs) >= 24
        )


def test_empty_operands():
    recipe = recipes.current()
    out = dot_general(jnp.zeros((0, 4)), jnp.ones((4, 2)), (((1,), (0,)), ((), ())), recipe=recipe)
    assert out.shape == (0, 2)
    out = dot_general(jnp.zeros((3, 0)), jnp.ones((0, 2)), (((1,), (0,)), ((), ())), recipe=recipe)
    assert (out == jnp.zeros((3, 2))).all()


def test_codes_multiply_exactly():
    data = jnp.asarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).view(jnp.float8_e4m3fn)
    codes, values = (
        Codes.of(data, jnp.float32(1), CastSpec("E4M3"), PerTensor()),
        np.asarray(data, np.float64),
    )
    for execution in ("auto", "native", "emulated"):
        product = multiply(
            codes,
            codes,
            (((1,), (1,)), ((), ())),
            out_dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            execution=execution,
        )
        np.testing.assert_allclose(product, values @ values.T, rtol=1e-6)


def test_without_bfloat16_instructions_the_cpu_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(
        "fp8jax.ops._execution.cpu_multiplies_bfloat16", lambda: not cpu_multiplies_bfloat16()
    )
    jax.clear_caches()
    try:
        exact, (out, *_), _ = run("transposed lhs", recipes.delayed())
        assert sqnr_db(exact[0], out) >= 27
    finally:
        jax.clear_caches()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(lhs=jnp.ones((2, 2), jnp.int32)), TypeError, "lhs must hold floats; got int32"),
        (
            dict(rhs=jnp.ones((2, 2), jnp.complex64)),
            TypeError,
            "rhs must hold floats; got complex64",
        ),
        (
            dict(scales=None),
            TypeError,
            r"scales must be those of the recipe's operands .* Make them with SiteScales.zeros",
        ),
        (
            dict(recipe=recipes.current()),
            TypeError,
            "scales must be those of the recipe's operands",
        ),
    ],
)
def test_errors(change, error, text):
    recipe = recipes.delayed()
    arguments = (
        dict(
            lhs=jnp.ones((2, 2)),
            rhs=jnp.ones((2, 2)),
            dimension_numbers=(((1,), (0,)), ((), ())),
            scales=SiteScales.zeros("dot", recipe.delayed_casts),
            recipe=recipe,
        )
        | change
    )
    with pytest.raises(error, match=text):
        dot_general(**arguments)


@pytest.mark.parametrize(
    "recipe", [recipes.delayed(), recipes.current()], ids=lambda recipe: recipe.name
)
def test_sites_that_are_alike_are_traced_once(recipe, monkeypatch):
    traced, forward = [], Dot.forward
    monkeypatch.setattr(Dot, "forward", lambda *arguments: traced.append(0) or forward(*arguments))

    def traces(layers, width):  # of a width that no other test has
        fp8_fn = fp8jax.fp8(lambda ws, x: functools.reduce(jnp.matmul, ws, x).sum(), recipe)
        ws, x = [jnp.ones((width, width))] * layers, jnp.ones((3, width))
        scales = fp8_fn.init(ws, x)
        traced.clear()
        jax.make_jaxpr(jax.grad(fp8_fn, argnums=1))(scales, ws, x)
        return len(traced)

    assert 0 < traces(2, 37) == traces(6, 41)


@pytest.mark.skipif(
    jax.default_backend() != "cpu" or not cpu_multiplies_bfloat16(),
    reason="elsewhere nothing is transposed",
)
def test_codes_are_transposed_in_memory_and_not_where_each_element_is_decoded():
    """Which XLA would do by itself: say of the codes' words that their axes lie in the other order,
    and leave them where they are.
    """
    recipe, x, w = recipes.current(), jnp.ones((256, 512)), jnp.ones((512, 128))
    product = functools.partial(
        dot_general, dimension_numbers=(((1,), (0,)), ((), ())), recipe=recipe
    )
    text = (
        jax.jit(jax.grad(lambda w, x: jnp.square(product(x, w)).sum()))
        .lower(w, x)
        .compile()
        .as_text()
    )
    assert set(re.findall(r"= u32\[128,256\](\{[0-9,]*\}) fusion", text)) == {"{1,0}"}
