"""What memory a training step needs on an H200, beside a bfloat16 step's, compiled on a machine that has none."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import fp8jax
from compile_only import compile_for, h200_mesh, place, temporary_bytes
from fp8jax import recipes
from test_compile_only import Block

LAYERS, WIDTH, TOKENS = 12, 4096, (4, 2048)


class Transformer(nn.Module):
    remat: str

    @nn.compact
    def __call__(self, x):
        policies = {"all": None, "all but codes": fp8jax.checkpoint_policies.save_codes()}
        block = nn.remat(Block, policy=policies[self.remat]) if self.remat in policies else Block
        return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)(WIDTH, 128, name="layers")(x, None)[0]


@functools.cache
@jax.numpy_dtype_promotion("standard")  # Flax's LayerNorm needs it for bfloat16
def temporaries(remat: str, recipe: fp8jax.Recipe | None) -> int:
    """Of a step, in bytes."""
    model = Transformer(remat)
    model = model if recipe is None else fp8jax.linen.Fp8(model, recipe)
    x = jax.ShapeDtypeStruct((*TOKENS, WIDTH), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    optimizer = optax.sgd(1e-3) if recipe is None else fp8jax.with_delayed_scaling(optax.sgd(1e-3))
    state = jax.eval_shape(optimizer.init, variables)

    def step(variables, state, x):
        grads = jax.grad(lambda variables: jnp.square(model.apply(variables, x)).mean(dtype=jnp.float32))(variables)
        updates, state = optimizer.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state

    return temporary_bytes(compile_for(h200_mesh(), step, *place(h200_mesh(), (variables, state, x)), donate_argnums=(0, 1)))


@pytest.mark.parametrize(("remat", "beside", "bound"), [("nothing", "nothing", 0.95), ("all", "all", 1.10), ("all but codes", "nothing", 0.40)])
def test_temporaries_beside_those_of_bfloat16(remat, beside, bound):
    ratio = temporaries(remat, recipes.delayed()) / temporaries(beside, None)
    print(f"rematerialized: {remat}: {ratio:.3f}")
    assert 0.1 < ratio <= bound
