"""Observed amaxes equal the true ones, exactly, under every transformation.

The functions here return what their products read (`lhs`), and add zeros (`eps`) to what they give:
the gradient with respect to these zeros is the gradient that the product received. So each case
knows the true amaxes from values that went through the same FP8 function.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiers import thorough_but

import fp8jax
from fp8jax._observe import largest_amax, seal_fits, seal_of

LAYERS, BATCH, WIDTH = 3, 8, 16


def layer(w, x, eps):
    """A product, its lhs, and a nonlinearity, so that each layer sees values of another size."""
    return jnp.tanh(x @ w + eps) * 2.0, x


def loss_of(x):
    return jnp.square(x).sum() * 1e-3


def once(w, x, eps):
    out, lhs = layer(w[0], x, eps[0])
    return loss_of(out), lhs[None]


def twice(w, x, eps):
    """A layer used twice: two sites, each with amaxes of its own."""
    x, first = layer(w[0], x, eps[0])
    x, second = layer(w[0], x, eps[1])
    return loss_of(x), jnp.stack([first, second])


def helper_twice(w, x, eps):
    helper = jax.jit(layer)
    x, first = helper(w[0], x, eps[0])
    x, second = helper(w[0], x * 3.0, eps[1])
    return loss_of(x), jnp.stack([first, second])


def stacked_scan(w, x, eps):
    return loss_and_seen(
        jax.lax.scan(lambda x, slices: layer(slices[0], x, slices[1]), x, (w, eps))
    )


def stacked_scan_remat(w, x, eps):
    body = jax.checkpoint(lambda x, slices: layer(slices[0], x, slices[1]))
    return loss_and_seen(jax.lax.scan(body, x, (w, eps)))


def shared_scan(w, x, eps):
    return loss_and_seen(jax.lax.scan(lambda x, eps: layer(w[0], x * 1.5, eps), x, eps))


def shared_scan_reversed(w, x, eps):
    return loss_and_seen(
        jax.lax.scan(lambda x, eps: layer(w[0], x * 1.5, eps), x, eps, reverse=True)
    )


def indexed_loop(w, x, eps):
    def body(carry, eps):
        x, index = carry
        x, seen = layer(jax.lax.dynamic_index_in_dim(w, index, keepdims=False), x, eps)
        return (x, index + 1), seen

    (x, _), seen = jax.lax.scan(body, (x, 0), eps)
    return loss_of(x), seen


def loss_and_seen(result):
    return loss_of(result[0]), result[1]


def scan_of_scan(w, x, eps):
    """Outer iterations share the weights, inner ones are stacked layers."""

    def outer(x, eps):
        return jax.lax.scan(lambda x, slices: layer(slices[0], x, slices[1]), x * 1.5, (w, eps))

    x, seen = jax.lax.scan(outer, x, eps.reshape(2, LAYERS, BATCH, WIDTH))
    return loss_of(x), seen.reshape(2 * LAYERS, BATCH, WIDTH)


def remat(w, x, eps):
    out, lhs = jax.checkpoint(layer)(w[0], x, eps[0])
    return loss_of(out), lhs[None]


def vmap_inside(w, x, eps):
    out, lhs = jax.vmap(layer, in_axes=(None, 0, 0))(w[0], x, eps[0])
    return loss_of(out), lhs[None]


def cond_taken(w, x, eps):
    return jax.lax.cond(x.sum() < 1e9, lambda: once(w, x, eps), lambda: (0.0, x[None]))


def inner_jit(w, x, eps):
    return jax.jit(jax.checkpoint(jax.jit(once)))(w, x, eps)


# Function: number of products, and over which of them each entry of a scale spans.
CASES = {
    once: [[0]],
    twice: [[0], [1]],
    helper_twice: [[0], [1]],
    stacked_scan: [[[0], [1], [2]]],
    stacked_scan_remat: [[[0], [1], [2]]],
    shared_scan: [[0, 1, 2]],
    shared_scan_reversed: [[0, 1, 2]],
    indexed_loop: [[[0], [1], [2]]],
    scan_of_scan: [[[0, 3], [1, 4], [2, 5]]],
    remat: [[0]],
    vmap_inside: [[0]],
    cond_taken: [[0]],
    inner_jit: [[0]],
}


def arguments(products):
    keys = jax.random.split(jax.random.key(1), 2)
    w = (
        jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH))
        * jnp.array([0.5, 2.0, 1.0])[:, None, None]
    )
    return w, jax.random.normal(keys[1], (BATCH, WIDTH)), jnp.zeros((products, BATCH, WIDTH))


def flat(spans):
    return [index for entry in spans for index in (entry if isinstance(entry, list) else [entry])]


def amax(x, axes=None) -> np.ndarray:
    return np.abs(np.asarray(x)).max(axes)


def expected_amaxes(spans, lhs, weight_of, gradients):
    """True amaxes of a site whose scale, or each entry of whose stacked scale, spans these
    products.
    """
    stacked = isinstance(spans[0], list)
    entries = spans if stacked else [spans]
    per_entry = [
        (amax(lhs[np.array(e)]), max(amax(weight_of(i)) for i in e), amax(gradients[np.array(e)]))
        for e in entries
    ]
    columns = [np.array(column, np.float32) for column in zip(*per_entry)]
    return columns if stacked else [column[0] for column in columns]


@pytest.mark.parametrize("jitted", thorough_but({"eager": False, "jit": True}, ["jit"]))
@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_observed_amax_is_the_true_one(fn, jitted):
    sites = CASES[fn]
    products = len({index for spans in sites for index in flat(spans)})
    w, x, eps = arguments(products)
    fp8_fn = fp8jax.fp8(fn, fp8jax.recipes.delayed())
    scales = fp8_fn.init(w, x, eps)
    assert len(scales) == len(sites)
    gradient = jax.value_and_grad(fp8_fn, argnums=(0, 3), has_aux=True)
    (_, lhs), (observed, gradients) = (jax.jit(gradient) if jitted else gradient)(scales, w, x, eps)
    weights_shared = fn not in (stacked_scan, stacked_scan_remat, indexed_loop, scan_of_scan)
    for node, spans in zip(observed.values(), sites, strict=True):
        want = expected_amaxes(
            spans,
            np.asarray(lhs),
            lambda i: w[0 if weights_shared else i % LAYERS],
            np.asarray(gradients),
        )
        for got, true in zip((node.lhs, node.rhs, node.grad), want, strict=True):
            np.testing.assert_array_equal(got, true)
            assert (np.asarray(got) > 0).all()
        stacked = jnp.stack([node.lhs, node.rhs, node.grad], axis=-1)
        assert bool(seal_fits(stacked, node.seal).all())


def test_vmap_outside_grad_observes_the_whole_batch_once():
    w, x, eps = arguments(1)
    fp8_fn = fp8jax.fp8(once, fp8jax.recipes.delayed())
    scales = fp8_fn.init(w, x, eps)
    xs = jnp.stack([x, 5.0 * x, 0.1 * x])
    gradient = jax.grad(fp8_fn, argnums=(0, 3), has_aux=True)
    (observed, gradients), lhs = jax.jit(
        jax.vmap(gradient, in_axes=(None, None, 0, None), out_axes=((0, 0), 0))
    )(scales, w, xs, eps)
    node = observed["dot"]
    for got, true in ((node.lhs, amax(lhs)), (node.rhs, amax(w[0])), (node.grad, amax(gradients))):
        np.testing.assert_array_equal(got, np.full(3, true))


def test_vmap_inside_value_and_grad_outside():
    w, x, eps = arguments(1)
    fp8_fn = fp8jax.fp8(once, fp8jax.recipes.delayed())
    scales = fp8_fn.init(w, x, eps)
    xs = jnp.stack([x, 5.0 * x, 0.1 * x])

    def mean(scales, eps):
        losses, seen = jax.vmap(fp8_fn, in_axes=(None, None, 0, 0))(scales, w, xs, eps)
        return losses.mean(), seen

    (observed, gradients), seen = jax.grad(mean, argnums=(0, 1), has_aux=True)(
        scales, jnp.zeros((3, *eps.shape))
    )
    node = observed["dot"]
    for got, true in ((node.lhs, amax(seen)), (node.rhs, amax(w[0])), (node.grad, amax(gradients))):
        np.testing.assert_array_equal(got, true)


def test_an_ensemble_has_amaxes_per_member():
    w, x, eps = arguments(1)
    fp8_fn = fp8jax.fp8(once, fp8jax.recipes.delayed())
    scales = fp8_fn.init(w, x, eps)
    members = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), scales)
    ws = jnp.stack([w, 4.0 * w, 0.5 * w])
    gradient = jax.grad(fp8_fn, argnums=(0, 3), has_aux=True)
    (observed, gradients), _ = jax.vmap(gradient, in_axes=(0, 0, None, None))(members, ws, x, eps)
    node = observed["dot"]
    np.testing.assert_array_equal(node.lhs, np.full(3, amax(x)))
    np.testing.assert_array_equal(node.rhs, amax(ws[:, 0], (1, 2)))
    np.testing.assert_array_equal(node.grad, amax(gradients, (1, 2, 3)))


@pytest.mark.thorough
def test_an_ensemble_that_shares_the_scales_of_one_site():
    """Those have the largest amaxes of all members; the other site's are per member."""
    fp8_fn = fp8jax.fp8(
        lambda params, x: jnp.square(jnp.tanh(x @ params["own"]) @ params["shared"]).sum(),
        fp8jax.recipes.delayed(),
    )
    keys = jax.random.split(jax.random.key(5), 3)
    members = {
        "own": jax.random.normal(keys[0], (3, 8, 16)),
        "shared": jax.random.normal(keys[1], (3, 16, 4))
        * jnp.array([1.0, 3.0, 0.5])[:, None, None],
    }
    x = jax.random.normal(keys[2], (5, 8))
    scales = fp8_fn.init(jax.tree.map(lambda leaf: leaf[0], members), x)
    scales = dict(scales) | {"own": jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), scales["own"])}
    observed = jax.jit(jax.vmap(jax.grad(fp8_fn), in_axes=({"own": 0, "shared": None}, 0, None)))(
        scales, members, x
    )
    np.testing.assert_array_equal(observed["own"].rhs, amax(members["own"], (1, 2)))
    np.testing.assert_array_equal(observed["shared"].rhs, np.full(3, amax(members["shared"])))
    for node in observed.values():
        assert bool(
            seal_fits(jnp.stack([node.lhs, node.rhs, node.grad], axis=-1), node.seal).all()
        ) and bool((node.grad > 0).all())


