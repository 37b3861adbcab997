"""What the state of delayed scaling costs: updates of ten thousand sites, beside the step of a
model that has them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import recipes
from fp8jax._observe import seal_of
from fp8jax._site_scales import SiteScales
from fp8jax._transform import fp8
from fp8jax.bench.timing import interleaved_medians, print_table
from fp8jax.optim import delayed_scaling

WINDOWS = (16, 128, 1024)


def update_of(sites: int, window: int):
    """A function that updates the scales of so many sites, stacked as a model's scanned layers are,
    and returns them.
    """
    casts = recipes.delayed(history_window=window).delayed_casts
    amax = jnp.exp2(jax.random.normal(jax.random.key(0), (sites, 3)) * 4)
    scales = {"layers": SiteScales.zeros("layers", casts, (sites,))}
    lhs, rhs, grad = (amax[:, i] for i in range(3))
    of_one = {"seal": seal_of(amax), "uses": jnp.ones_like(lhs)}
    seen = {"layers": scales["layers"].replace(lhs=lhs, rhs=rhs, grad=grad, **of_one)}
    tx: Any = delayed_scaling()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(scales, state):
        moves, state = tx.update(seen, state, scales)
        return jax.tree.map(jnp.add, scales, moves), state

    held = [scales, tx.init(scales)]

    def once():
        held[:] = update(*held)
        return held[0]

    return once


def step_of(sites: int, width: int, batch: int):
    """A function that takes the gradient of a model of so many layers, scanned."""

    def loss(params, x):
        return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]).mean()

    params = jax.random.normal(jax.random.key(0), (sites, width, width)) * width**-0.5
    x = jax.random.normal(jax.random.key(1), (batch, width))
    fp8_loss = fp8(loss, recipes.delayed())
    scales = fp8_loss.init(params, x)
    gradient = jax.jit(jax.grad(fp8_loss, argnums=(0, 1)))
    return lambda: gradient(scales, params, x)


def main(rounds: int = 5, sites: int = 10_000, width: int = 64, batch: int = 512) -> None:
    """Prints the table."""
    step = f"gradients of {sites} layers {width} x {width}, batch {batch}"
    medians = interleaved_medians({step: step_of(sites, width, batch)}, rounds)
    updates = {
        f"update of {sites} sites, window {window}": update_of(sites, window) for window in WINDOWS
    }
    # Apart from the step, which leaves nothing of one's state in the caches and takes a thousand
    # times as long.
    medians |= interleaved_medians(updates, 20 * rounds)
    print_table("cost of state", step, medians)
