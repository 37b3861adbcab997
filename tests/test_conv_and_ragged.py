"""Convolutions and ragged products in FP8 against JAX's own in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fitting import fitting
from tiers import thorough_but

import fp8jax
from fp8jax import recipes
from fp8jax._site_scales import SiteScales
from fp8jax.ops import conv_general_dilated, ragged_dot_general

RECIPES = {
    "delayed": recipes.delayed(),
    "current": recipes.current(),
    "rowwise": recipes.rowwise(),
    "rowwise_hp_wgrad": recipes.rowwise_hp_wgrad(),
    "blockwise": recipes.blockwise(block=16),
    "exact scales": recipes.rowwise(power_of_two=False),
    "mxfp8": recipes.mxfp8(),
}
# Name: lhs, rhs, options.
CONVOLUTIONS = {
    "1-D": (
        (4, 32, 16),
        (3, 16, 8),
        dict(window_strides=(1,), padding="SAME", dimension_numbers=("NWC", "WIO", "NWC")),
    ),
    "2-D, strides": (
        (2, 16, 16, 24),
        (3, 3, 24, 16),
        dict(window_strides=(2, 2), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    ),
    "2-D, explicit padding": (
        (2, 8, 16, 16),
        (16, 8, 3, 3),
        dict(window_strides=(1, 2), padding=((2, 1), (0, 3))),
    ),
    "2-D, dilated": (
        (8, 8, 16, 16),
        (16, 8, 3, 3),
        dict(
            window_strides=(1, 1),
            padding=((0, 0), (1, 1)),
            rhs_dilation=(2, 3),
            lhs_dilation=(2, 1),
        ),
    ),
    "2-D, depthwise": (
        (2, 16, 12, 12),
        (32, 1, 3, 3),
        dict(window_strides=(1, 1), padding="SAME", feature_group_count=16),
    ),
    "2-D, batch groups": (
        (4, 8, 12, 12),
        (16, 8, 3, 3),
        dict(window_strides=(1, 1), padding="SAME", batch_group_count=2),
    ),
    "3-D, groups": (
        (2, 8, 8, 6, 6),
        (12, 4, 2, 3, 3),
        dict(window_strides=(1, 1, 1), padding="SAME", feature_group_count=2),
    ),
}


def sqnr_db(exact, got) -> float:
    noise = np.square(exact - np.asarray(got, np.float64)).sum()
    return float(10 * np.log10(np.square(exact).sum() / max(noise, 1e-300)))


def compare(recipe, exact_function, function, *operands):
    """SQNR in dB of the result and both gradients, and what was observed beside what is true."""
    scales = SiteScales.zeros("site", recipe.delayed_casts) if any(recipe.delayed_casts) else None
    function = jax.jit(function)
    out, backward = jax.vjp(function, *operands, scales)
    cotangent = jax.random.normal(jax.random.key(9), out.shape)
    if scales is not None:
        out, backward = jax.vjp(function, *operands, fitting(scales, backward(cotangent)[2]))
    got = (out, *jax.jit(backward)(cotangent))
    with jax.enable_x64(True):
        exact_out, exact_backward = jax.vjp(
            exact_function, *(np.asarray(x, np.float64) for x in operands)
        )
        exact = (exact_out, *exact_backward(np.asarray(cotangent, np.float64)))
        exact = [np.asarray(x) for x in exact]
    if scales is not None:
        assert [float(x) for x in (got[3].lhs, got[3].rhs, got[3].grad)] == [
            float(jnp.abs(x).max()) for x in (*operands, cotangent)
        ]
    assert [x.shape for x in got[:3]] == [x.shape for x in exact]
    return [sqnr_db(true, ours) for true, ours in zip(exact, got)]


def check(recipe, found):
    gradients = 24 if recipe.dlhs.grad.format == fp8jax.E5M2 else 27
    assert found[0] >= 27 and found[1] >= gradients and found[2] >= gradients, found
    assert min(found[:2]) < 80  # quantized at all
    assert (found[2] > 80) == (recipe.drhs.lhs is None)


# Two shapes under each recipe, each shape under two.
CASES = [
    (name, recipe)
    for name in CONVOLUTIONS
    for recipe in RECIPES
    if name in ("1-D", "2-D, strides") or recipe in ("delayed", "rowwise")
]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(
            name,
            RECIPES[recipe],
            id=f"{name}-{recipe}",
            marks=[]
            if (name, recipe) in (("2-D, strides", "delayed"), ("2-D, strides", "rowwise"))
            else [
                pytest.mark.thorough
                if recipe == "delayed" or name == "2-D, strides"
                else pytest.mark.slow
            ],
        )
        for name, recipe in CASES
    ],
)
def test_convolutions(name, recipe):
    lhs_shape, rhs_shape, options = CONVOLUTIONS[name]
    keys = jax.random.split(jax.random.key(0))
    check(
        recipe,
        compare(
            recipe,
            lambda lhs, rhs: jax.lax.conv_general_dilated(lhs, rhs, **options),
            lambda lhs, rhs, scales: conv_general_dilated(
                lhs, rhs, **options, scales=scales, recipe=recipe
            ),
            jax.random.normal(keys[0], lhs_shape),
            jax.random.normal(keys[1], rhs_shape),
        ),
    )


@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["delayed", "rowwise"]))
def test_ragged_products(recipe):
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
    keys, sizes = jax.random.split(jax.random.key(0)), jnp.array([20, 0, 33, 11], jnp.int32)
    check(
        recipe,
        compare(
            recipe,
            lambda lhs, rhs: jax.lax.ragged_dot_general(lhs, rhs, sizes, numbers),
            lambda lhs, rhs, scales: ragged_dot_general(
                lhs, rhs, sizes, numbers, scales, recipe=recipe
            ),
            jax.random.normal(keys[0], (64, 48)),
            jax.random.normal(keys[1], (4, 48, 40)),
        ),
    )


@pytest.mark.thorough
def test_under_vmap_and_in_bfloat16():
    keys = jax.random.split(jax.random.key(0))
    lhs, rhs = jax.random.normal(keys[0], (3, 2, 8, 10)), jax.random.normal(keys[1], (6, 8, 3))

    def convolve(lhs, rhs):
        return conv_general_dilated(lhs, rhs, (1,), "SAME", recipe=recipes.rowwise())

    batched = jax.jit(jax.vmap(convolve, in_axes=(0, None)))(lhs, rhs)
    np.testing.assert_allclose(
        batched, jnp.stack([convolve(x, rhs) for x in lhs]), rtol=1e-5, atol=1e-5
    )
    narrow = jax.grad(
        lambda rhs: convolve(lhs[0].astype(jnp.bfloat16), rhs).sum().astype(jnp.float32)
    )(rhs.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


def test_residuals_are_a_byte_each():
    lhs, rhs = jnp.ones((2, 8, 16)), jnp.ones((8, 8, 3))
    _, backward = jax.vjp(
        lambda lhs, rhs: conv_general_dilated(lhs, rhs, (1,), "SAME", recipe=recipes.current()),
        lhs,
        rhs,
    )
    assert (
        sum(leaf.nbytes for leaf in jax.tree.leaves(backward) if leaf.size > 1)
        == lhs.size + rhs.size
    )


CONTRACTING = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: conv_general_dilated(
                jnp.ones((1, 1, 4)),
                jnp.ones((1, 1, 3)),
                (1,),
                "SAME",
                recipe=recipes.current(execution="native"),
            ),
            ValueError,
            "execution of a convolution must be 'auto' or 'emulated'; got 'native', .* Give its "
            "sites a recipe of their own",
        ),
        (
            lambda: conv_general_dilated(
                jnp.ones((1, 1, 4), int),
                jnp.ones((1, 1, 3)),
                (1,),
                "SAME",
                recipe=recipes.current(),
            ),
            TypeError,
            "lhs must hold floats; got int32",
        ),
        (
            lambda: conv_general_dilated(
                jnp.ones((1, 1, 4)), jnp.ones((1, 1, 3)), (1,), "SAME", recipe=recipes.delayed()
            ),
            TypeError,
            "scales must be those of the recipe's operands",
        ),
        (
            lambda: ragged_dot_general(
                jnp.ones((4, 2)),
                jnp.ones((4, 3)),
                jnp.array([1, 3]),
                CONTRACTING,
                recipe=recipes.current(),
            ),
            ValueError,
            "ragged_dot_dimension_numbers must name a kept axis of lhs as the ragged one",
        ),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()