def test_accumulate_over_microbatches_keeps_the_largest():
    w, x, eps = arguments(1)
    fp8_fn = fp8jax.fp8(once, fp8jax.recipes.delayed())
    scales = fp8_fn.init(w, x, eps)
    gradient = jax.jit(jax.grad(fp8_fn, argnums=(0, 1, 3), has_aux=True))
    steps = [gradient(scales, w, x * (1.0 + i % 5), eps)[0] for i in range(8)]
    merged, dw, _ = functools.reduce(fp8jax.accumulate, steps)
    node = merged["dot"]
    np.testing.assert_array_equal(node.lhs, max(amax(x * (1.0 + i)) for i in range(5)))
    np.testing.assert_array_equal(node.grad, max(amax(step[2]) for step in steps))
    np.testing.assert_allclose(dw, sum(step[1] for step in steps), rtol=1e-6)
    assert bool(seal_fits(jnp.stack([node.lhs, node.rhs, node.grad]), node.seal).all())


def test_gspmd_observes_the_global_amax():
    w, x, eps = arguments(1)
    fp8_fn = fp8jax.fp8(once, fp8jax.recipes.delayed())
    scales = fp8_fn.init(w, x, eps)
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    placed = (
        w,
        jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))),
        jax.device_put(eps, NamedSharding(mesh, PartitionSpec(None, "data"))),
    )
    (observed, gradients), lhs = jax.jit(jax.grad(fp8_fn, argnums=(0, 3), has_aux=True))(
        scales, *placed
    )
    node = observed["dot"]
    assert len(lhs.sharding.device_set) == 4
    for got, true in ((node.lhs, amax(x)), (node.rhs, amax(w[0])), (node.grad, amax(gradients))):
        np.testing.assert_array_equal(got, true)


