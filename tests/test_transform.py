"""`fp8jax.fp8`: which products become sites, under which names, and what of a function survives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

import fp8jax
from fp8jax import Rule, recipes
from fp8jax._state import map_site_scales

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (16, 16))
X = jax.random.normal(jax.random.fold_in(KEY, 1), (8, 16))


def mlp(params, x):
    with jax.named_scope("up"):
        h = jax.nn.relu(x @ params["up"])
    with jax.named_scope("down"):
        return jnp.square(h @ params["down"]).mean()


PARAMS = {"up": W, "down": 2.0 * W}


def transformed(fn, *args, rules=(), recipe=None, weights=0):
    fp8_fn = fp8jax.fp8(fn, recipe or recipes.delayed(), rules, weights)
    return fp8_fn, fp8_fn.init(*args)


def count_float8_products(fn, *args) -> int:
    return str(jax.make_jaxpr(fn)(*args)).count("preferred_element_type=float32")


# --- selection and names
# -----------------------------------------------------------------------------------------


def attention(w, x):
    q, k, v = (x @ w[name] for name in "qkv")
    return (jax.nn.softmax(q @ k.T) @ v) @ w["o"]


SELECTION = {
    "a weight and data": (lambda w, x: x @ w, [True]),
    "data and a weight": (lambda w, x: w @ x.T, [True]),
    "a cast and masked weight": (
        lambda w, x: (
            x @ jnp.where(jnp.arange(16) > 3, w, 0.0).astype(jnp.bfloat16).astype(jnp.float32)
        ),
        [True],
    ),
    "weights alone": (lambda w, x: x + (w @ w)[:8], [False]),
    "data alone": (lambda w, x: x @ x.T + w[:8, :8], [False]),
    "low rank": (lambda w, x: (x @ w[:, :4]) @ w[:4], [True, True]),
    "attention": (
        lambda w, x: attention({n: w for n in "qkvo"}, x),
        [True, True, True, False, False, True],
    ),
    "a weight that data chose": (lambda w, x: x @ jnp.where(x[0, 0] > 0, w, -w), [False]),
    "an unchanged carry": (
        lambda w, x: jax.lax.scan(lambda c, _: ((c[0], c[1] @ c[0]), None), (w, x), length=2)[0][1],
        [True],
    ),
    "a changed carry": (
        lambda w, x: jax.lax.scan(lambda c, _: ((c[0] * 0.5, c[1] @ c[0]), None), (w, x), length=2)[
            0
        ][1],
        [True],
    ),
    "a carry that mixes": (
        lambda w, x: jax.lax.scan(
            lambda c, _: ((c[0] + c[1].sum(), c[1] @ c[0]), None), (w, x), length=2
        )[0][1],
        [False],
    ),
}


@pytest.mark.parametrize("case", SELECTION)
def test_selection(case):
    fn, selected = SELECTION[case]
    explanation = fp8jax.fp8(fn, recipes.delayed()).explain(W, X)
    assert [site.selected for site in explanation.sites] == selected
    assert all(site.reason for site in explanation.sites)


def test_scales_are_stacked_where_the_weight_changes_and_shared_where_it_does_not():
    shared, changing = (
        fp8jax.fp8(SELECTION[name][0], recipes.delayed()).explain(W, X).sites[0].stack
        for name in ("an unchanged carry", "a changed carry")
    )
    assert shared == () and changing == (2,)


def test_names_are_scopes_with_a_counter():
    @jax.jit
    def helper(w, x):
        with jax.named_scope("inner"):
            return jax.checkpoint(lambda w, x: jnp.einsum("ij,jk->ik", x, w) @ w)(w, x)

    def fn(w, x):
        with jax.named_scope("block"):
            x = helper(w, x)
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w[None])[0] @ w

    names = [site.name for site in fp8jax.fp8(fn, recipes.delayed()).explain(W, X).sites]
    assert names == ["block/inner", "block/inner#1", "dot", "dot#1"]


def test_names_do_not_depend_on_the_callers_scopes():
    fp8_fn, scales = transformed(mlp, PARAMS, X)
    with jax.named_scope("elsewhere"):
        jax.jit(jax.grad(fp8_fn))(scales, PARAMS, X)
    assert sorted(scales) == ["down", "up"]


def test_names_are_the_same_inside_an_inner_gradient():
    def outer(params, x):
        return jax.grad(mlp, argnums=1)(params, x).sum()

    names = {site.name for site in fp8jax.fp8(outer, recipes.delayed()).explain(PARAMS, X).sites}
    assert {"up", "down"} <= names


def test_rules_are_ordered_and_can_select_attention():
    def fn(w, x):
        with jax.named_scope("attn"):
            return attention(w, x).sum()

    w = {name: W for name in "qkvo"}
    current = recipes.current()
    rules = (
        Rule("attn:k", None),
        Rule(r"attn/data(#1)?", current),
        Rule("attn:[ovw]", recipes.delayed(margin=2.0)),
    )
    sites = fp8jax.fp8(fn, recipes.delayed(), rules).explain(w, X).sites
    assert [site.recipe and site.recipe.name for site in sites] == [
        "delayed",
        None,
        "delayed",
        "current",
        "current",
        "delayed",
    ]
    assert sites[1].reason == "left out by rule 'attn:k'"
    assert sites[5].recipe.forward.lhs.delayed.margin == 2.0


# --- what survives
# -------------------------------------------------------------------------------------------------


def zoo(w, x):
    """Every primitive that is entered, nested."""

    def body(x, w):
        x = jax.checkpoint(
            lambda w, x: jax.nn.gelu(x @ w), policy=jax.checkpoint_policies.dots_saveable
        )(w, x)
        return jax.lax.cond(
            x.mean() > 0, lambda x: jax.nn.relu(x @ w), lambda x: jax.jit(jnp.sin)(x), x
        ), x.sum()

    x, sums = jax.lax.scan(body, x, jnp.stack([w, w.T, -w]), reverse=True, unroll=2)
    x, _ = jax.lax.scan(lambda x, _: (jax.jit(jnp.tanh)(x @ w), None), x, length=2)
    return jnp.square(jax.vmap(lambda x: x @ w)(x)).mean() + sums.sum()


def test_with_every_site_skipped_values_and_gradients_are_bitwise_the_same():
    fp8_fn = fp8jax.fp8(zoo, recipes.delayed(), (Rule(".*", None),))
    want, got = (
        jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
        for fn in (zoo, functools.partial(fp8_fn, {}))
    )
    for ours, theirs in zip(jax.tree.leaves(got(W, X)), jax.tree.leaves(want(W, X)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_of_branches_for_platforms_only_the_own_one_is_lowered():
    """Others need not even compile here."""

    def on_tpu(w, x):
        return pallas.pallas_call(
            lambda w, x, out: None, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype)
        )(w, x)

    def fn(w, x):
        return jnp.square(
            jax.lax.platform_dependent(w, x, tpu=on_tpu, default=lambda w, x: x @ w) @ w
        ).mean()

    fp8_fn = fp8jax.fp8(fn, recipes.delayed(), weights=np.int64(0))
    value, amax = fp8_fn.observe(fp8_fn.init(W, X), W, X)
    want = jax.jit(fn)(W, X)
    assert 0 < abs(value - want) < 0.1 * want
    assert [float(node.rhs) for node in amax.values()] == [float(jnp.abs(W).max())] * 2


def test_with_sites_on_gradients_are_close_and_every_site_is_cast():
    fp8_fn, scales = transformed(zoo, W, X)
    sites = fp8_fn.explain(W, X).sites
    assert len(sites) == len(scales) == 4 and all(site.selected for site in sites)
    value, gradients = jax.jit(jax.value_and_grad(fp8_fn, argnums=(1, 2)))(scales, W, X)
    want, exact = jax.value_and_grad(zoo, argnums=(0, 1))(W, X)
    assert abs(value - want) < 0.1 * abs(want)
    for ours, theirs in zip(gradients, exact, strict=True):
        cosine = jnp.vdot(ours, theirs) / jnp.linalg.norm(ours) / jnp.linalg.norm(theirs)
        assert cosine > 0.9 and 0.8 < jnp.linalg.norm(ours) / jnp.linalg.norm(theirs) < 1.25
        assert not jnp.array_equal(ours, theirs)


def test_pytrees_static_arguments_and_auxiliary_outputs():
    def fn(params, batch, *, activation, layers, label=None):
        x = batch["x"]
        for _ in range(layers):
            x = activation(x @ params[0])
        return x.sum(), {"x": x, "label": batch["y"], "none": None}

    batch = {"x": X, "y": np.arange(3), "unused": None}
    options = dict(activation=jnp.tanh, layers=2)
    fp8_fn = fp8jax.fp8(fn, recipes.delayed())
    scales = fp8_fn.init((W,), batch, **options)
    assert sorted(scales) == ["0", "0#1"]
    (value, aux), _ = jax.value_and_grad(fp8_fn, argnums=1, has_aux=True)(
        scales, (W,), batch, **options
    )
    assert (
        aux["none"] is None
        and aux["x"].shape == X.shape
        and bool((aux["label"] == jnp.arange(3)).all())
    )
    assert fp8_fn.__name__ == "fn"
    with pytest.raises(TypeError, match="static and must be hashable; got .*dict_keys"):
        fp8_fn(scales, (W,), batch, activation={}.keys(), layers=2)


def test_weights_in_several_arguments():
    def fn(x, w, v):
        return (x @ w).sum() + (x @ v).sum()

    sites = fp8jax.fp8(fn, recipes.delayed(), weights=(1, 2)).explain(X, W, W).sites
    assert all(site.selected for site in sites)
    sites = fp8jax.fp8(fn, recipes.delayed(), weights=2).explain(X, W, W).sites
    assert [site.selected for site in sites] == [False, True]


def test_a_jitted_helper_gives_each_caller_its_own_result():
    helper = jax.jit(lambda w, x: x @ w)
    for first in ("plain", "fp8"):
        jax.clear_caches()
        fp8_fn = fp8jax.fp8(lambda w, x: helper(w, x).sum(), recipes.current())
        plain = lambda w, x: helper(w, x).sum()
        results = {}
        for name in ("plain", "fp8") if first == "plain" else ("fp8", "plain"):
            results[name] = plain(W, X) if name == "plain" else fp8_fn({}, W, X)
        assert (
            results["plain"] == jax.jit(lambda w, x: (x @ w).sum())(W, X)
            and results["fp8"] != results["plain"]
        )


def test_current_scaling_needs_no_state():
    fp8_fn, scales = transformed(mlp, PARAMS, X, recipe=recipes.current())
    assert len(scales) == 0 and not jax.tree.leaves(scales)
    value, grads = jax.value_and_grad(fp8_fn, argnums=1)(scales, PARAMS, X)
    assert abs(value - mlp(PARAMS, X)) < 0.05 * value and jnp.abs(grads["up"]).max() > 0


def test_donation_and_eval_shape():
    fp8_fn = fp8jax.fp8(mlp, recipes.delayed())
    shapes = jax.eval_shape(fp8_fn.init, PARAMS, X)
    scales = fp8_fn.init(PARAMS, X)
    assert jax.tree.structure(shapes) == jax.tree.structure(scales)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(shapes)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(scales)
    ]
    step = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + 1.0, s), donate_argnums=0)
    assert float(step(scales)["up"].lhs) < 0


def test_bfloat16_function_keeps_its_dtypes():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    fp8_fn, scales = transformed(mlp, params, X.astype(jnp.bfloat16))
    value, (amax, grads) = jax.value_and_grad(fp8_fn, argnums=(0, 1))(
        scales, params, X.astype(jnp.bfloat16)
    )
    assert value.dtype == grads["up"].dtype == jnp.bfloat16 and amax["up"].lhs.dtype == jnp.float32


# --- first scales
# ------------------------------------------------------------------------------------------------


def test_init_fits_the_operands_amaxes_and_the_gradients_of_a_loss():
    fp8_fn, scales = transformed(lambda w, x: (x @ w).sum() * 2.0**-20, W, X)
    node = scales["dot"]
    assert float(node.lhs) == np.ceil(np.log2(float(jnp.abs(X).max()) / 448))
    assert float(node.rhs) == np.ceil(np.log2(float(jnp.abs(W).max()) / 448))
    assert float(node.grad) == np.ceil(np.log2(2.0**-20 / 57344))


def test_a_first_step_at_a_tiny_loss_scale_keeps_its_gradients():
    """On a scale of 1 these would all flush to zero."""
    tiny = lambda params, x: mlp(params, x) * 1e-9
    fp8_fn, scales = transformed(tiny, PARAMS, X)
    grads = jax.grad(fp8_fn, argnums=1)(scales, PARAMS, X)
    exact = jax.grad(tiny)(PARAMS, X)
    flushed = jax.tree.map(jnp.zeros_like, scales)
    for name in PARAMS:
        assert jnp.linalg.norm(grads[name] - exact[name]) < 0.15 * jnp.linalg.norm(exact[name])
        assert not jnp.any(jax.grad(fp8_fn, argnums=1)(flushed, PARAMS, X)["up"])


def test_operands_that_saw_only_zeros_take_the_smallest_scale():
    params = {"up": W, "down": jnp.zeros_like(W)}
    fn = lambda params, x: ((x @ params["up"]) @ params["down"]).sum() * 1e-6
    _, scales = transformed(fn, params, X)
    assert float(scales["up"].grad) == float(scales["down"].grad) < -30
    assert float(scales["down"].rhs) == float(scales["up"].rhs)


def test_a_function_without_a_loss_gets_gradients_scales_with_headroom():
    _, scales = transformed(lambda w, x: x @ w, W, X)
    assert float(scales["dot"].grad) == np.ceil(np.log2(16.0 / 8 / 57344))


def test_calibrate_fits_the_largest_amax_of_all_batches_and_leaves_out_what_is_not_finite():
    fp8_fn, scales = transformed(mlp, PARAMS, X)
    batches = [(PARAMS, X * factor) for factor in (1.0, 100.0, float("nan"), 10.0)]
    calibrated = fp8jax.calibrate(fp8_fn, scales, batches)
    assert float(calibrated["up"].lhs) == np.ceil(np.log2(100 * float(jnp.abs(X).max()) / 448))
    assert float(calibrated["up"].grad) > float(scales["up"].grad)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(calibrated))


def test_migrate_scales_carries_over_what_matches():
    _, old = transformed(mlp, PARAMS, X * 8.0)
    grown = lambda params, x: mlp(params, x) + (x @ params["head"]).sum()
    _, new = transformed(grown, PARAMS | {"head": W}, X)
    migrated = fp8jax.migrate_scales({"anywhere": old}, new)
    for name, source in (("up", old), ("head", new)):
        jax.tree.map(np.testing.assert_array_equal, migrated[name], source[name])
    assert float(old["up"].lhs) == float(new["up"].lhs) + 3
    with pytest.raises(
        ValueError, match=r"old must share a site .* got the sites \['down', 'up'\] and \['head'\]"
    ):
        fp8jax.migrate_scales(old, {"head": new["head"]})


# --- errors
# --------------------------------------------------------------------------------------------------


def call_with(scales):
    return lambda: fp8jax.fp8(mlp, recipes.delayed())(
        scales(fp8jax.fp8(mlp, recipes.delayed()).init(PARAMS, X)), PARAMS, X
    )


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: fp8jax.fp8(3, recipes.delayed()),
            TypeError,
            "fn must be a function; got 3. Pass the function itself",
        ),
        (
            lambda: fp8jax.fp8(mlp, "delayed"),
            TypeError,
            r"recipe must be a Recipe; got 'delayed'. Use fp8jax.recipes.delayed\(\)",
        ),
        (
            lambda: fp8jax.fp8(mlp, recipes.delayed(), ("up",)),
            TypeError,
            "rules must be a sequence of Rule; got 'up' in it",
        ),
        (
            lambda: fp8jax.fp8(mlp, recipes.delayed(), Rule("up", None)),
            TypeError,
            r"rules must be a sequence of Rule; got Rule\(.*\) itself. Write \[fp8jax.Rule",
        ),
        (
            lambda: fp8jax.fp8(mlp, recipes.delayed(), weights="params"),
            TypeError,
            "weights must be the position of an argument",
        ),
        (
            lambda: fp8jax.fp8(mlp, recipes.delayed(), weights=0.5),
            TypeError,
            "weights must be the position of an argument",
        ),
        (
            lambda: fp8jax.fp8(mlp, recipes.delayed(), weights=2).init(PARAMS, X),
            ValueError,
            r"weights must be positions of .* got \(2,\)",
        ),
        (
            lambda: fp8jax.fp8(mlp, recipes.delayed(), (Rule("lm_head", None),)).init(PARAMS, X),
            ValueError,
            "pattern of a rule must match the name of a site; got 'lm_head', which matches none. "
            "The sites are: up, down.",
        ),
        (
            lambda: fp8jax.fp8(mlp, recipes.current(), (Rule("lm_head", None),))({}, PARAMS, X),
            ValueError,
            "pattern of a rule must match the name of a site; got 'lm_head'",
        ),
        (
            lambda: fp8jax.fp8(lambda w, x: w.sum() + x.sum(), recipes.delayed()).init(W, X),
            ValueError,
            "fn must have a product to run in FP8; got .* with none selected",
        ),
        (
            lambda: fp8jax.fp8(lambda w, x: w @ x, recipes.delayed()).init(
                jnp.ones((2, 2), jnp.int32), jnp.ones((2, 2), jnp.int32)
            ),
            ValueError,
            "fn must have a product to run in FP8",
        ),
        (
            lambda: fp8jax.fp8(lambda w, x: w @ x, recipes.delayed())(W, X),
            TypeError,
            r"must have the scales first, .*: \(scales, /, w, x\); got one with missing a required "
            "argument: 'x'. Pass what init gave",
        ),
        (
            lambda: fp8jax.fp8(lambda w, x: w @ x, recipes.delayed()).observe(X),
            TypeError,
            "must have the scales first, .* missing a required argument: 'w'",
        ),
        (
            lambda: fp8jax.fp8(lambda w, x: w @ x, recipes.delayed()).amaxes(W, X),
            TypeError,
            "must have the scales first, .* missing a required argument: 'x'",
        ),
        (
            call_with(lambda s: {}),
            ValueError,
            "scales must hold every site .* got none for down, up. Make them with init "
            ".*migrate_scales",
        ),
        (
            call_with(lambda s: [s, s]),
            ValueError,
            "scales must hold each site once; got site '(up|down)' twice",
        ),
        (
            call_with(
                lambda s: (
                    s
                    | {
                        "up": fp8jax.SiteScales.zeros(
                            "up", recipes.delayed(margin=3.0).delayed_casts
                        )
                    }
                )
            ),
            ValueError,
            "scales of site 'up' must be those of its recipe",
        ),
        (
            call_with(lambda s: jax.tree.map(lambda leaf: leaf[None], s)),
            ValueError,
            r"scales of site 'down' must have lhs of float32\[\]; got float32\[1\]. They are of "
            r"another model, or were cast",
        ),
        (
            call_with(lambda s: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), s)),
            ValueError,
            r"got bfloat16\[\]",
        ),
        (
            lambda: fp8jax.calibrate(fp8jax.fp8(mlp, recipes.delayed()), {}, []),
            ValueError,
            "batches must hold at least one tuple",
        ),
        (
            lambda: fp8jax.calibrate(fp8jax.fp8(mlp, recipes.delayed()), {}, (PARAMS, X)),
            TypeError,
            "batches must be tuples of arguments, one for each pass; got dict among them",
        ),
        (
            lambda: fp8jax.calibrate(fp8jax.fp8(mlp, recipes.delayed()), {}, X),
            TypeError,
            r"batches must be tuples of arguments; got \w+. Write \[\(params, x\)\]",
        ),
        (
            lambda: fp8jax.calibrate(mlp, {}, [(PARAMS, X)]),
            TypeError,
            r"fp8_fn must be what fp8jax.fp8 returns; got function. Wrap the loss",
        ),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_surplus_scales_do_no_harm():
    fp8_fn, scales = transformed(mlp, PARAMS, X)
    surplus = {
        "more": fp8jax.SiteScales.zeros("elsewhere", recipes.delayed().delayed_casts),
        **scales,
    }
    assert fp8_fn(surplus, PARAMS, X) == fp8_fn(scales, PARAMS, X)
    observed = jax.grad(fp8_fn)(surplus, PARAMS, X)
    assert float(observed["more"].lhs) == 0 and float(observed["up"].lhs) > 0


def test_forward_mode_is_refused():
    fp8_fn, scales = transformed(mlp, PARAMS, X)
    fn = lambda x: fp8_fn(scales, PARAMS, x)
    of_scales = lambda scales: fp8_fn(scales, PARAMS, X)
    for forward in (
        lambda: jax.jvp(fn, (X,), (X,)),
        jax.jit(lambda: jax.jvp(fn, (X,), (X,))),
        lambda: jax.jacfwd(fn)(X),
        lambda: jax.jvp(of_scales, (scales,), (scales,)),
    ):
        with pytest.raises(
            NotImplementedError,
            match="reverse-mode derivatives only; got a forward-mode one, .* Use jax.grad",
        ):
            forward()


def test_derivatives_inside_of_the_function_are_transformed_too():
    fn = lambda w, x: jnp.tanh(0.1 * x @ w).sum()
    penalty = lambda w, x: jnp.square(jax.grad(fn, argnums=1)(w, x)).sum()
    fp8_penalty, scales = transformed(penalty, W, X)
    exact, got = jax.grad(penalty)(W, X), jax.grad(fp8_penalty, argnums=1)(scales, W, X)
    assert 0 < jnp.linalg.norm(got - exact) < 0.2 * jnp.linalg.norm(exact)


def test_static_arguments_are_told_apart_by_type_and_sign():
    fn = lambda w, x, s: (x @ w).sum() * 0.0 + (3 / s if isinstance(s, float) else 3 // s)
    fp8_fn, scales = transformed(fn, W, X, 2)
    assert float(fp8_fn(scales, W, X, 2)) == 1.0 and float(fp8_fn(scales, W, X, 2.0)) == 1.5
    signed = fp8jax.fp8(lambda w, x, c: jnp.copysign((x @ w).mean(), c), recipes.current())
    assert signed({}, W, X, 0.0) == -signed({}, W, X, -0.0) > 0
    assert (
        fp8jax.fp8(lambda w, x, dtype: (x @ w).astype(dtype), recipes.current())(
            {}, W, X, np.float32
        ).dtype
        == jnp.float32
    )


def test_jit_finds_its_static_arguments_by_name_and_position():
    fn = lambda w, x, n: (x @ w).sum() * n
    fp8_fn, scales = transformed(fn, W, X, 3)
    assert jax.jit(fp8_fn, static_argnames="n")(scales, W, X, n=3) == fp8_fn(scales, W, X, 3)
    assert jax.jit(fp8_fn, static_argnums=3)(scales, W, X, 3) == fp8_fn(scales, W, X, 3)


def test_an_average_of_scales_is_no_scale():
    fp8_fn, scales = transformed(mlp, PARAMS, X)
    averaged = map_site_scales(
        lambda node: node.replace(lhs=node.lhs + 0.5, rhs=node.rhs + 0.5), scales
    )
    with pytest.raises(ValueError, match="scales must hold exponents as integers, .* got lhs of"):
        fp8_fn(averaged, PARAMS, X)
    assert jnp.isnan(jax.jit(fp8_fn)(averaged, PARAMS, X))


def test_a_call_without_a_selected_product_is_refused():
    with pytest.raises(
        ValueError, match="fn must have a product to run in FP8; got .* with none selected"
    ):
        fp8jax.fp8(lambda w, x: x @ w, recipes.current(), weights=(0, 1))({}, W, X)
    assert fp8jax.fp8(mlp, recipes.delayed(), (Rule(".*", None),)).init(PARAMS, X).keys() == set()


def test_a_rule_may_match_nothing_in_a_partial_call_but_not_at_init():
    def fn(params, x, *, head):
        return mlp(params, x) if head else (x @ params["up"]).sum()

    fp8_fn = fp8jax.fp8(fn, recipes.delayed(), (Rule("down", None),))
    scales = fp8_fn.init(PARAMS, X, head=True) | fp8jax.fp8(fn, recipes.delayed()).init(
        PARAMS, X, head=False
    )
    assert jnp.isfinite(fp8_fn(scales, PARAMS, X, head=False))


def test_products_in_a_loops_condition_are_reported():
    fn = lambda w, x: jax.lax.while_loop(lambda c: (c @ w).sum() < 0, jnp.sin, x) @ w
    sites = fp8jax.fp8(fn, recipes.delayed()).explain(W, X).sites
    assert [site.selected for site in sites] == [
        False,
        True,
    ] and "condition of a while loop" in sites[0].reason
