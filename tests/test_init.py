"""First scales: what `init` makes of functions that have no gradient, and of ensembles."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import metrics, recipes

W, X = jax.random.normal(jax.random.key(0), (16, 16)), jax.random.normal(jax.random.key(1), (8, 16))


def loss(w, x):
    return jnp.square(x @ w).mean()


@pytest.mark.parametrize("function", [loss, lambda w, x: x @ w], ids=["loss", "outputs"])
def test_members_of_an_ensemble_have_scales_of_their_own(function):
    """One for all would be the largest one's, and flush the smallest one's gradients to zero."""
    fp8_function = fp8jax.fp8(function, recipes.delayed())
    members = jnp.stack([1e-4 * W, 1e4 * W])
    scales = jax.vmap(fp8_function.init, in_axes=(0, None))(members, X)
    alone = [fp8_function.init(member, X) for member in members]
    jax.tree.map(
        np.testing.assert_array_equal,
        scales,
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone),
    )
    got = jax.vmap(fp8_function, in_axes=(0, 0, None))(scales, members, X)
    for ours, member in zip(got, members, strict=True):
        assert (
            0
            < jnp.linalg.norm(ours - function(member, X))
            < 0.1 * jnp.linalg.norm(function(member, X))
        )


def test_a_batch_that_shares_its_weights_shares_its_scales():
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    scales = jax.vmap(fp8_loss.init, in_axes=(None, 0), out_axes=None)(W, X[:, None])
    jax.tree.map(np.testing.assert_array_equal, scales["dot"].lhs, fp8_loss.init(W, X)["dot"].lhs)


def test_of_a_scalar_without_a_gradient():
    """What comes behind a while loop of unknown length: a score for early stopping, say."""

    def score(w, x, steps):
        return jax.lax.fori_loop(0, steps, lambda _, x: jnp.tanh(x @ w), x).mean()

    fp8_score = fp8jax.fp8(score, recipes.delayed())
    scales = fp8_score.init(W, X, jnp.int32(3))
    assert (
        float(scales["dot"].lhs) == float(jnp.ceil(jnp.log2(jnp.abs(X).max() / 448)))
        and float(scales["dot"].grad) == 0
    )
    np.testing.assert_allclose(fp8_score(scales, W, X, jnp.int32(3)), score(W, X, 3), atol=0.02)
    errors = metrics.monitor(fp8_score)(scales, W, X, jnp.int32(3))
    assert [(site.name, site.dlhs) for site in errors.sites] == [
        ("dot", None)
    ] and 20 < errors.sites[0].forward < 40
    calibrated = fp8jax.calibrate(fp8_score, scales, [(W, 16 * X, jnp.int32(3))])
    assert calibrated["dot"].lhs == scales["dot"].lhs + 4


def test_shapes_alone_have_no_first_scales():
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    shapes = jax.eval_shape(lambda: (W, X))
    with pytest.raises(
        TypeError,
        match=r"arguments of init must be arrays, .*; got a ShapeDtypeStruct. .* use "
        r"jax.eval_shape\(fp8_fn.init, ...\)",
    ):
        fp8_loss.init(*shapes)
    assert jax.eval_shape(fp8_loss.init, *shapes)["dot"].lhs.shape == ()


def test_within_a_derivative():
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    got = jax.grad(lambda w: fp8_loss(fp8_loss.init(w, X), w, X))(W)
    np.testing.assert_array_equal(got, jax.grad(fp8_loss, argnums=1)(fp8_loss.init(W, X), W, X))


def instructions(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().as_text().count(" = ")


@pytest.mark.thorough
def test_init_compiles_in_less_than_half_of_what_a_gradient_does():
    """A compiler's time goes with the instructions it ends with. Where each site's first scale
    depends on all others', as those of operands that saw only zeros do, they may grow with the
    square of the number of sites; and where operands are cast for it, they are those of a gradient.
    """

    def deep(weights, x):
        for index, weight in enumerate(weights):
            x = jax.lax.dot_general(x, weight, (((1,), (0,)), ((), ())))
            x = jnp.tanh(x) if index % 2 else jnp.maximum(x, 0)
        return jnp.square(x).mean()

    fp8_loss, weights = fp8jax.fp8(deep, recipes.delayed()), [W] * 24
    shapes = jax.eval_shape(fp8_loss.init, weights, X)
    gradient = jax.value_and_grad(fp8_loss, argnums=(0, 1))
    of_gradient = instructions(gradient, shapes, weights, X)
    assert 0.1 < instructions(fp8_loss.init, weights, X) / of_gradient < 0.5


@pytest.mark.thorough
def test_init_of_a_linen_module_compiles_less_than_a_gradient_beside_its_own():
    """Its own is mostly Flax's random numbers, for each parameter."""
    module = nn.Sequential([layer for _ in range(12) for layer in (nn.Dense(16), nn.tanh)])
    model, key = fp8jax.linen.Fp8(module, recipes.delayed()), jax.random.key(0)
    gradient = jax.grad(lambda variables: jnp.square(model.apply(variables, X)).mean())
    of_gradient = instructions(gradient, jax.eval_shape(model.init, key, X))
    added = instructions(model.init, key, X) - instructions(module.init, key, X)
    assert 0.1 < added / of_gradient < 0.6


def test_what_saw_only_zeros_takes_the_smallest_exponent_of_its_kind():
    """Over sites whose scales are stacked and whose aren't, with casts alike and not."""

    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.square((x @ params["a"] + x @ params["b"]) @ params["out"]).mean()

    params = {"layers": jnp.stack([W, 8 * W]), "a": W, "b": 0 * W, "out": 0 * W}
    rules = [fp8jax.Rule("b", recipes.delayed(margin=4.0))]
    scales = fp8jax.fp8(loss, recipes.delayed(), rules).init(params, X)
    seen = [scales["layers"].rhs[0], scales["layers"].rhs[1], scales["a"].rhs]
    assert scales["b"].rhs == scales["out"].rhs == min(map(float, seen)) == scales["a"].rhs < 0
    assert scales["layers"].rhs[1] == scales["layers"].rhs[0] + 3
    assert all(float(jnp.max(node.grad)) == 0.0 for node in scales.values())  # a gradient of zeros
