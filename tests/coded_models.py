"""Two models with large tables, as users write them: a Gemma, whose table is tied and scaled, and a
BERT, whose head for masked words is tied, and whose other tables are not.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from fp8jax import PerChannel, WeightRule


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model."""

    vocabulary: int = 512
    width: int = 64
    hidden: int = 128
    heads: int = 4
    layers: int = 2
    positions: int = 16


TABLES = [WeightRule(".*embedding", PerChannel(0))]
RULES = [*TABLES, WeightRule(".*kernel", PerChannel(-1))]


class RMSNorm(nn.Module):
    """With a scale that starts at one, held as what it differs from one by."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)
        return (normal * (1 + scale.reshape(1, 1, -1))).astype(x.dtype)


def rotated(x):
    """Rotary positions of `[batch, tokens, heads, size]`."""
    half = x.shape[-1] // 2
    wave = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * wave[None]
    sin, cos = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.sin, jnp.cos))
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class GemmaLayer(nn.Module):
    """Attention with one head of keys, and a gated perceptron."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        batch, tokens, width = x.shape
        heads, dense = (
            self.sizes.heads,
            lambda features, name: nn.Dense(features, use_bias=False, dtype=x.dtype, name=name),
        )
        h = RMSNorm(name="pre_attention_norm")(x)
        q = rotated(dense(width, "q_proj")(h).reshape(batch, tokens, heads, -1))
        k = rotated(dense(width // heads, "k_proj")(h).reshape(batch, tokens, 1, -1))
        v = dense(width // heads, "v_proj")(h).reshape(batch, tokens, 1, -1)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        x = x + dense(width, "o_proj")(mixed.reshape(x.shape))
        h = RMSNorm(name="pre_ffw_norm")(x)
        gate = nn.gelu(dense(self.sizes.hidden, "gate_proj")(h))
        return x + dense(width, "down_proj")(gate * dense(self.sizes.hidden, "up_proj")(h))


class Embedder(nn.Module):
    """One table, by which words are read and written."""

    sizes: Sizes
    dtype: object

    def setup(self):
        shape = (self.sizes.vocabulary, self.sizes.width)
        init = nn.initializers.normal(self.sizes.width**-0.5)
        self.input_embedding = self.param("input_embedding", init, shape)

    def encode(self, ids):
        x = self.input_embedding[(ids,)].astype(self.dtype)
        return x * jnp.sqrt(self.sizes.width).astype(self.dtype)

    def decode(self, x):
        return jnp.dot(x, self.input_embedding.astype(self.dtype).T)


class Gemma(nn.Module):
    """Logits `[batch, tokens, vocabulary]`, capped softly."""

    sizes: Sizes = Sizes()
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, ids):
        embedder = Embedder(self.sizes, self.dtype, name="embedder")
        x = embedder.encode(ids)
        for index in range(self.sizes.layers):
            x = GemmaLayer(self.sizes, name=f"layer_{index}")(x)
        logits = embedder.decode(RMSNorm(name="final_norm")(x))
        return jnp.tanh(logits.astype(jnp.float32) / 30.0) * 30.0


class BertLayer(nn.Module):
    """Attention and a perceptron, each normalized behind its residual connection."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(self.sizes.heads, name="attention")
        x = nn.LayerNorm(name="attention_norm")(x + attention(x))
        hidden = nn.gelu(nn.Dense(self.sizes.hidden, name="intermediate")(x), approximate=False)
        return nn.LayerNorm(name="norm")(x + nn.Dense(self.sizes.width, name="output")(hidden))


class Bert(nn.Module):
    """Logits of masked words `[batch, tokens, vocabulary]`, and of the pair being in order."""

    sizes: Sizes = Sizes()

    @nn.compact
    def __call__(self, ids):
        width, places = self.sizes.width, jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        words = nn.Embed(self.sizes.vocabulary, width, name="word")
        x = words(ids) + nn.Embed(self.sizes.positions, width, name="position")(places)
        x = nn.LayerNorm(name="norm")(x + nn.Embed(2, width, name="type")(jnp.zeros_like(ids)))
        for index in range(self.sizes.layers):
            x = BertLayer(self.sizes, name=f"layer_{index}")(x)
        pooled = jnp.tanh(nn.Dense(width, name="pooler")(x[:, 0]))
        hidden = nn.gelu(nn.Dense(width, name="transform")(x), approximate=False)
        bias = self.param("bias", nn.initializers.zeros, (self.sizes.vocabulary,))
        logits = words.attend(nn.LayerNorm(name="head_norm")(hidden)) + bias.reshape(1, 1, -1)
        return logits, nn.Dense(2, name="in_order")(pooled)


MODELS = {"gemma": Gemma, "bert": Bert}
