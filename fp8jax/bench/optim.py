"""Optimizers with FP8 moments against optax's: an update alone, a whole training step, and the
bytes of the state.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fp8jax import optim
from fp8jax.bench.timing import interleaved_medians, print_table

REFERENCE = "optax.adamw"
OPTIMIZERS = {
    REFERENCE: lambda: optax.adamw(1e-3),
    "optim.adamw": lambda: optim.adamw(1e-3),
    "optim.adamw, to nearest": lambda: optim.adamw(1e-3, rounding="nearest"),
    "optax.lion": lambda: optax.lion(1e-4),
    "optim.lion": lambda: optim.lion(1e-4),
}
WIDTH, LAYERS = 2048, 2


def _state_bytes(tx: optax.GradientTransformation, params) -> float:
    """Bytes of the optimizer's state per parameter."""
    total = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params))
    )
    return total / sum(leaf.size for leaf in jax.tree.leaves(params))


def updates(params) -> dict[str, Callable]:
    """An update of all parameters, applied."""

    def start(tx):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params, state, gradients):
            changes, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, changes), state

        gradients = jax.tree.map(lambda p: p * 1e-3, params)
        held = [jax.tree.map(jnp.copy, params), tx.init(params)]

        def once():
            held[0], held[1] = update(*held, gradients)
            return held

        return once

    return {name: start(make()) for name, make in OPTIMIZERS.items()}


def steps(params, batch: int) -> dict[str, Callable]:
    """A training step of an MLP on `batch` rows."""
    x, y = jax.random.normal(jax.random.key(1), (2, batch, WIDTH))

    def loss(params):
        return jnp.square(functools.reduce(lambda h, w: jnp.tanh(h @ w), params, x) - y).mean()

    def start(tx):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state):
            changes, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, changes), state

        held = [jax.tree.map(jnp.copy, params), tx.init(params)]

        def once():
            held[0], held[1] = step(*held)
            return held

        return once

    return {name: start(make()) for name, make in OPTIMIZERS.items()}


def main(rounds: int = 10) -> None:
    """Prints the three tables."""
    params = [
        jax.random.normal(key, (WIDTH, WIDTH)) * WIDTH**-0.5
        for key in jax.random.split(jax.random.key(0), LAYERS)
    ]
    print("bytes of state per parameter:")
    for name, make in OPTIMIZERS.items():
        print(f"  {name:28s}{_state_bytes(make(), params):.3f}")
    size = f"{LAYERS} matrices of {WIDTH}"
    print_table(f"update, {size}", REFERENCE, interleaved_medians(updates(params), rounds))
    print_table(
        f"training step, {size}, batch 2048",
        REFERENCE,
        interleaved_medians(steps(params, 2048), rounds),
    )
