"""A training step on this machine: unquantized, the peers and fp8jax, by the same optimizer on the
same MLP.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen import fp8_ops
from jax.typing import DTypeLike

import fp8jax
from fp8jax.bench.timing import interleaved_medians, optional, print_missing_peers, print_table

RECIPES = ("delayed", "current", "rowwise", "blockwise", "mxfp8")

# Name: widths, batch.
MODELS = {"small": ((784, 1024, 1024, 10), 256), "large": ((2048, 2048, 2048, 2048), 2048)}


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    widths: tuple[int, ...]
    dtype: DTypeLike = jnp.float32
    dot_general_cls: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index, width in enumerate(self.widths):
            x = nn.Dense(width, dtype=self.dtype, dot_general_cls=self.dot_general_cls)(x)
            x = nn.relu(x) if index + 1 < len(self.widths) else x
        return x.astype(jnp.float32)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the batch, float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step_of(
    model: nn.Module,
    tx: optax.GradientTransformation,
    mutable_gradients: str | None = None,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
):
    """A jitted training step, `(variables, state, x, y) -> (variables, state, loss)`.

    `mutable_gradients` names a collection whose "gradient" is its next value, as Flax's fp8 ops
    have it.
    """

    def loss_of(variables, x, y):
        out: Any = model.apply(variables, x)
        return loss(out, y)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, state, x, y):
        value, gradients = jax.value_and_grad(loss_of, allow_int=True)(variables, x, y)
        if mutable_gradients is None:
            updates, state = tx.update(gradients, state, variables)
            return optax.apply_updates(variables, updates), state, value
        rest = {"params": variables["params"]}
        updates, state = tx.update({"params": gradients["params"]}, state, rest)
        updated: Any = optax.apply_updates(rest, updates)
        kept = {mutable_gradients: gradients[mutable_gradients]}
        return updated | kept, state, value

    return step


def contenders(widths: tuple[int, ...], batch: int) -> dict[str, Callable[[], jax.Array]]:
    """For each contender a function that does one step and returns the loss."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, widths[0]))
    y = jax.random.randint(keys[1], (batch,), 0, widths[-1])
    adam = optax.adam(1e-3)
    overwritten = "_overwrite_with_gradient"
    setups = {
        "f32": (MLP(widths[1:]), adam, None),
        "bf16": (MLP(widths[1:], jnp.bfloat16), adam, None),
        "Flax Fp8DirectDotGeneralOp": (
            MLP(widths[1:], dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp),
            adam,
            overwritten,
        ),
    }
    for name in RECIPES:
        recipe = getattr(fp8jax.recipes, name)()
        tx = fp8jax.with_delayed_scaling(adam) if any(recipe.delayed_casts) else adam
        setups[f"fp8jax {name}"] = fp8jax.linen.Fp8(MLP(widths[1:]), recipe), tx, None
    peers = {}
    if qwix := optional("qwix"):
        e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
        for name, options in (
            ("per channel", {}),
            ("per tensor", {"disable_channelwise_axes": True}),
        ):
            rule = qwix.QtRule(
                module_path=".*", weight_qtype=e4m3, act_qtype=e4m3, bwd_qtype=e5m2, **options
            )
            peers[f"Qwix {name}"] = (
                qwix.quantize_model(MLP(widths[1:]), qwix.QtProvider([rule])),
                adam,
                None,
            )
    if config := optional("aqt.jax.v2.config"):
        cfg = config.set_bits(
            config.default_unquantized_config(), "e4m3", "e4m3", "e5m2", "e4m3", "e4m3", "e5m2"
        )
        aqt = optional("aqt.jax.v2.flax.aqt_flax")
        peers["AQT"] = (
            MLP(
                widths[1:],
                dot_general_cls=functools.partial(aqt.AqtDotGeneral, cfg, prng_name=None),
            ),
            adam,
            None,
        )

    def start(model, tx, collection):
        variables = jax.jit(model.init)(keys[2], x)
        state = tx.init(variables if collection is None else {"params": variables["params"]})
        step, held = step_of(model, tx, collection), [variables, state]

        def once():
            held[0], held[1], loss = step(*held, x, y)
            return loss

        return once

    found = {name: start(*setup) for name, setup in setups.items()}
    for name, setup in peers.items():
        try:
            found[name] = start(*setup)
        except AssertionError as error:  # Qwix takes what has the shape of a weight for one.
            print(f"{name} refuses {'-'.join(map(str, widths))} at batch {batch}: {error}")
    return found


def main(rounds: int = 30) -> None:
    """Prints both tables."""
    print_missing_peers()
    for name, (widths, batch) in MODELS.items():
        medians = interleaved_medians(contenders(widths, batch), rounds)
        print_table(
            f"Adam step, {name}: {'-'.join(map(str, widths))}, batch {batch}", "f32", medians
        )