def test_a_branch_observes_those_that_take_it_alone():
    def fn(w, x, flag):
        return jax.lax.cond(flag, lambda: (x @ w[0]).sum(), lambda: (x @ w[1]).sum())

    w, x, _ = arguments(1)
    fp8_fn = fp8jax.fp8(fn, fp8jax.recipes.delayed())
    scales = fp8_fn.init(w, x, True)
    observed = jax.grad(fp8_fn)(scales, w, x, jnp.array(True))
    taken, untaken = sorted(observed.values(), key=lambda node: -float(node.lhs))
    assert float(taken.lhs) == amax(x) and float(taken.grad) == 1.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(untaken))
    flags = jnp.array([True, False, True])
    xs = jnp.stack([x, 5.0 * x, 0.1 * x])
    each = jax.vmap(jax.grad(fp8_fn), in_axes=(None, None, 0, 0))(scales, w, xs, flags)
    together = jax.grad(
        lambda s: jax.vmap(fp8_fn, in_axes=(None, None, 0, 0))(s, w, xs, flags).sum()
    )(scales)
    assert sorted(float(node.lhs) for node in together.values()) == [amax(x), amax(5.0 * x)]
    for name, node in together.items():
        assert float(node.grad) == 1.0
        np.testing.assert_array_equal(each[name].lhs, np.full(3, node.lhs))
        assert seal_fits(node.lhs, node.seal[0]) and seal_fits(node.grad, node.seal[2])


