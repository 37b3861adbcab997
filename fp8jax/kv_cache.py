"""The keys and values of past tokens, held as FP8 codes with a scale for each token and head.

    cache = kv_cache.init(batch, length, heads, width)
    positions = kv_cache.positions(cache, new)        # of the tokens to come, for their embedding
    cache = kv_cache.append(cache, keys, values)      # behind those that are there
    keys, values = kv_cache.read(cache)               # of all tokens
    seen = kv_cache.causal_mask(cache, positions)     # which of them each new one may attend to

A token's scales are its own, so what is held does not change when more is appended, whatever that
is.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fp8jax._formats import E4M3, get_format
from fp8jax._scaling import PerToken
from fp8jax._state_dicts import register_state_dict
from fp8jax._tensor import Fp8Tensor, quantize


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values", "length"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far. A pytree: `scan` over layers slices one with an axis of
    layers.

    Attributes:
      keys, values: `Fp8Tensor`s with a scale for each token and head, or arrays where the cache is
        not quantized; of shape (batch, capacity, heads, width).
      length: int32, shape (batch,): the number of tokens of each sequence. Larger than the capacity
        where tokens were appended for which there was no room; these are lost.
    """

    keys: Fp8Tensor | jax.Array
    values: Fp8Tensor | jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Number of tokens that there is room for, of each sequence."""
        return self.keys.shape[-3]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.keys.nbytes + self.values.nbytes + self.length.nbytes


register_state_dict(KVCache, "keys", "values", "length")


def init(
    batch: int,
    capacity: int,
    heads: int,
    width: int,
    *,
    layers: int | None = None,
    format=E4M3,
    dtype=jnp.float32,
) -> KVCache:
    """An empty cache.

    Args:
      batch: number of sequences.
      capacity: largest number of tokens of a sequence.
      heads: number of heads of keys and values.
      width: of a head.
      layers: number of layers to stack along a leading axis, for `scan`; None for a cache without
        such an axis.
      format: of the codes, a `Format` or its name; None for a cache that is not quantized.
      dtype: of keys and values, as they are read; and as they are held where the cache is not
        quantized.

    Raises:
      ValueError: where a size is not positive, or `format` holds no values.

    >>> init(2, 16, heads=4, width=64).keys.scale.shape
    (2, 16, 4, 1)
    """
    for name, size in (
        ("batch", batch),
        ("capacity", capacity),
        ("heads", heads),
        ("width", width),
        ("layers", layers),
    ):
        if not (name == "layers" and size is None) and (
            isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1
        ):
            raise ValueError(f"{name} must be a positive whole number; got {size!r}.")
    stack = () if layers is None else (layers,)
    shape = (*stack, batch, capacity, heads, width)
    if format is None:
        return KVCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((*stack, batch), jnp.int32)
        )
    format = get_format(format)
    if not format.signed:
        raise ValueError(
            f"format must hold values; got {format.name}, which holds scales only. Use E4M3."
        )
    # Buffers of their own, for donation.
    keys, values = (
        Fp8Tensor(
            jnp.zeros(shape, format.dtype),
            jnp.ones((*shape[:-1], 1), jnp.float32),
            format,
            PerToken(),
            dtype,
        )
        for _ in range(2)
    )
    return KVCache(keys, values, jnp.zeros((*stack, batch), jnp.int32))


def append(
    cache: KVCache,
    keys: jax.Array,
    values: jax.Array,
    count: jax.Array | None = None,
    *,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> KVCache:
    """A cache with more tokens behind those that it holds, quantized with own or given scales.

    Args:
      cache: without an axis of layers.
      keys, values: floating, of shape (batch, new tokens, heads, width).
      count: int32 of shape (batch,): how many of a sequence's new tokens count; the others, behind
        them, are padding, and later tokens take their place. By default all.
      scales: static scales of keys and of values, each one positive number or one for each head,
        as a checkpoint's `kv_scales` has them for a layer. By default each token and head has its
        own, which is closer.

    Returns:
      The new cache. Tokens beyond its capacity are dropped, while `length` counts them.

    Raises:
      ValueError: where a shape doesn't fit, or `scales` are for a cache that is not quantized; and,
        where it can be told because the call is not traced, where there is no room for the tokens.

    >>> keys, values = jnp.ones((1, 3, 1, 2)), jnp.full((1, 3, 1, 2), 0.5)
    >>> cache = append(init(1, 4, heads=1, width=2), keys, values)
    >>> cache.length, read(cache)[1][0, :, 0, 0]
    (Array([3], dtype=int32), Array([0.5, 0.5, 0.5, 0. ], dtype=float32))
    """
    _check(cache)
    batch, capacity, heads, width = cache.keys.shape
    for name, new in (("keys", keys), ("values", values)):
        if (
            new.ndim != 4
            or (new.shape[0], *new.shape[2:]) != (batch, heads, width)
            or new.shape != keys.shape
        ):
            raise ValueError(
                f"{name} must be of shape ({batch}, new tokens, {heads}, {width}), both alike; got "
                f"{new.shape}."
            )
    new = keys.shape[1]
    count = jnp.full((batch,), new, jnp.int32) if count is None else jnp.asarray(count, jnp.int32)
    if count.shape != (batch,):
        raise ValueError(f"count must be of shape ({batch},); got {count.shape}.")
    length = cache.length + count
    if not isinstance(length, Tracer) and (longest := int(length.max())) > capacity:
        raise ValueError(
            f"cache must have room for the tokens; got {longest} for a capacity of {capacity}. "
            "Make a larger one."
        )
    counts = jnp.arange(new, dtype=jnp.int32)[None] < count[:, None]
    places = jnp.where(counts, positions(cache, new), capacity)  # Padding goes nowhere.
    if scales is not None and (
        not isinstance(cache.keys, Fp8Tensor)
        or any(jnp.shape(scale) not in ((), (heads,)) for scale in scales)
    ):
        raise ValueError(
            "scales must be a number for keys and one for values, or one for each head, of a "
            f"quantized cache; got {scales}. Leave them out."
        )
    of_keys, of_values = scales or (None, None)
    return KVCache(
        _put(cache.keys, places, keys, of_keys),
        _put(cache.values, places, values, of_values),
        length,
    )


def _put(held, places, new, scale):
    rows = jnp.arange(places.shape[0], dtype=jnp.int32)[:, None]
    if not isinstance(held, Fp8Tensor):
        return held.at[rows, places].set(new.astype(held.dtype), mode="drop")
    if scale is not None and jnp.ndim(scale):
        scale = jnp.broadcast_to(jnp.asarray(scale)[:, None], (*new.shape[:-1], 1))
    new = quantize(
        lax.stop_gradient(new), held.format, PerToken(), scale="amax" if scale is None else scale
    )
    # As bytes: CPUs have no float8, and would hold a wide copy of the whole cache.
    data, codes = (lax.bitcast_convert_type(x, jnp.uint8) for x in (held.data, new.data))
    data = lax.bitcast_convert_type(data.at[rows, places].set(codes, mode="drop"), held.data.dtype)
    scale = held.scale.at[rows, places].set(new.scale, mode="drop")
    return dataclasses.replace(held, data=data, scale=scale)


def read(cache: KVCache, dtype=None) -> tuple[jax.Array, jax.Array]:
    """The keys and the values that a cache holds.

    Args:
      cache: without an axis of layers.
      dtype: of the result, floating; by default the cache's own.

    Returns:
      Two arrays of shape (batch, capacity, heads, width); zeros where there is no token yet.

    >>> new = jnp.ones((1, 1, 1, 1))
    >>> read(append(init(1, 2, heads=1, width=1), new, new))[0].ravel()
    Array([1., 0.], dtype=float32)
    """
    _check(cache)
    keys, values = (
        held.dequantize(dtype) if isinstance(held, Fp8Tensor) else held.astype(dtype or held.dtype)
        for held in (cache.keys, cache.values)
    )
    return keys, values


def positions(cache: KVCache, new: int) -> jax.Array:
    """The positions that the next tokens will have: int32, of shape (batch, new). Call it before
    `append`.

    >>> new = jnp.ones((1, 2, 1, 1))
    >>> positions(append(init(1, 4, heads=1, width=1), new, new), 2)
    Array([[2, 3]], dtype=int32)
    """
    _check(cache)
    return cache.length[:, None] + jnp.arange(new, dtype=jnp.int32)[None]


def causal_mask(cache: KVCache, positions: jax.Array) -> jax.Array:
    """Which of the tokens that a cache holds those at some positions may attend to: themselves, and
    all before them.

    Args:
      cache: without an axis of layers.
      positions: int32, of shape (batch, new), from before the tokens were appended.

    Returns:
      bool, of shape (batch, new, capacity).

    >>> causal_mask(init(1, 4, heads=1, width=1), jnp.array([[0, 1]])).astype(jnp.int32)
    Array([[[1, 0, 0, 0],
            [1, 1, 0, 0]]], dtype=int32)
    """
    _check(cache)
    return jnp.arange(cache.capacity, dtype=jnp.int32)[None, None] <= positions[..., None]


def _check(cache: KVCache) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache; got {type(cache).__name__}. Make one with init.")
    if cache.length.ndim != 1:
        raise ValueError(
            f"cache must be that of one layer; got one with axes {cache.keys.shape}. Scan or vmap "
            "over the axis of layers."
        )
