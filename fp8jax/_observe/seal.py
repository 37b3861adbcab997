"""What an amax was merged from: told by its seal, and the number of its uses.

JAX adds up cotangents. Where a function is called twice in one loss, where microbatches or devices
are averaged, or gradients clipped, an update gets sums `c * (a_1 + ... + a_n)` in the place of
amaxes. With each amax `a` go its seal, `sqrt(a)`, and 1, for one use. All three are merged alike.
So the three sums give the mean of the amaxes, and the mean and the variance of their roots,
whatever `c` and `n` are. All are non-negative, so the largest root is at most

    mean + sqrt((n - 1) * variance),

which is Samuelson's inequality ("How deviant can you be?", 1968), and for two uses an equality.
"""

import jax
import jax.numpy as jnp
import numpy as np

# seal**2 differs from an intact amax by two roundings of float32 (2**-22); a mean of two amaxes
# that differ by 0.5 % moves it by 1.6e-6, and any sum by far more.
_SEAL_TOLERANCE = 2.0**-20
# As many uses as the bound holds for, where their number can't be told.
_USES = 16


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


def largest_amax(amax: jax.Array, seal: jax.Array, uses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of the amaxes that were merged by max, added, averaged or rescaled, or a bound of
    it; and whether there can be such amaxes.

    It is the amax itself of one use, and that of two. For more it is at least the largest and at
    most `1 + sqrt(n)` times the root of it, squared; where the number is no integer, as of a mean,
    it holds up to 16.

    Args:
      amax, seal, uses: float32 of one shape, sums over the same uses; only finite values.

    >>> a, b = jnp.float32(3.0), jnp.float32(1.0)
    >>> amax, fits = largest_amax(a + b, seal_of(a) + seal_of(b), jnp.float32(2.0))
    >>> round(float(amax), 5), bool(fits)
    (3.0, True)
    >>> amax, fits = largest_amax((a + b) / 2, (seal_of(a) + seal_of(b)) / 2, jnp.float32(1.0))
    >>> 3 < amax < 12, bool(fits)
    (Array(True, dtype=bool), True)
    """
    is_positive = (uses > 0) & (seal >= 0) & (amax >= 0)
    inverse = jnp.where(uses > 0, 1 / uses, np.float32(0))
    mean, root = amax * inverse, seal * inverse
    intact = seal_fits(mean, root)
    variance = jnp.maximum(mean - jnp.square(root), 0)
    whole = jnp.round(uses)
    is_count = (jnp.abs(uses - whole) < 2.0**-10) & (whole > 1) & (whole <= _USES)
    count = jnp.where(is_count, whole, np.float32(_USES))
    bound = jnp.square(root + jnp.sqrt((count - 1) * variance))
    # A sum of non-negative numbers is a bound, too; and so is the largest float.
    greatest = jnp.where(is_count, amax, jnp.finfo(jnp.float32).max)
    bound = jnp.minimum(bound, greatest)
    # The mean of the roots is at most the root of the mean.
    possible = jnp.square(root) <= mean
    return jnp.where(intact, mean, bound), is_positive & (intact | possible)