@pytest.mark.thorough
def test_observe_gives_the_forward_amaxes_of_every_iteration():
    w, x, eps = arguments(LAYERS)
    for fn in (stacked_scan, shared_scan, indexed_loop, cond_taken):
        fp8_fn = fp8jax.fp8(fn, fp8jax.recipes.delayed())
        scales = fp8_fn.init(w, x, eps)
        (_, lhs), observed = fp8_fn.observe(scales, w, x, eps)
        (node,) = observed.values()
        spans = CASES[fn][0]
        entries = spans if isinstance(spans[0], list) else [spans]
        want = np.array([amax(np.asarray(lhs)[np.array(entry)]) for entry in entries])
        np.testing.assert_array_equal(node.lhs, want if isinstance(spans[0], list) else want[0])
        assert not np.any(node.grad)
        assert jax.tree.structure(observed) == jax.tree.structure(scales)


def test_the_original_tangent_rule_of_a_custom_jvp_survives():
    @jax.custom_jvp
    def product(w, x):
        return x @ w

    @product.defjvp
    def _(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        return product(w, x), 7.0 * (x @ dw) + dx @ w

    w, x, _ = arguments(1)
    fp8_fn = fp8jax.fp8(lambda w, x: product(w, x).sum(), fp8jax.recipes.delayed())
    scales = fp8_fn.init(w[0], x)
    observed, dw = jax.jit(jax.grad(fp8_fn, argnums=(0, 1)))(scales, w[0], x)
    np.testing.assert_allclose(dw, 7.0 * x.sum(0)[:, None] * jnp.ones((1, WIDTH)), rtol=1e-5)
    assert float(observed["dot"].lhs) == amax(x) and float(observed["dot"].rhs) == amax(w[0])
    assert fp8_fn(scales, w[0], x) != (x @ w[0]).sum()


@pytest.mark.parametrize(
    "merge",
    [lambda a, b: a + b, lambda a, b: (a + b) / 2, lambda a, b: 0.5 * b, lambda a, b: 2.0 * a],
)
def test_a_seal_breaks_where_something_else_than_max_merged(merge):
    a, b = jnp.float32(1.0), jnp.float32(1.25)
    assert not seal_fits(merge(a, b), merge(seal_of(a), seal_of(b)))


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 3.7, 3e38])
def test_a_seal_of_any_finite_amax_fits(value):
    assert seal_fits(jnp.float32(value), seal_of(jnp.float32(value)))


