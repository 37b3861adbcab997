"""A weight is cast once a step: in front of loops that don't change it, and for all uses side by
side.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import bodies_on_one_platform

import fp8jax
from fp8jax import _shims, recipes

LAYERS, WIDTH, MICROBATCHES = 3, 16, 4
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "layers": jax.random.normal(KEYS[0], (LAYERS, WIDTH, WIDTH)) / 4,
    "head": jax.random.normal(KEYS[1], (WIDTH, 8)),
}
BATCHES = jax.random.normal(KEYS[2], (MICROBATCHES, 5, WIDTH))
RECIPES = {
    name: getattr(recipes, name)()
    for name in ("delayed", "current", "rowwise", "rowwise_hp_wgrad", "blockwise", "mxfp8")
}
CASTS_PER_WEIGHT = {
    "delayed": 1,
    "current": 1,
    "rowwise": 2,
    "rowwise_hp_wgrad": 2,
    "blockwise": 1,
    "mxfp8": 2,
}


def layer(x, w):
    return jnp.tanh(x @ w.astype(jnp.bfloat16).T.astype(jnp.float32)), None


def looped(params, batches, wrap=lambda f: f):
    def microbatch(total, x):
        x, _ = jax.lax.scan(wrap(layer), x, params["layers"])
        return total + jnp.square(x @ params["head"]).mean(), None

    return jax.lax.scan(microbatch, 0.0, batches)[0]


def unrolled(params, batches):
    total = 0.0
    for x in batches:
        for w in params["layers"]:
            x, _ = layer(x, w)
        total = total + jnp.square(x @ params["head"]).mean()
    return total


def casts(jaxpr, times=1):
    """For each conversion to codes in a jaxpr, the shape and how many times a call of it runs."""
    found = []
    for equation in _shims.open_jaxpr(jaxpr)[0].eqns:
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        if (
            equation.params.get("new_dtype") == jnp.uint8
            and equation.invars[0].aval.dtype == jnp.uint32
        ):
            found.append((equation.outvars[0].aval.shape, times))
        for each in bodies_on_one_platform(equation):
            found += casts(each, inner)
    return found


def gradient(function, recipe):
    fp8_function = fp8jax.fp8(function, recipe)
    scales = fp8_function.init(PARAMS, BATCHES)
    return jax.value_and_grad(fp8_function, argnums=(0, 1)), scales


@pytest.mark.thorough
@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "remat", "jit"]
)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_one_cast_of_a_weight_for_each_of_its_layouts(recipe, wrap):
    if wrap in (jax.checkpoint, jax.jit) and recipe.name not in ("delayed", "rowwise"):
        pytest.skip("all wrappers under two recipes")
    step, scales = gradient(lambda params, batches: looped(params, batches, wrap), recipe)
    found = casts(jax.make_jaxpr(lambda *arguments: step(*arguments))(scales, PARAMS, BATCHES))
    expected = CASTS_PER_WEIGHT[recipe.name]
    assert (
        found.count(((LAYERS, WIDTH, WIDTH), 1)) == expected
        and found.count(((WIDTH, 8), 1)) == expected
    )
    assert not [
        times for shape, times in found if shape in ((WIDTH, WIDTH), (WIDTH, 8)) and times > 1
    ]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_weights_of_a_scan_s_layers_are_cast_in_front_of_it(wrap):
    """At once, as the backward pass would keep them; each in its iteration where a
    rematerialization keeps none.
    """

    def loss(params, x):
        return jnp.square(jax.lax.scan(wrap(layer), x, params)[0]).mean()

    fp8_loss, (params, x) = fp8jax.fp8(loss, RECIPES["delayed"]), (PARAMS["layers"], BATCHES[0])
    scales = fp8_loss.init(params, x)
    step = jax.jit(jax.grad(fp8_loss, argnums=(0, 1)))
    found = casts(jax.make_jaxpr(step)(scales, params, x))
    assert found.count(((LAYERS, WIDTH, WIDTH), 1)) == (wrap is not jax.checkpoint)
    assert (((WIDTH, WIDTH), LAYERS) in found) == (wrap is jax.checkpoint)
    (node,) = step(scales, params, x)[0].values()
    np.testing.assert_array_equal(
        node.rhs, jnp.abs(params.astype(jnp.bfloat16)).max((1, 2)).astype(jnp.float32)
    )
    assert (
        fp8jax._observe.seal_fits(jnp.stack([node.lhs, node.rhs, node.grad], -1), node.seal).all()
        and (node.grad > 0).all()
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("layers", "options"),
    [(0, {}), (5, {"unroll": 2, "reverse": True})],
    ids=["no layers", "unrolled by two, in reverse"],
)
def test_scans_of_other_kinds(layers, options):
    def loss(params, x):
        return jnp.square(
            jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params, **options)[0]
        ).mean()

    fp8_loss, x = fp8jax.fp8(loss, RECIPES["delayed"]), BATCHES[0]
    params = jax.random.normal(KEYS[0], (layers, WIDTH, WIDTH)) / 4
    amax, got = jax.jit(jax.grad(fp8_loss, argnums=(0, 1)))(fp8_loss.init(params, x), params, x)
    want, (node,) = jax.jit(jax.grad(loss))(params, x), amax.values()
    np.testing.assert_array_equal(node.rhs, jnp.abs(params).max((1, 2), initial=0.0))
    assert got.shape == want.shape and (node.grad > 0).all()
    assert not layers or 0.01 < jnp.linalg.norm(got - want) / jnp.linalg.norm(want) < 0.2


@pytest.mark.thorough
@pytest.mark.parametrize(
    "recipe",
    [
        RECIPES["rowwise"],
        *(pytest.param(RECIPES[name], marks=pytest.mark.slow) for name in ("current", "blockwise")),
    ],
    ids=lambda recipe: recipe.name,
)
def test_gradients_are_those_of_casts_in_place(recipe):
    (value, (_, got)), (expected_value, (_, expected)) = (
        jax.jit(step)(scales, PARAMS, BATCHES)
        for step, scales in (gradient(looped, recipe), gradient(unrolled, recipe))
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


def test_observations_of_weights_cast_ahead():
    step, scales = gradient(looped, RECIPES["delayed"])
    _, (amax, _) = jax.jit(step)(scales, PARAMS, BATCHES)
    seen = {site: np.asarray(node.rhs) for site, node in amax.items()}
    stored = jnp.abs(PARAMS["layers"].astype(jnp.bfloat16)).max((1, 2)).astype(jnp.float32)
    np.testing.assert_array_equal(sorted(seen.values(), key=np.ndim)[1], stored)
    np.testing.assert_array_equal(
        sorted(seen.values(), key=np.ndim)[0], jnp.abs(PARAMS["head"]).max()
    )
    assert all(
        fp8jax._observe.seal_fits(node.rhs, node.seal[..., 1]).all() for node in amax.values()
    )


def test_a_weight_used_twice_is_cast_once():
    def loss(w, x):
        return jnp.square(jnp.tanh(x @ w) @ w).mean()

    w, x = PARAMS["layers"][0], BATCHES[0]
    for recipe in (RECIPES["delayed"], RECIPES["current"]):
        fp8_loss = fp8jax.fp8(loss, recipe)
        scales = fp8_loss.init(w, x)
        jaxpr = jax.make_jaxpr(jax.grad(lambda *a: fp8_loss(*a), argnums=1))(scales, w, x)
        assert casts(jaxpr).count((w.shape, 1)) == 1
        exact = jax.grad(loss)(w, x)
        got = jax.jit(jax.grad(fp8_loss, argnums=1))(scales, w, x)
        assert 0.001 < jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact) < 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("looped", [False, True])
def test_a_weight_used_twice_has_the_exponent_of_its_first_use(looped):
    """The state of a use that some steps' calls don't lead through stays behind."""

    def product(w, x):
        return x @ w @ w

    def function(w, x):
        return (
            jax.lax.scan(lambda x, _: (product(w, x), None), x, None, length=1)[0]
            if looped
            else product(w, x)
        )

    w, x = jnp.full((16, 16), 0.25), jnp.ones((8, 16))
    fp8_function = fp8jax.fp8(function, RECIPES["delayed"])
    scales = fp8_function.init(w, x)
    first, second = sorted(scales)
    scales |= {second: scales[second].replace(rhs=scales[second].rhs + 3)}
    np.testing.assert_array_equal(fp8_function(scales, w, x), function(w, x))
    amax, got = jax.grad(lambda *args: fp8_function(*args).mean(), argnums=(0, 1))(scales, w, x)
    np.testing.assert_allclose(got, jax.grad(lambda w: function(w, x).mean())(w), rtol=0.1)
    assert float(amax[first].rhs) == float(amax[second].rhs) == 0.25


def depth_at_run_time(layers, x, steps):
    return jax.lax.fori_loop(0, steps, lambda i, x: jnp.tanh(x @ layers[i]), x)


@pytest.mark.parametrize(
    "function",
    [
        depth_at_run_time,
        lambda layers, x, steps: jax.lax.fori_loop(
            0, steps, lambda _, c: (jnp.tanh(c[0] @ c[1]), c[1] * 1.1), (x, layers[0])
        )[0],
        lambda layers, x, steps: jax.lax.scan(
            lambda x, _: (depth_at_run_time(layers, x, steps), None), x, None, length=2
        )[0],
        jax.vmap(depth_at_run_time, in_axes=(None, 0, None)),
    ],
    ids=["indexed", "carried", "in a scan", "under vmap"],
)
def test_a_weight_that_a_while_loop_changes_is_cast_inside(function):
    arguments = PARAMS["layers"], BATCHES[0], jnp.int32(LAYERS)
    for recipe in (RECIPES["current"], RECIPES["rowwise"]):
        expected, got = function(*arguments), fp8jax.fp8(function, recipe)({}, *arguments)
        assert 0.001 < jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected) < 0.2


def test_in_a_while_loop():
    def steps(w, x):
        return jax.lax.fori_loop(0, x.shape[0], lambda i, x: jnp.tanh(x @ w), x).sum()

    fp8_steps = fp8jax.fp8(steps, RECIPES["current"])
    w, x = PARAMS["layers"][0], BATCHES[0]
    found = casts(jax.make_jaxpr(lambda *a: fp8_steps(*a))({}, w, x))
    assert (w.shape, 1) in found
    np.testing.assert_allclose(fp8_steps({}, w, x), steps(w, x), atol=0.5)


def test_a_weight_that_the_loop_changes_is_cast_inside():
    def loss(w, x):
        def step(carry, x):
            w, total = carry
            return (w * 0.5, total + jnp.square(x @ w).mean()), None

        return jax.lax.scan(step, (w, 0.0), x)[0][1]

    fp8_loss = fp8jax.fp8(loss, RECIPES["delayed"])
    scales = fp8_loss.init(PARAMS["head"], BATCHES)
    _, (amax, _) = jax.value_and_grad(fp8_loss, argnums=(0, 1))(scales, PARAMS["head"], BATCHES)
    (node,) = amax.values()
    np.testing.assert_array_equal(
        node.rhs, jnp.abs(PARAMS["head"]).max() * 0.5 ** jnp.arange(MICROBATCHES, dtype=jnp.float32)
    )


def maxima_in_scans(jaxpr, shape, inside=False):
    """How many maxima of arrays of a shape the scans of a jaxpr take."""
    found = 0
    for equation in _shims.open_jaxpr(jaxpr)[0].eqns:
        is_maximum = equation.primitive.name == "reduce_max"
        found += inside and is_maximum and equation.invars[0].aval.shape == shape
        within = inside or equation.primitive.name == "scan"
        found += sum(maxima_in_scans(e, shape, within) for e in bodies_on_one_platform(equation))
    return found


@pytest.mark.parametrize(
    "name",
    [
        "rowwise",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("delayed", "current")),
    ],
)
def test_layers_in_memory_anyway_are_cast_again_in_the_backward_pass(name, monkeypatch):
    """As on GPUs, and on TPUs where the two casts are not alike: the scan keeps no codes of them,
    and no copy of their own values. Scales that are no state are made in front of it.
    """

    def layers(params, batches):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batches[0], params["layers"])
        return jnp.square(x @ params["head"]).mean()

    def stacked(jaxpr):
        found = []
        for equation in _shims.open_jaxpr(jaxpr)[0].eqns:
            if equation.primitive.name == "scan" and not equation.params["reverse"]:
                found += [variable.aval.shape for variable in equation.outvars]
            for inner in bodies_on_one_platform(equation):
                found += stacked(inner)
        return found

    step, scales = gradient(layers, RECIPES[name])
    expected = jax.jit(step)(scales, PARAMS, BATCHES)
    monkeypatch.setattr("fp8jax._transform.ahead._is_better_cast_again", lambda *_: True)
    step, _ = gradient(layers, RECIPES[name])
    got = jax.jit(step)(scales, PARAMS, BATCHES)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jnp.linalg.norm(got[1][1]["layers"]) > 0
    jaxpr = jax.make_jaxpr(lambda *args: step(*args))(scales, PARAMS, BATCHES)
    assert BATCHES[0].shape in {shape[1:] for shape in stacked(jaxpr)}
    assert PARAMS["layers"].shape not in stacked(jaxpr)
    assert casts(jaxpr).count(((WIDTH, WIDTH), LAYERS)) == 2
    assert maxima_in_scans(jaxpr, (WIDTH, WIDTH)) == 0
