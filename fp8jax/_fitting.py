"""Scales that make the squared error of each group small, in the place of those that fit its amax.

A code's error is a share of its value's binade, and the largest values make most of it: so what
counts is where within a binade they come to lie. A scale between that of the amax and twice that
moves them there, and saturates nothing. Smaller scales, which saturate, were tried on normal,
uniform and heavy-tailed values in E4M3, E5M2 and E3M4: they gain less than 0.1 dB. Powers of two,
which change no code but the smallest, gain nothing in E4M3 and at most 0.3 dB in E3M4.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax._conversion import rounded
from fp8jax._formats import Format
from fp8jax._scaling import Scaling, group_amax, group_sum, multiply_groups, scale_from_amax

# Steps of an octave. Twice as many gain 0.1 dB in a group of 400 normal values.
FACTORS = np.exp2(np.arange(32) / 32).astype(np.float32)


def check_scale(
    scale: str | None, power_of_two: bool, margin: float = 1.0, rounding: str = "nearest"
):
    """Raise ValueError where scales can't be computed as `quantize` is asked to."""
    if scale not in ("amax", "mse"):
        raise ValueError(f'scale must be "amax", "mse" or scales; got {scale!r}.')
    if scale == "mse" and (power_of_two or margin != 1 or rounding != "nearest"):
        raise ValueError(
            'scale="mse" goes with power_of_two=False, margin=1.0 and rounding="nearest"; got '
            f'{power_of_two}, {margin} and {rounding!r}. Pass these, or scale="amax".'
        )


def scale_of_least_error(x: jax.Array, fmt: Format, scaling: Scaling) -> jax.Array:
    """Of 32 scales from that of each group's amax to twice that, the one of least squared error.

    ``argmin over s of sum((x - s * round(x / s))**2)``, with ``s = amax / fmt.max * 2**(k / 32)``
    and k from 0 to 31. Infinities and NaNs don't count.

    Args:
      x: floating array of any shape.
      fmt: a format of signed values.
      scaling: the granularity.

    Returns:
      float32 array of normal numbers, of `scaling.group_shape(x.shape)`, not differentiable; 1
      where the amax is 0.

    Sources: Nagel et al., "A White Paper on Neural Network Quantization", arXiv 2106.08295, section
    3.1 (ranges by mean squared error); for FP8, Kuzmin et al., arXiv 2208.09225.

    >>> from fp8jax import E4M3
    >>> from fp8jax import PerTensor
    >>> x = jnp.array([9.5, 9.5, 14.0])  # 9.5 * 448 / 14 is between two codes
    >>> scale_of_least_error(x, E4M3, PerTensor()) * 448 / 14
    Array(1.269051, dtype=float32)
    """
    base = scale_from_amax(group_amax(x, scaling), fmt, power_of_two=False)
    errors = errors_of_scales(x, base, fmt, scaling)
    order = lax.broadcasted_iota(np.int32, errors.shape, 0)
    is_best = order == jnp.argmin(errors, axis=0, keepdims=True).astype(np.int32)
    # Not looked up: explicit meshes don't look up by an index that devices share.
    factors = FACTORS.reshape(-1, *(1,) * base.ndim)
    return base * jnp.sum(jnp.where(is_best, factors, np.float32(0)), axis=0)


def errors_of_scales(x: jax.Array, base: jax.Array, fmt: Format, scaling: Scaling) -> jax.Array:
    """The squared error of each group at each of its scales: ``base * FACTORS``.

    Args:
      x: floating array of any shape, whose magnitudes are at most ``base * fmt.max``.
      base: float32 scales of `scaling.group_shape(x.shape)`.
      fmt, scaling: as of `scale_of_least_error`.

    Returns:
      float32 array `[32, *groups]`, in units of ``base**2``.
    """
    x = lax.convert_element_type(lax.stop_gradient(x), np.float32)
    x = lax.select(lax.abs(x) < np.float32(np.inf), x, lax.full_like(x, 0))  # False of a NaN.
    largest = np.float32(fmt.max)

    def error(factor):
        # By the reciprocal, as the values are scaled when they are cast.
        scaled = multiply_groups(x, np.float32(1) / (base * factor), scaling)
        scaled = lax.clamp(-largest, scaled, largest)
        return group_sum(jnp.square((rounded(scaled, fmt) - scaled) * factor), scaling)

    return lax.map(error, jnp.asarray(FACTORS))