def test_amaxes_of_a_function_called_twice_in_one_loss_are_found():
    w, x, eps = arguments(1)
    fp8_fn = fp8jax.fp8(once, fp8jax.recipes.delayed())
    scales = fp8_fn.init(w, x, eps)
    observed = jax.grad(lambda s: fp8_fn(s, w, x, eps)[0] + fp8_fn(s, w, 2.0 * x, eps)[0])(scales)[
        "dot"
    ]
    added = jnp.stack([observed.lhs, observed.rhs, observed.grad])
    assert not seal_fits(added, observed.seal).any() and observed.uses == 2
    joint = [jax.grad(lambda s, x=x: fp8_fn(s, w, x, eps)[0])(scales)["dot"] for x in (x, 2.0 * x)]
    merged = jax.tree.map(jnp.maximum, *joint)
    found, fits = largest_amax(added, observed.seal, observed.uses)
    np.testing.assert_allclose(found, [merged.lhs, merged.rhs, merged.grad], rtol=1e-3)
    assert fits.all()


def test_a_while_loop_is_observed_forward():
    def fn(w, x, steps):
        seen = jnp.zeros((4, *x.shape))
        _, x, seen = jax.lax.while_loop(
            lambda c: c[0] < steps,
            lambda c: (c[0] + 1, c[1] @ w[0], c[2].at[c[0]].set(c[1])),
            (0, x, seen),
        )
        return (x @ w[1]).sum(), seen

    w, x, _ = arguments(1)
    fp8_fn = fp8jax.fp8(fn, fp8jax.recipes.delayed())
    w = tuple(w)
    scales = fp8_fn.init(w, x, jnp.int32(3))
    (_, seen), observed = fp8_fn.observe(scales, w, x, jnp.int32(3))
    assert float(observed["0"].lhs) == amax(seen) and float(observed["0"].rhs) == amax(w[0])
    assert fp8_fn(scales, w, x, jnp.int32(3))[0] != fn(w, x, jnp.int32(3))[0]
    gradient = jax.grad(lambda s, v: fp8_fn(s, (w[0], v), x, jnp.int32(3))[0], argnums=(0, 1))
    observed, dv = gradient(scales, w[1])
    assert not observed["0"].lhs and float(observed["1"].rhs) == amax(w[1]) and bool(jnp.any(dv))


@jax.custom_vjp
def own_product(w, x, factor):
    return x @ w * factor


def own_product_backward(residuals, g):
    w, x = residuals
    return 7.0 * (x.T @ g), g @ w.T, None


own_product.defvjp(lambda w, x, factor: (own_product(w, x, factor), (w, x)), own_product_backward)


def test_the_backward_rule_of_a_custom_vjp_survives():
    fn = lambda w, x: jnp.square(own_product(w[0], x, 2)).sum() + (x @ w[1]).sum()
    w, x, _ = arguments(1)
    fp8_fn = fp8jax.fp8(fn, fp8jax.recipes.delayed())
    assert [site.selected for site in fp8_fn.explain(w, x).sites] == [True, True]
    scales = fp8_fn.init(w, x)
    out = fp8jax.fp8(lambda w, x: own_product(w, x, 2), fp8jax.recipes.delayed())(
        {"dot": scales["dot"]}, w[0], x
    )
    assert not jnp.array_equal(out, own_product(w[0], x, 2))
    for gradient in (jax.grad(fp8_fn, argnums=(0, 1)), jax.jit(jax.grad(fp8_fn, argnums=(0, 1)))):
        observed, dw = gradient(scales, w, x)
        np.testing.assert_allclose(dw[0], 14.0 * (x.T @ out), rtol=1e-4, atol=1e-3)
        assert (
            float(observed["dot"].lhs) == amax(x)
            and float(observed["dot"].rhs) == amax(w[0])
            and not observed["dot"].grad
        )
    _, observed = fp8_fn.observe(scales, w, x)
    assert float(observed["dot"].lhs) == amax(x)


def test_a_transformed_function_is_not_transformed_again():
    w, x, eps = arguments(1)
    inner = fp8jax.fp8(once, fp8jax.recipes.current())
    fn = lambda w, x: inner({}, w, x, eps)[0] + (x @ w[1]).sum()
    assert [site.name for site in fp8jax.fp8(fn, fp8jax.recipes.delayed()).explain(w, x).sites] == [
        "dot"
    ]
