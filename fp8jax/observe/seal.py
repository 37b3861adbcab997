"""Seals, which tell whether an amax has been added to, averaged or rescaled."""

import jax
import jax.numpy as jnp

# seal**2 differs from an intact amax by two roundings of float32 (2**-22); a mean of two amaxes
# that differ by 0.5 % moves it by 1.6e-6, and any sum or rescaling by far more.
_SEAL_TOLERANCE = 2.0**-20


def seal_of(amax: jax.Array) -> jax.Array:
    """The seal of an amax: its square root, float32 of the same shape.

    >>> float(seal_of(jnp.float32(9.0)))
    3.0
    """
    return jnp.sqrt(amax)


def seal_fits(amax: jax.Array, seal: jax.Array) -> jax.Array:
    """Whether `amax` comes from merging by max alone: bool of the shape of `amax`; only for finite
    values.

    >>> a, b = jnp.float32(1.0), jnp.float32(1.5)
    >>> bool(seal_fits(jnp.maximum(a, b), jnp.maximum(seal_of(a), seal_of(b))))
    True
    >>> bool(seal_fits((a + b) / 2, (seal_of(a) + seal_of(b)) / 2))
    False
    """
    tiniest = jnp.finfo(jnp.float32).tiny
    return jnp.abs(jnp.square(seal) - amax) <= _SEAL_TOLERANCE * amax + tiniest
