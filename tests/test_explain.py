"""`explain`: every product as a row and as data: what was decided, why, and what to do."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

import fp8jax
from fp8jax import Rule, recipes
from fp8jax._transform.explain import formats_of

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (16, 16))
X = jax.random.normal(jax.random.fold_in(KEY, 1), (8, 16))
PARAMS = {"up": W, "down": 2.0 * W}


def mlp(params, x):
    return jnp.square(jax.nn.relu(x @ params["up"]) @ params["down"]).mean()


@pytest.mark.parametrize(
    "recipe, formats",
    [
        (recipes.delayed(), "delayed: E4M3.E4M3, E5M2.E4M3, E4M3.E5M2"),
        (
            recipes.rowwise_hp_wgrad(),
            "rowwise_hp_wgrad: E4M3/PerToken.E4M3/PerToken, E4M3/PerToken.E4M3/PerToken, own.own",
        ),
        (recipes.mxfp8(), "mxfp8: E4M3/1x32.E4M3/1x32, E4M3/1x32.E4M3/1x32, E4M3/1x32.E4M3/1x32"),
        (None, "-"),
    ],
)
def test_formats_name_each_cast_and_what_shares_a_scale(recipe, formats):
    assert formats_of(recipe) == formats


def test_explain_prints_and_exports_every_site():
    explanation = fp8jax.fp8(mlp, recipes.delayed(), (Rule("down", None),)).explain(PARAMS, X)
    text = str(explanation)
    assert "1 of 2 products in FP8: 50.0% of 8.19 k FLOPs" in text
    assert all(
        part in text
        for part in (
            "up",
            "down",
            "f32[8,16]",
            "left out by rule",
            formats_of(recipes.delayed())[:20],
        )
    )
    data = json.loads(explanation.to_json())
    up, down = data["sites"]
    flops = 2 * 8 * 16 * 16
    assert (up["selected"], down["selected"]) == (True, False) and up["recipe"]["name"] == "delayed"
    assert data["totals"] == {
        "sites": 2,
        "selected": 1,
        "flops": 2 * flops,
        "selected_flops": flops,
        "share": 0.5,
    }
    assert [(name, product["flops"]) for name, product in up["products"].items()] == [
        (name, flops) for name in ("forward", "dlhs", "drhs")
    ]
    assert (
        up["products"]["dlhs"]["casts"]["grad"]["format"] == "E5M2"
        and up["products"]["drhs"]["casts"]["lhs"]["format"] == "E4M3"
    )
    assert (
        down["products"]["forward"]["casts"] is None and down["reason"] == "left out by rule 'down'"
    )
    assert up["lhs"] == "float32[8,16]" and up["source"].startswith("test_explain.py:")


def test_flops_count_every_iteration_and_explain_takes_shapes():
    def fn(w, x):
        return jax.lax.scan(
            lambda x, w: (jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0], None), x, w
        )[0]

    shapes = (
        jax.ShapeDtypeStruct((3, 16, 16), jnp.float32),
        jax.ShapeDtypeStruct((8, 16), jnp.float32),
    )
    (site,) = fp8jax.fp8(fn, recipes.delayed()).explain(*shapes).sites
    assert site.flops == 3 * 5 * 2 * 8 * 16 * 16 and site.stack == (3,)


def test_what_cannot_be_entered_is_reported_with_its_products():
    def closing_over(w, x):
        @jax.custom_vjp
        def own(x):
            return x @ w

        own.defvjp(lambda x: (own(x), None), lambda _, g: (g @ w.T,))
        return own(x)

    def fn(w, x):
        x = jax.lax.conv_general_dilated(
            x[None],
            w[:3, :, None].transpose(0, 2, 1),
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=16,
        )[0]
        x = jax.lax.custom_linear_solve(lambda v: v @ w, x, lambda _, b: b, symmetric=True)
        return closing_over(w, x) @ w

    sites = fp8jax.fp8(fn, recipes.delayed()).explain(W, X).sites
    assert [site.selected for site in sites] == [True, False, False, False, True]
    assert "inside custom_linear_solve, which is left as it is" in sites[1].reason
    assert "custom_vjp whose rules close over traced values" in sites[3].reason


def test_products_of_a_pallas_kernel_are_listed_with_what_to_do():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def fn(w, x):
        return (
            pallas.pallas_call(
                kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True
            )(x, w)
            @ w
        )

    inside, outside = fp8jax.fp8(fn, recipes.delayed()).explain(W, X).sites
    assert (
        "inside pallas_call, which is left as it is: use fp8jax.ops.dot_general in the place of "
        "the kernel" in inside.reason
    )
    assert outside.selected and inside.source != outside.source
