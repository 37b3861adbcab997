"""The language model of `train_lm.py` in Flax NNX, for `train_lm.py --api nnx`.

It holds the same parameters under the same names as the Linen one, and computes the same. FP8 is
one line: `fp8jax.nnx.Fp8` around the model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import train_lm
from flax import nnx

import fp8jax
from fp8jax.nnx import Fp8, Fp8Scale


class Block(nnx.Module):
    """Causal attention and an MLP, each behind a normalization and around a residual connection."""

    def __init__(self, width: int, dtype: Any, rngs: nnx.Rngs):
        def dense(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

        self.attention_norm, self.mlp_norm = (
            nnx.RMSNorm(width, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.query, self.key, self.value, self.out = (dense(width, width) for _ in range(4))
        self.up, self.down = dense(width, 4 * width), dense(4 * width, width)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        h = self.attention_norm(x)
        q, k, v = (
            project(h).reshape(batch, length, -1, train_lm.HEAD_WIDTH)
            for project in (self.query, self.key, self.value)
        )
        with jax.named_scope("scores"):
            logits = (
                jnp.einsum("bqhd,bkhd->bhqk", train_lm.rotate(q), train_lm.rotate(k))
                * train_lm.HEAD_WIDTH**-0.5
            )
        past = np.tri(length, dtype=bool)[None, None]
        weights = jax.nn.softmax(logits.astype(jnp.float32), where=past, axis=-1).astype(self.dtype)
        with jax.named_scope("mix"):
            h = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
        x = x + self.out(h)
        return x + self.down(nnx.relu(self.up(self.mlp_norm(x))))


class TransformerLM(nnx.Module):
    """Bytes of shape (batch, length) to the logits of each one's successor."""

    def __init__(self, layers: int, width: int, dtype: Any, rngs: nnx.Rngs):
        self.embed = nnx.Embed(train_lm.VOCABULARY, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=layers)(
            nnx.vmap(lambda rngs: Block(width, dtype, rngs))
        )(rngs)
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.lm_head = nnx.Linear(
            width, train_lm.VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.lm_head(self.norm(run(self.embed(tokens), self.blocks)))


class PureModel:
    """An NNX model as the functions `init` and `apply` of its variables, so that Linen's training
    step trains it too.

    Where the loop is your own, `nnx.Optimizer` does the same with the objects themselves: see the
    README.

    Args:
      config: of the model.
      fp8: whether to wrap it.
    """

    def __init__(self, config: "train_lm.Config", fp8: bool):
        self._config, self._fp8 = config, fp8

    def _make(self) -> nnx.Module:
        model = TransformerLM(
            self._config.layers, self._config.width, jnp.dtype(self._config.dtype), nnx.Rngs(0)
        )
        return Fp8(model, train_lm.recipe_of(self._config), train_lm.RULES) if self._fp8 else model

    def _with(self, variables: dict[str, Any]) -> nnx.Module:
        model = nnx.eval_shape(self._make)
        nnx.update(model.module if self._fp8 else model, variables["params"])
        if "fp8" in variables:
            model.scales = Fp8Scale(variables["fp8"])
        return model

    def init(self, key: jax.Array, tokens: jax.Array) -> dict[str, Any]:
        """The variables; their parameters are those that the Linen model begins with, so that both
        can be compared.
        """
        variables = {"params": train_lm.linen_model(self._config).init(key, tokens)["params"]}
        if self._fp8:
            model = self._with(variables)
            model.init_scales(tokens)
            variables["fp8"] = model.scales.get_value()
        return variables

    def apply(self, variables: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """The logits."""
        return self._with(variables)(tokens)

    def explain(self, variables: dict[str, Any], tokens: jax.Array) -> fp8jax.Explanation:
        """The table of sites."""
        return self._with(variables).explain(tokens)

    def as_function(self, loss: Callable) -> fp8jax.Fp8Function:
        """A loss as a function of the parameters; `loss` takes the function from tokens to logits,
        and a batch.
        """
        key, tokens = jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
        return self._with(jax.eval_shape(self.init, key, tokens)).as_function(loss)
