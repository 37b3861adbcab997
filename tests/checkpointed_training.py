"""A training that saves at each step and tells what it does, for tests to kill: `python
checkpointed_training.py FOLDER [STEPS]`.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import fp8jax


def loss(params, x):
    return jnp.square(jnp.tanh(x @ params["up"]) @ params["down"] - x).mean()


FP8_LOSS = fp8jax.fp8(loss, fp8jax.recipes.delayed(history_window=8))
TX = fp8jax.with_delayed_scaling(optax.adam(1e-2))


def batch_at(step):
    """Batches of different size, so that scales and histories move all the time."""
    return jax.random.normal(jax.random.key(step), (16, 32)) * 2.0 ** (step % 7)


def begin():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "up": jax.random.normal(keys[0], (32, 64)) * 0.2,
        "down": jax.random.normal(keys[1], (64, 32)) * 0.1,
    }
    trained = {"params": params, "scales": FP8_LOSS.init(params, batch_at(0))}
    return {"trained": trained, "optimizer": TX.init(trained)}


@jax.jit
def advance(state, x):
    value, gradients = jax.value_and_grad(
        lambda trained: FP8_LOSS(trained["scales"], trained["params"], x)
    )(state["trained"])
    updates, optimizer = TX.update(gradients, state["optimizer"], state["trained"])
    return {
        "trained": optax.apply_updates(state["trained"], updates),
        "optimizer": optimizer,
    }, value


def digest(state):
    """A number that any bit of the state changes, most likely."""
    bits = [
        jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel() for leaf in jax.tree.leaves(state)
    ]
    return sum(
        int((leaf * (jnp.arange(leaf.size, dtype=jnp.uint32) * 2 + 1)).sum(dtype=jnp.uint32))
        for leaf in bits
    )


def train(folder, steps):
    """Prints "from STEP", then for each step "STEP LOSS DIGEST", as soon as its save has begun."""
    import orbax.checkpoint as ocp

    state, done = begin(), 0
    with ocp.CheckpointManager(
        pathlib.Path(folder), options=ocp.CheckpointManagerOptions(max_to_keep=3)
    ) as manager:
        if manager.latest_step() is not None:
            done, state = manager.latest_step(), fp8jax.checkpoint.restore(manager, state)
        print("from", done, flush=True)
        while done < steps:
            state, value = advance(state, batch_at(done))
            done += 1
            fp8jax.checkpoint.save(manager, done, state)
            print(done, float(value).hex(), digest(state), flush=True)


if __name__ == "__main__":
    with jax.numpy_dtype_promotion("standard"):  # for optax
        train(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10**9)
