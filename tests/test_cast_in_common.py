"""What several sites read is cast and observed once, by the first one's scale."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxprs import bodies_on_one_platform
from test_ahead import casts

import fp8jax
from fp8jax import _shims, recipes
from fp8jax._monitor import monitor
from fp8jax._observe import seal_fits

KEYS = jax.random.split(jax.random.key(0), 6)
WEIGHTS = {name: jax.random.normal(key, (16, 16)) / 4 for name, key in zip("qkvo", KEYS)}
LAYERS = {name: jax.random.normal(key, (3, 16, 16)) / 4 for name, key in zip("qkvo", KEYS)}
X = jax.random.normal(KEYS[4], (8, 16))
RECIPES = {"delayed": recipes.delayed(), "current": recipes.current(), "rowwise": recipes.rowwise()}


def layer(x, weights, copy=lambda x: x):
    q, k, v = x @ weights["q"], copy(x) @ weights["k"], copy(copy(x)) @ weights["v"]
    return x + jnp.tanh(q * jax.nn.sigmoid(k) + v) @ weights["o"], None


def apart(x):
    """The same, as another array to the program."""
    return jnp.abs(x) * jnp.sign(x)


def loss_of(layers, x, wrap=lambda f: f, copy=lambda x: x):
    body = wrap(lambda x, weights: layer(x, weights, copy))
    return jnp.square(jax.lax.scan(body, x, layers)[0]).mean()


def step_of(fp8_loss):
    return jax.jit(jax.value_and_grad(fp8_loss, argnums=(0, 1)))


def code_stacks(jaxpr):
    """The shapes of what scans of a jaxpr stack as codes."""
    found = []
    for equation in _shims.open_jaxpr(jaxpr)[0].eqns:
        if equation.primitive.name == "scan":
            avals = [variable.aval for variable in equation.outvars]
            found += [aval.shape for aval in avals if aval.dtype in (jnp.uint8, jnp.float8_e4m3fn)]
        for inner in bodies_on_one_platform(equation):
            found += code_stacks(inner)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_cast_once_and_kept_once(name):
    fp8_loss = fp8jax.fp8(loss_of, RECIPES[name])
    scales = jax.eval_shape(fp8_loss.init, LAYERS, X)
    step = jax.value_and_grad(fp8_loss, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(lambda *args: step(*args))(scales, LAYERS, X)
    forward, gradients = (2, 4) if name != "rowwise" else (4, 8)
    assert casts(jaxpr).count((X.shape, 3)) == forward + gradients
    assert code_stacks(jaxpr).count((3, *X.shape)) == 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        pytest.param(jax.checkpoint, marks=pytest.mark.thorough),
        pytest.param(jax.jit, marks=pytest.mark.thorough),
    ],
    ids=["plain", "remat", "jit"],
)
def test_values_gradients_and_observations_are_those_of_casts_apart(wrap):
    scales, results = fp8jax.fp8(loss_of, RECIPES["delayed"]).init(LAYERS, X), []
    for copy in (lambda x: x, apart):
        fp8_loss = fp8jax.fp8(
            lambda layers, x, copy=copy: loss_of(layers, x, wrap, copy), RECIPES["delayed"]
        )
        results.append(step_of(fp8_loss)(scales, LAYERS, X))
        found = fp8_loss.explain(LAYERS, X).sites
        assert [bool(site.cast_with) for site in found] == (
            [False, True, True, False] if copy is not apart else [False] * 4
        )
    (value, (amax, got)), (expected_value, (expected_amax, expected)) = results
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, expected)
    exact = jax.grad(loss_of)(LAYERS, X)
    for name in exact:
        error = jnp.linalg.norm(got[name] - exact[name]) / jnp.linalg.norm(exact[name])
        assert 0.01 < error < 0.2
    for site, node in amax.items():
        np.testing.assert_allclose(node.lhs, expected_amax[site].lhs, rtol=1e-6)
        np.testing.assert_allclose(node.grad, expected_amax[site].grad, rtol=1e-4)
        operands = jnp.stack([node.lhs, node.rhs, node.grad], -1)
        assert seal_fits(operands, node.seal).all() and (operands > 0).all()


def rounded(x, exponent):
    """Oracle: codes of ml_dtypes, decoded."""
    scale = np.float32(2.0**exponent)
    clipped = np.clip(np.asarray(x) / scale, -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def heads(weights, x):
    return x @ weights["q"], x.astype(jnp.float32) @ weights["k"]


def test_the_scale_is_the_first_ones_and_alone_it_is_a_sites_own():
    fp8_heads = fp8jax.fp8(heads, RECIPES["delayed"])
    scales = fp8_heads.init(WEIGHTS, X)
    scales |= {"q": scales["q"].replace(lhs=scales["q"].lhs + 5.0)}  # coarse, with subnormals
    own = {
        name: {op: float(getattr(node, op)) for op in ("lhs", "rhs")}
        for name, node in scales.items()
    }
    q, k = jax.jit(fp8_heads)(scales, WEIGHTS, X)
    for got, name in ((q, "q"), (k, "k")):
        want = rounded(X, own["q"]["lhs"]) @ rounded(WEIGHTS[name], own[name]["rhs"])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    observed = jax.jit(jax.grad(lambda s: sum(map(jnp.sum, fp8_heads(s, WEIGHTS, X)))))(scales)
    for node in (observed["q"], observed["k"], fp8_heads.observe(scales, WEIGHTS, X)[1]["k"]):
        assert float(node.lhs) == float(jnp.abs(X).max())

    alone = fp8jax.fp8(
        lambda weights, x: heads(weights, x)[1], RECIPES["delayed"], rules=[fp8jax.Rule("q", None)]
    )
    got = jax.jit(alone)(scales, WEIGHTS, X)
    want = rounded(X, own["k"]["lhs"]) @ rounded(WEIGHTS["k"], own["k"]["rhs"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def in_one_branch(weights, x, flag):
    return jax.lax.cond(
        flag, lambda x: x @ weights["q"] + x @ weights["k"], lambda x: x @ weights["v"], x
    )


def test_a_branch_that_is_not_taken_observes_nothing():
    fp8_fn = fp8jax.fp8(in_one_branch, RECIPES["delayed"])
    scales = fp8_fn.init(WEIGHTS, X, True)
    amax = jax.jit(jax.grad(lambda s, flag: fp8_fn(s, WEIGHTS, X, flag).sum()))
    taken, other = amax(scales, True), amax(scales, False)
    largest = float(jnp.abs(X).max())
    assert {name: float(node.lhs) for name, node in taken.items()} == {
        "q": largest,
        "k": largest,
        "v": 0.0,
    }
    assert {name: float(node.lhs) for name, node in other.items()} == {
        "q": 0.0,
        "k": 0.0,
        "v": largest,
    }


def test_batches_and_members_with_scales_of_their_own():
    fp8_heads = fp8jax.fp8(heads, RECIPES["delayed"])
    scales = fp8_heads.init(WEIGHTS, X)
    x = jnp.stack([X, 3 * X])

    def total(scales, x):
        return sum(map(jnp.sum, fp8_heads(scales, WEIGHTS, x)))

    shared = jax.jit(jax.grad(lambda s: jax.vmap(total, in_axes=(None, 0))(s, x).sum()))(scales)
    assert float(shared["k"].lhs) == float(shared["q"].lhs) == float(jnp.abs(x).max())
    # Only the follower's, or only the leader's, for each member.
    for site in scales:
        stacked = dict(scales) | {
            site: jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), scales[site])
        }
        axes = {name: 0 if name == site else None for name in scales}
        got = jax.jit(jax.grad(lambda s, axes=axes: jax.vmap(total, (axes, 0))(s, x).sum()))(
            stacked
        )
        for node in got.values():
            assert float(node.lhs.max()) == float(jnp.abs(x).max())
            operands = jnp.stack([node.lhs, node.rhs, node.grad], -1)
            assert seal_fits(operands, node.seal).all()


def test_devices_that_each_see_a_part():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("x")
    mapped = jax.shard_map(
        lambda weights, x: heads(weights, x),
        mesh=mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=(spec, spec),
    )
    fp8_heads = fp8jax.fp8(mapped, RECIPES["delayed"])
    scales = fp8_heads.init(WEIGHTS, X)
    assert dict(fp8_heads.explain(WEIGHTS, X).sites[1].cast_with) == {"lhs": "q"}
    amax = jax.jit(jax.grad(lambda s: sum(map(jnp.sum, fp8_heads(s, WEIGHTS, X)))))(scales)
    assert float(amax["q"].lhs) == float(amax["k"].lhs) == float(jnp.abs(X).max())


@pytest.mark.parametrize(
    "function, rules",
    [
        (heads, [fp8jax.Rule("k", recipes.current())]),
        (lambda w, x: (x @ w["q"], x.T @ w["k"][:8]), []),
        (lambda w, x: (x @ w["q"], (x + 1) @ w["k"]), []),
        (lambda w, x: (x @ w["q"], x.astype(jnp.bfloat16) @ w["k"].astype(jnp.bfloat16)), []),
    ],
    ids=["another cast", "another layout", "another array", "another dtype"],
)
def test_what_is_not_alike_has_casts_of_its_own(function, rules):
    recipe = RECIPES["rowwise"] if not rules else RECIPES["delayed"]
    sites = fp8jax.fp8(function, recipe, rules=rules).explain(WEIGHTS, X).sites
    assert [site.cast_with for site in sites] == [(), ()]


def test_explain_says_whose_scale_it_is():
    found = fp8jax.fp8(loss_of, RECIPES["delayed"]).explain(LAYERS, X)
    assert "lhs cast with q" in " ".join(str(found).split())
    sites = {site["name"]: site for site in json.loads(found.to_json())["sites"]}
    assert sites["v"]["cast_with"] == {"lhs": "q"} and sites["o"]["cast_with"] == {}


@pytest.mark.thorough
def test_the_monitor_sees_each_site():
    fp8_loss = fp8jax.fp8(loss_of, RECIPES["delayed"])
    errors = monitor(fp8_loss, progress=False)(fp8_loss.init(LAYERS, X), LAYERS, X)
    assert all(20 < site.forward < 60 for site in errors.sites) and len(errors.sites) == 4
