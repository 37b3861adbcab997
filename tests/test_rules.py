"""Which sites get which recipe: by name, by place, by size, and by which operand is the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import BlockWise, Rule, recipes

PARAMS = {
    name: jnp.full((size, size), 0.1)
    for name, size in (("embed", 8), ("up", 8), ("down", 8), ("head", 8))
}
X = jnp.ones((4, 8))


def model(params, x):
    for name in PARAMS:
        x = jnp.tanh(x @ params[name])
    return (x @ x.T).sum()


def selected(rules=(), **options):
    explanation = fp8jax.fp8(model, recipes.current(), rules, **options).explain(PARAMS, X)
    return [site.name for site in explanation.sites if site.selected], explanation


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], "embed up down head"),
        ([Rule(".*", None, first=1, last=1)], "up down"),
        ([Rule(".*", None, first=1)], "up down head"),
        ([Rule(".*", None, last=3)], "embed"),
        ([Rule("down|up", None, last=1)], "embed up head"),
        ([Rule(".*", None, first=2, last=2), Rule(".*data", recipes.current())], "data"),
        ([Rule("up", recipes.rowwise()), Rule(".*", None, first=2)], "up down head"),
    ],
)
def test_rules_by_place(rules, expected):
    names, _ = selected(rules)
    assert names == expected.split()


def test_small_products_are_left_out_unless_a_rule_names_them():
    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["narrow"]

    params = {"up": jnp.ones((8, 64)), "narrow": jnp.ones((64, 2))}
    sites = fp8jax.fp8(fn, recipes.current(), min_flops=2 * 4 * 8 * 64).explain(params, X).sites
    assert [(site.selected, site.flops) for site in sites] == [(True, 4096), (False, 1024)]
    assert sites[1].reason == "fewer than min_flops=4096 operations"
    sites = (
        fp8jax.fp8(fn, recipes.current(), [Rule("narrow", recipes.current())], min_flops=4096)
        .explain(params, X)
        .sites
    )
    assert sites[1].selected


def test_a_product_whose_weights_are_the_lhs_gets_the_recipe_mirrored():
    recipe = recipes.blockwise()
    fn = fp8jax.fp8(lambda w, x: w @ x, recipe)
    (site,) = fn.explain(jnp.ones((8, 4)), jnp.ones((4, 3))).sites
    assert site.recipe == recipe.mirrored() != recipe
    assert site.recipe.forward.lhs.scaling == BlockWise(
        (128, 128)
    ) and site.recipe.drhs.grad.scaling == BlockWise((1, 128))
    assert (
        recipe.mirrored().mirrored() == recipe and recipes.delayed().mirrored() == recipes.delayed()
    )


@pytest.mark.parametrize(
    "recipe",
    [recipes.delayed(), pytest.param(recipes.rowwise(), marks=pytest.mark.slow)],
    ids=["delayed", "rowwise"],
)
def test_convolutions_and_ragged_products_are_sites(recipe):
    def fn(params, x, sizes):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, params["filter"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
        )
        return jax.lax.ragged_dot(x.reshape(-1, 16), params["experts"], sizes).sum()

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "filter": jax.random.normal(keys[0], (3, 8, 16)),
        "experts": jax.random.normal(keys[1], (3, 16, 8)),
    }
    x, sizes = jax.random.normal(keys[2], (2, 6, 8)), jnp.array([5, 0, 7], jnp.int32)
    exact = jax.grad(fn)(params, x, sizes)
    fp8_fn = fp8jax.fp8(fn, recipe)
    assert [site.product for site in fp8_fn.explain(params, x, sizes).sites if site.selected] == [
        "conv_general_dilated",
        "ragged_dot_general",
    ]
    scales = fp8_fn.init(params, x, sizes)
    amax, gradient = jax.jit(jax.grad(fp8_fn, argnums=(0, 1)))(scales, params, x, sizes)
    for name in params:
        error = jnp.linalg.norm(gradient[name] - exact[name]) / jnp.linalg.norm(exact[name])
        assert 1e-3 < error < 0.2
    if amax:
        assert float(amax["filter"].lhs) == float(jnp.abs(x).max()) and float(
            amax["experts"].rhs
        ) == float(jnp.abs(params["experts"]).max())
    out, observed = fp8_fn.observe(scales, params, x, sizes)
    np.testing.assert_allclose(out, fp8_fn(scales, params, x, sizes), rtol=1e-6)


def test_a_recipe_that_a_product_cannot_have_says_so():
    kernel, x = jnp.ones((3, 8, 8)), jnp.ones((1, 6, 8))
    fn = fp8jax.fp8(
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        recipes.current(execution="native"),
    )
    with pytest.raises(
        ValueError, match="execution of a convolution must be 'auto' or 'emulated'; got 'native'"
    ):
        fn({}, kernel, x)


@pytest.mark.thorough
def test_rows_that_span_six_decades():
    # Most of them small, as where few tokens have outliers: evenly spread, the middle one still
    # fits into E4M3's 5.4 decades.
    x = jax.random.normal(jax.random.key(0), (256, 512)) * 10.0 ** (
        -6 + 6 * jnp.linspace(0, 1, 256)[:, None] ** 2
    )
    w = jax.random.normal(jax.random.key(1), (512, 256)) / 20
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)

    def median_of_rows(recipe):
        out = np.asarray(fp8jax.fp8(lambda w, x: x @ w, recipe)({}, w, x), np.float64)
        return np.median(10 * np.log10((exact**2).sum(1) / ((exact - out) ** 2).sum(1)))

    by_row, by_tensor = median_of_rows(recipes.rowwise()), median_of_rows(recipes.current())
    assert by_row >= 27 and by_tensor <= by_row - 10, (by_row, by_tensor)
    assert median_of_rows(recipes.blockwise()) >= 27 and median_of_rows(recipes.mxfp8()) >= 27


def test_a_product_in_its_own_precision_is_the_users():
    """A gradient that the recipe casts nothing of keeps the product's precision, and its width."""

    def fn(w, x):
        return jax.lax.dot_general(
            x, w, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST
        ).sum()

    w, x = jnp.ones((8, 4)), jnp.ones((3, 8))
    recipe = recipes.rowwise_hp_wgrad()
    fp8_fn = fp8jax.fp8(fn, recipe, [Rule("dot", recipe)])
    text = str(jax.make_jaxpr(lambda *a: jax.grad(lambda w, x: fp8_fn({}, w, x))(*a))(w, x))
    assert "Precision.HIGHEST, Precision.HIGHEST" in text
    with jax.enable_x64(True):
        w, x = (
            jax.random.normal(jax.random.key(seed), shape, jnp.float64)
            for seed, shape in ((0, (8, 4)), (1, (3, 8)))
        )
        np.testing.assert_allclose(
            jax.grad(lambda w: fp8_fn({}, w, x))(w), jax.grad(fn)(w, x), rtol=1e-14
        )


