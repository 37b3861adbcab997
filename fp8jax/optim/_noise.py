"""Random bits for stochastic rounding: a function of a key, the step, the leaf and the element's
index.

`jax.random.bits` costs some twenty times as much as the rounding that it serves on CPUs, and on
GPUs it is a kernel of its own with memory of its own. So it only makes two words for each leaf and
step; each element's bits are a hash of these and its index, computed where they are used. The index
is that in the whole array, however it is sharded.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

_U = np.uint32


def key_words(key) -> jax.Array:
    """The uint32 `[2]` that a state holds of a key, of any implementation, or of a seed."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        if np.shape(key) != ():
            raise TypeError(
                "key must be an int or a key of jax.random; got an array of shape "
                f"{np.shape(key)}. "
                "Pass jax.random.key(seed)."
            )
        key = jax.random.key(key)
    return jax.random.bits(key, (2,), np.uint32)


def leaf_words(words: jax.Array, step: ArrayLike, leaves: int) -> list[tuple[jax.Array, jax.Array]]:
    """Two random words for each leaf, other ones at each step."""
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), step)
    drawn = jax.random.bits(key, (leaves, 2), np.uint32)
    return [(drawn[leaf, 0], drawn[leaf, 1]) for leaf in range(leaves)]


def random_bits(shape: tuple[int, ...], words: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Uniform uint32 of `shape`, by hashing indices with two random words.

    The mixing constants are those of "lowbias32" (C. Wellons, Prospecting for Hash Functions,
    2018): each input bit flips each output bit with a probability near one half. The second word
    goes in between the multiplications, so that no two pairs of words give shifted copies of one
    sequence.

    >>> random_bits((3,), (_U(1), _U(2)))
    Array([1902326844,  148456911, 1556831113], dtype=uint32)
    """
    first, second = words
    x = _index(shape) ^ first
    x = (x ^ (x >> _U(16))) * _U(0x7FEB352D)
    x = ((x ^ (x >> _U(15))) + second) * _U(0x846CA68B)
    return x ^ (x >> _U(16))


def swapped(bits: jax.Array) -> jax.Array:
    """The same bits with their halves swapped: as good as others, for a second rounding of the same
    element.
    """
    return (bits << _U(16)) | (bits >> _U(16))


def _index(shape: tuple[int, ...]) -> jax.Array:
    # Axis by axis, which follows any sharding; beyond 2^32 elements it wraps around.
    index, stride = lax.full(shape, 0, _U), 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(_U, shape, axis) * _U(stride % 2**32)
        stride *= shape[axis]
    return index
