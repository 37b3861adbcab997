"""Seals, which tell whether an amax has been added to, averaged or rescaled, and whether it is of all that there was."""

import jax
import jax.numpy as jnp
import numpy as np

# seal**2 differs from an intact amax by two roundings of float32 (2**-22); a mean of two amaxes that differ by
# 0.5 % moves it by 1.6e-6, and any sum or rescaling by far more.
_SEAL_TOLERANCE = 2.0**-20

# The seal of an amax beside which something is not finite is larger by this, which is beyond the tolerance.
_NONFINITE = 1 + 2.0**-16


def seal_of(amax: jax.Array) -> jax.Array:
    """The seal of an amax: its square root, float32 of the same shape.

    >>> float(seal_of(jnp.float32(9.0)))
    3.0
    """
    return jnp.sqrt(amax)


def sealed(amax: jax.Array, nonfinite: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An observation as it is merged: the amax and its seal, which tells what is not finite too.

    So it needs no number of its own: a merge by max keeps it, unless it merges with a larger amax that is of finite
    values alone. Where nothing but zeros is finite, there is no amax, and the observation is infinite.

    Args:
      amax: float32 of any shape, finite.
      nonfinite: float32 of the same shape, positive beside what is not finite.

    >>> amax, seal = sealed(jnp.array([9.0, 9.0, 0.0]), jnp.array([0.0, 1.0, 1.0]))
    >>> amax, seal_fits(amax, seal), holds_nonfinite(amax, seal)
    (Array([ 9.,  9., inf], dtype=float32), Array([ True,  True, False], dtype=bool), Array([False,  True,  True], dtype=bool))
    """
    nonfinite = nonfinite > 0
    amax = jnp.where(nonfinite & (amax == 0), np.float32(np.inf), amax)
    return amax, seal_of(amax) * jnp.where(nonfinite, np.float32(_NONFINITE), np.float32(1))


def holds_nonfinite(amax: jax.Array, seal: jax.Array) -> jax.Array:
    """Whether an observation tells of something that is not finite: bool of the shape of `amax`."""
    finite = jnp.isfinite(amax) & jnp.isfinite(seal)
    return ~finite | _fits(amax, seal / np.float32(_NONFINITE)) & ~_fits(amax, seal)


def seal_fits(amax: jax.Array, seal: jax.Array) -> jax.Array:
    """Whether `amax` comes from merging by max alone: bool of the shape of `amax`; only for finite values.

    >>> a, b = jnp.float32(1.0), jnp.float32(1.5)
    >>> bool(seal_fits(jnp.maximum(a, b), jnp.maximum(seal_of(a), seal_of(b))))
    True
    >>> bool(seal_fits((a + b) / 2, (seal_of(a) + seal_of(b)) / 2))
    False
    """
    return _fits(amax, seal) | _fits(amax, seal / np.float32(_NONFINITE))


def _fits(amax, seal):
    tiniest = jnp.finfo(jnp.float32).tiny
    return jnp.abs(jnp.square(seal) - amax) <= _SEAL_TOLERANCE * amax + tiniest