@pytest.mark.parametrize(
    "ask",
    ["argument", "pair", "algorithm", "around", "everywhere"],
)
def test_a_product_of_float32_at_precision_highest_is_left_alone(ask):
    """A router's, whose small differences choose the experts. Bit by bit as without FP8, forward
    and backward.
    """
    highest = jax.lax.Precision.HIGHEST
    precision = {"argument": highest, "pair": (highest, highest), "algorithm": "F32_F32_F32"}.get(
        ask
    )

    def loss(params, x):
        everywhere = jax.config.jax_default_matmul_precision
        with jax.default_matmul_precision("highest" if ask == "around" else everywhere):
            routed = jax.lax.dot(x, params["router"], precision=precision)
        return jnp.square(routed).sum() + jnp.square(x @ params["expert"]).sum()

    params, x = {"router": jnp.eye(8) + 0.013, "expert": jnp.eye(8)}, jnp.full((4, 8), 1.07)
    rules = [fp8jax.Rule("expert", None)]
    with jax.default_matmul_precision("float32" if ask == "everywhere" else None):
        # With none selected, a call would say so.
        left = fp8jax.fp8(loss, recipes.current(), rules if ask == "everywhere" else ())
        router, expert = left.explain(params, x).sites
        assert not router.selected and "precision HIGHEST of float32" in router.reason
        assert expert.selected == (ask != "everywhere")
        fp8_loss = fp8jax.fp8(loss, recipes.current(), rules)
        got = jax.jit(jax.value_and_grad(fp8_loss, argnums=1))({}, params, x)
        jax.tree.map(
            np.testing.assert_array_equal, got, jax.jit(jax.value_and_grad(loss))(params, x)
        )
        overruled = fp8jax.fp8(loss, recipes.current(), [fp8jax.Rule("router", recipes.current())])
        assert overruled.explain(params, x).sites[0].selected
        assert abs(float(overruled({}, params, x)) / float(loss(params, x)) - 1) > 1e-5
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
        if ask != "algorithm":  # which is of float32 alone
            assert all(
                s.selected for s in fp8jax.fp8(loss, recipes.current()).explain(*narrow).sites
            )
