"""What the GPU benchmarks time: products with their casts, and a Transformer block's training step,
in bfloat16, by each recipe, and by each peer that is installed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen import fp8_ops

import fp8jax
from fp8jax.bench.step import step_of
from fp8jax.bench.timing import optional

# More than the second-level cache of any GPU of today, several times.
COLD_BYTES = 256 * 2**20
HEAD = 128
BF16, BARE = "bf16", "bare FP8 product, codes given"


class Contender(NamedTuple):
    """One row.

    Args:
      function: what is timed.
      arguments: makes its arguments from a random key; under `jax.eval_shape`, their shapes.
    """

    function: Callable
    arguments: Callable[[jax.Array], tuple]


class Variant(NamedTuple):
    """A module in one precision.

    Args:
      make: makes the module; so what a peer refuses costs that peer's row alone.
      overwritten: a collection whose "gradient" is its next value; None where there is none.
      recipe: fp8jax's; None of all others.
    """

    make: Callable[[], nn.Module]
    overwritten: str | None = None
    recipe: fp8jax.Recipe | None = None


def recipes() -> dict[str, fp8jax.Recipe]:
    """All ready recipes, by name."""
    return {name: make() for name, make in fp8jax.recipes.PRESETS.items()}


def variants(make: Callable[..., nn.Module]) -> dict[str, Variant]:
    """A module in bfloat16, by each recipe, and by each peer that is installed; `make` takes a
    `dot_general_cls`.
    """
    found = {BF16: Variant(lambda: make(None))}
    for name, recipe in recipes().items():
        wrapped = functools.partial(lambda recipe: fp8jax.linen.Fp8(make(None), recipe), recipe)
        found[f"fp8jax {name}"] = Variant(wrapped, recipe=recipe)
    found["Flax Fp8DirectDotGeneralOp"] = Variant(
        lambda: make(fp8_ops.Fp8DirectDotGeneralOp), "_overwrite_with_gradient"
    )
    if qwix := optional("qwix"):

        def by_qwix():
            rule = qwix.QtRule(
                weight_qtype="float8_e4m3fn", act_qtype="float8_e4m3fn", bwd_qtype="float8_e5m2"
            )
            return qwix.quantize_model(make(None), qwix.QtProvider([rule]))

        found["Qwix"] = Variant(by_qwix)
    return found


def products(size: int) -> tuple[dict[str, Contender], dict[str, Contender]]:
    """A square product with its casts: forward, and forward with both gradients."""
    forward, both = {}, {}

    def dense(dot_general_cls):
        return nn.Dense(
            size,
            use_bias=False,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            dot_general_cls=dot_general_cls,
        )

    def arguments(make, key):
        keys = jax.random.split(key, 3)
        x, grad = (jax.random.normal(one, (size, size), jnp.bfloat16) for one in keys[:2])
        return make().init(keys[2], x), x, grad

    for name, variant in variants(dense).items():
        made = functools.partial(arguments, variant.make)
        forward[name] = Contender(
            functools.partial(_forward, variant.make), lambda key, made=made: made(key)[:2]
        )
        both[name] = Contender(functools.partial(_forward_and_gradients, variant.make), made)
    codes = functools.partial(_codes, size)
    forward[BARE] = Contender(_multiply_codes, codes)
    return forward, both


def _forward(make, variables, x):
    return make().apply(variables, x)


def _forward_and_gradients(make, variables, x, grad):
    def weighted(variables, x):
        out = make().apply(variables, x)
        return (out * grad).sum(dtype=jnp.float32), out

    return jax.grad(weighted, argnums=(0, 1), has_aux=True, allow_int=True)(variables, x)


def _codes(size: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    lhs, rhs = (
        fp8jax.encode(jax.random.normal(one, (size, size), jnp.bfloat16), "E4M3")
        for one in jax.random.split(key)
    )
    return lhs, rhs


def _multiply_codes(lhs, rhs):
    # Both contract their last axes: the one layout that the hardware takes as it is.
    return jax.lax.dot_general(
        lhs, rhs, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
    )


class Block(nn.Module):
    """A Transformer's block in bfloat16: attention and an MLP of four times the width, without
    biases.
    """

    width: int
    dot_general_cls: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features, name):
            return nn.Dense(
                features,
                use_bias=False,
                dtype=jnp.bfloat16,
                name=name,
                dot_general_cls=self.dot_general_cls,
            )

        h = nn.LayerNorm(dtype=jnp.bfloat16)(x)
        heads = (*h.shape[:-1], max(self.width // HEAD, 1), min(HEAD, self.width))
        query, key, value = (
            dense(self.width, name)(h).reshape(heads) for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(self.width, "out")(attended.reshape(h.shape))
        h = dense(4 * self.width, "up")(nn.LayerNorm(dtype=jnp.bfloat16)(x))
        return x + dense(self.width, "down")(nn.gelu(h))


def blocks(width: int, tokens: int, sequence: int = 2048) -> dict[str, Contender]:
    """The training step of one block, with Adam on float32 parameters."""
    sequence = min(sequence, tokens)
    shape = (tokens // sequence, sequence, width)
    adam, found = optax.adam(1e-4), {}

    def weighted_mean(out, weights):
        return (out * weights).mean(dtype=jnp.float32)

    def arguments(make, tx, overwritten, key):
        keys = jax.random.split(key, 3)
        x, weights = (jax.random.normal(one, shape, jnp.bfloat16) for one in keys[:2])
        variables = make().init(keys[2], x)
        return (
            variables,
            tx.init({"params": variables["params"]} if overwritten else variables),
            x,
            weights,
        )

    def block(dot_general_cls):
        return Block(width, dot_general_cls)

    for name, (make, overwritten, recipe) in variants(block).items():
        has_state = recipe is not None and any(recipe.delayed_casts)
        tx = fp8jax.with_delayed_scaling(adam) if has_state else adam
        found[name] = Contender(
            _Step(make, tx, overwritten, weighted_mean),
            functools.partial(arguments, make, tx, overwritten),
        )
    return found


class _Step:
    """`step_of` a module that is made at the first call."""

    def __init__(self, make, tx, overwritten, loss):
        self._jitted = functools.cache(lambda: step_of(make(), tx, overwritten, loss))

    def __call__(self, *arguments):
        return self._jitted()(*arguments)


def copies_of(contender: Contender) -> int:
    """How many sets of arguments together are larger than any cache."""
    leaves = jax.tree.leaves(jax.eval_shape(contender.arguments, jax.random.key(0)))
    return max(
        2, min(16, math.ceil(COLD_BYTES / sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)))
    )


def cold_calls(contender: Contender) -> tuple[Callable[[], Any], int]:
    """A call of the function on each of several sets of arguments, in one program, so that none is
    in the cache still and the launch of the program counts little; and how many they are.
    """
    copies = copies_of(contender)
    sets = [
        jax.jit(contender.arguments)(key) for key in jax.random.split(jax.random.key(1), copies)
    ]
    program = jax.jit(lambda sets: [contender.function(*arguments) for arguments in sets])
    return lambda: program(sets), copies


def steps(contender: Contender) -> Callable[[], jax.Array]:
    """A call that does one training step more and returns the loss."""
    held = list(jax.jit(contender.arguments)(jax.random.key(1)))

    def once():
        held[0], held[1], loss = contender.function(*held)
        return loss

    return once
