"""Second derivatives of functions in FP8: of the quantized values, with casts as the identity."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fp8jax
from fp8jax import _shims, recipes

needs_rules = pytest.mark.skipif(
    not _shims.KEEPS_RULES, reason="JAX before 0.12 loses rules in scans"
)
KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (32, 16))
PARAMS = {
    "w": jax.random.normal(KEYS[1], (16, 32)) / 4.0,
    "v": jax.random.normal(KEYS[2], (32, 16)) / 5.0,
}
ALONG = jax.tree.map(lambda leaf: jax.random.normal(KEYS[3], leaf.shape), PARAMS)


def twice(recipe):
    return dataclasses.replace(recipe, second_order=True)


def mlp(params, x):
    return jnp.square(jnp.tanh(x @ params["w"]) @ params["v"]).mean()


def deep(params, x):
    """The layers shared by a scan, and checkpointed."""
    layer = jax.checkpoint(lambda params, x: x + jnp.tanh(x @ params["w"]) @ params["v"])
    return jnp.square(jax.lax.scan(lambda x, _: (layer(params, x), None), x, length=2)[0]).mean()


def hessian_times(fn, params):
    def dot(params):
        return sum(
            jnp.vdot(a, b)
            for a, b in zip(jax.tree.leaves(jax.grad(fn)(params)), jax.tree.leaves(ALONG))
        )

    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(dot)(params))])


@pytest.mark.thorough
@needs_rules
@pytest.mark.parametrize(
    ("fn", "recipe"),
    [(mlp, recipes.delayed()), (deep, recipes.delayed()), (mlp, recipes.rowwise())],
    ids=["delayed", "scan and checkpoint", "rowwise"],
)
def test_a_hessian_vector_product_is_close_to_the_unquantized_one(fn, recipe):
    fp8_fn = fp8jax.fp8(fn, twice(recipe))
    scales = fp8_fn.init(PARAMS, X)
    got = jax.jit(lambda params: hessian_times(lambda params: fp8_fn(scales, params, X), params))(
        PARAMS
    )
    want = jax.jit(lambda params: hessian_times(lambda params: fn(params, X), params))(PARAMS)
    norm = jnp.linalg.norm(want)
    assert (
        jnp.vdot(got, want) / norm / jnp.linalg.norm(got) > 0.99
        and abs(jnp.linalg.norm(got) / norm - 1) < 0.05
    )
    assert 1e-3 < jnp.linalg.norm(got - want) / norm < 0.12


def cast(array, fmt_max, dtype):
    """By ml_dtypes and a power of two that fits the amax."""
    array = np.asarray(array, np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.abs(array).max() / fmt_max))
    return (array / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


@needs_rules
def test_it_is_exactly_that_of_the_values_that_were_cast():
    """Of sum((x w)^2) / 2, whose second derivative is x^T x whatever w is; x at its codes' values,
    nothing else cast.
    """
    fp8_fn = fp8jax.fp8(lambda w, x: jnp.square(x @ w).sum() / 2, twice(recipes.delayed()))
    scales = fp8_fn.init(PARAMS["w"], X)
    dot = jax.jit(
        jax.grad(
            lambda w, x: jnp.vdot(jax.grad(fp8_fn, argnums=1)(scales, w, x), ALONG["w"]),
            argnums=(0, 1),
        )
    )
    x = cast(X, 448, ml_dtypes.float8_e4m3fn)
    dw, dx = dot(PARAMS["w"], X)
    np.testing.assert_allclose(
        dw, x.T @ (x @ np.asarray(ALONG["w"], np.float64)), rtol=1e-5, atol=1e-4
    )
    # d/dx of <x^T g(x w), v> is g(x w) v^T + (x v) w^T: the inner gradient at its codes' values,
    # too.
    w, out = cast(PARAMS["w"], 448, ml_dtypes.float8_e4m3fn), None
    out = np.asarray(jnp.asarray(x @ w, jnp.float32))
    v = np.asarray(ALONG["w"], np.float64)
    want = cast(out, 57344, ml_dtypes.float8_e5m2) @ v.T + (x @ v) @ w.T
    np.testing.assert_allclose(dx, want, rtol=1e-4, atol=1e-3 * np.abs(want).max())


@needs_rules
def test_first_derivatives_are_the_same_bits_and_observations_are_the_operands():
    plain, kept = fp8jax.fp8(mlp, recipes.delayed()), fp8jax.fp8(mlp, twice(recipes.delayed()))
    scales = plain.init(PARAMS, X)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.jit(jax.grad(fn, argnums=(0, 1)))(scales, PARAMS, X) for fn in (plain, kept)),
    )
    penalty = lambda s, p: sum(
        jnp.square(leaf).sum() for leaf in jax.tree.leaves(jax.grad(kept, argnums=1)(s, p, X))
    )
    observed = jax.jit(jax.grad(penalty))(scales, PARAMS)
    assert float(observed["w"].lhs) == float(jnp.abs(X).max()) and float(
        observed["v"].rhs
    ) == float(jnp.abs(PARAMS["v"]).max())
    assert not observed["w"].grad and float(observed["w"].seal[0]) == float(
        jnp.sqrt(jnp.abs(X).max())
    )


@pytest.mark.thorough
@needs_rules
def test_third_derivatives():
    """Of exp(x w): x^3 exp(x w), x and w at the values of their codes."""
    fp8_fn = fp8jax.fp8(lambda w, x: jnp.exp(x @ w).sum(), twice(recipes.current()))
    w, x = jnp.full((1, 1), 0.7), jnp.full((1, 1), 1.3)
    derivative = lambda w: fp8_fn({}, w, x)
    for _ in range(3):
        derivative = (lambda of: lambda w: jax.grad(lambda w: of(w).sum())(w))(derivative)
    np.testing.assert_allclose(jax.jit(derivative)(w), 1.25**3 * np.exp(0.6875 * 1.25), rtol=1e-5)


def test_it_must_be_asked_for():
    fp8_fn = fp8jax.fp8(mlp, recipes.delayed())
    scales = fp8_fn.init(PARAMS, X)
    with pytest.raises(
        NotImplementedError,
        match="first derivatives only, unless its recipe says second_order=True; got a second",
    ):
        hessian_times(lambda params: fp8_fn(scales, params, X), PARAMS)
    with pytest.raises(TypeError, match="second_order must be True or False; got 1"):
        dataclasses.replace(recipes.delayed(), second_order=1)
    expected = (
        "reverse-mode derivatives only"
        if _shims.KEEPS_RULES
        else "second_order=True needs JAX 0.12 or newer; got 0.1"
    )
    with pytest.raises(NotImplementedError, match=expected):
        jax.hessian(lambda x: fp8jax.fp8(mlp, twice(recipes.delayed()))(scales, PARAMS, x))(X)


@needs_rules
def test_under_jit_first_derivatives_pay_nothing():
    """Temporaries of a compiled step over scanned layers, where operands would be stacked beside
    codes.
    """

    def fn(w, x):
        return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]).mean()

    w, x = jnp.zeros((8, 64, 64)), jnp.ones((512, 64))
    sizes = []
    for recipe in (recipes.delayed(), twice(recipes.delayed())):
        fp8_fn = fp8jax.fp8(fn, recipe)
        scales = jax.eval_shape(fp8_fn.init, w, x)
        compiled = jax.jit(jax.grad(fp8_fn, argnums=(0, 1))).lower(scales, w, x).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] <= 1.02 * sizes[0]
