"""What a remat policy keeps of an FP8 function: codes, a byte each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import checkpoint_policies, recipes

LAYERS, WIDTH, BATCH = 3, 32, 8
KEYS = jax.random.split(jax.random.key(0))
PARAMS = jax.random.normal(KEYS[0], (LAYERS, 2, WIDTH, WIDTH)) / 4
X = jax.random.normal(KEYS[1], (BATCH, WIDTH))


def loss_with(policy):
    @jax.checkpoint
    def everything(x, w):
        return x + jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None

    block = jax.checkpoint(everything.__wrapped__, policy=policy) if policy else everything
    return lambda params, x: jnp.square(jax.lax.scan(block, x, params)[0]).mean()


def gradient(policy, recipe):
    fp8_loss = fp8jax.fp8(loss_with(policy), recipe)
    scales = fp8_loss.init(PARAMS, X)
    _, backward = jax.vjp(fp8_loss, scales, PARAMS, X)
    return jax.jit(jax.grad(fp8_loss, argnums=(0, 1, 2)))(scales, PARAMS, X), jax.tree.leaves(
        backward
    )


@pytest.mark.parametrize(
    "recipe",
    [recipes.delayed(), pytest.param(recipes.rowwise(), marks=pytest.mark.slow)],
    ids=lambda recipe: recipe.name,
)
def test_codes_are_kept_and_gradients_are_the_same_bits(recipe):
    (everything, plain), (kept, codes) = (
        gradient(None, recipe),
        gradient(checkpoint_policies.save_codes(), recipe),
    )
    jax.tree.map(np.testing.assert_array_equal, everything, kept)
    assert not [leaf for leaf in plain if leaf.dtype == jnp.uint8]
    # Both operands of both products of each layer; weights twice the size of what a layer keeps of
    # them is one each.
    saved = sum(leaf.nbytes for leaf in codes if leaf.dtype == jnp.uint8)
    assert saved == LAYERS * 2 * (BATCH * WIDTH + WIDTH * WIDTH)


@pytest.mark.thorough
def test_beside_another_policy():
    named = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    (everything, _), (kept, leaves) = (
        gradient(None, recipes.current()),
        gradient(checkpoint_policies.save_codes_and(named), recipes.current()),
    )
    jax.tree.map(np.testing.assert_array_equal, everything, kept)
    assert [leaf for leaf in leaves if leaf.dtype == jnp.uint8]
