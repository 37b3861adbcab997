"""Derivatives of functions whose weights are held as FP8 codes: of all else, and never of these."""

import re

import compile_only
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_serving import (
    PARAMS,
    SCALINGS,
    X,
    entered,
    heads,
    plain,
    quantized,
    scanned,
    sqnr,
    transposed,
    unrolled,
    weights,
)

import fp8jax
from fp8jax import (
    BlockWise,
    PerChannel,
    PerTensor,
    Rule,
    WeightRule,
    dequantize_params,
    fp8,
    quantize_params,
    recipes,
)

RECIPES = [recipes.weight_only(), recipes.current(), recipes.rowwise(), recipes.delayed()]
ids = {"ids": lambda value: getattr(value, "name", getattr(value, "__name__", str(value)))}


def loss_of(fn):
    """A loss of all outputs, whose gradients are of very different sizes."""

    def loss(p, x):
        out = fn(p, x)
        return jnp.sum(out * jnp.exp2(jnp.arange(out.size, dtype=out.dtype) % 11).reshape(out.shape))

    return loss


def rematerialized(p, x):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w * 0.01), None))
    return jax.lax.scan(body, x, p["layers"])[0]


def left_out(p, x):
    return jnp.tanh(x @ p["w"] * 0.01) @ p["v"]


def gradient_in_float64(fn, params, x):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return np.asarray(jax.grad(loss_of(fn), argnums=1)(wide, jnp.asarray(x, jnp.float64)))


FUNCTIONS = [plain, transposed, heads, scanned, unrolled, entered, rematerialized]


@pytest.mark.parametrize("fn", FUNCTIONS, **ids)
@pytest.mark.parametrize("scaling, stacked", SCALINGS.values(), ids=SCALINGS)
def test_gradients_of_weights_alone_are_exact(fn, scaling, stacked):
    if fn is heads and isinstance(scaling, BlockWise):
        pytest.skip("its reshape tears blocks apart")
    if not stacked and fn not in (scanned, unrolled):
        pytest.skip("it has no layers to share scales")
    # Sizes at which tanh has a slope.
    small = {name: (leaf * 2.0**-8).astype(np.float32) for name, leaf in PARAMS.items()}
    params = quantized(small, scaling, stacked)
    served = fp8(loss_of(fn), recipes.weight_only())
    got = jax.jit(jax.grad(served, argnums=2))({}, params, X)
    expected = gradient_in_float64(fn, dequantize_params(params), X)
    assert sqnr(got, expected) > 90
    assert sqnr(gradient_in_float64(fn, small, X), expected) < 60  # Else these are not the codes'.
