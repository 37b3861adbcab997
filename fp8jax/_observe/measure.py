"""What is measured of one operand: its amax, and on request the share of it that is flushed to
zero.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax._recipe import CastSpec
from fp8jax._scaling import PerChannel, PerTensor, observed_amax, scale_from_exponent


class Observed(NamedTuple):
    """What was seen of an operand.

    Attributes:
      amax: float32, like the operand's exponent: of all finite values, infinite where there is
        none.
      flushed: float32 of the same shape, in [0, 1], the share of the elements that are not zero
        which the cast turns into zeros; None where the cast's `DelayedScaling` doesn't ask for it.
    """

    amax: jax.Array
    flushed: jax.Array | None


def observed(x: jax.Array, exponent: jax.Array, cast: CastSpec) -> Observed:
    """What is to be known of all that is cast with the scale `2**exponent`.

    Under `vmap`, where the exponent is shared by the batch, that is one measure of the whole batch;
    where each member has an exponent of its own, one each.

    Args:
      x: float array of any shape.
      exponent: float32 scalar; or, from `share_over_lanes`, `[lanes]`.
      cast: with delayed scaling (static).

    Returns:
      Measures like `exponent`, not differentiable; 0 where `x` is empty. Of several lanes, each has
      those of its part of the leading axis; or all have those of the whole, where that axis can't
      be divided evenly.

    >>> from fp8jax import recipes
    >>> cast = recipes.delayed().forward.lhs
    >>> float(observed(jnp.array([1.0, -3.0]), jnp.float32(0), cast).amax)
    3.0
    >>> of_batch = jax.vmap(observed, in_axes=(0, None, None), out_axes=None)
    >>> of_batch(jnp.array([[1.0], [-3.0]]), jnp.float32(0), cast).amax
    Array(3., dtype=float32)
    """
    x, exponent = jax.lax.stop_gradient(x), jax.lax.stop_gradient(exponent)
    if exponent.ndim and (not x.ndim or x.shape[0] % exponent.size):
        return jax.tree.map(
            lambda measure: jnp.broadcast_to(measure, exponent.shape),
            _measure(x, exponent[0], cast),
        )
    if exponent.ndim:
        x = x.reshape(exponent.size, x.shape[0] // exponent.size, *x.shape[1:])
    return _measure(x, exponent, cast)


def stacked_observed(x: jax.Array, exponent: jax.Array, cast: CastSpec) -> Observed:
    """What is to be known of all that is cast with each of the scales `2**exponent`; of the leading
    axes of `x`, or of all of it.

    >>> from fp8jax import recipes
    >>> x, cast = jnp.array([[1.0, -3.0], [2.0, 0.0]]), recipes.delayed().forward.rhs
    >>> stacked_observed(x, jnp.zeros(2), cast).amax
    Array([3., 2.], dtype=float32)
    """
    return _measure(jax.lax.stop_gradient(x), jax.lax.stop_gradient(exponent), cast)


def _measure(x: jax.Array, exponent: jax.Array, cast: CastSpec) -> Observed:
    counted = cast.delayed is not None and cast.delayed.flushed
    flushed = _beside_exponent(_flushed, cast)(x, exponent) if counted else None
    return Observed(_beside_exponent(_amax)(x, exponent), flushed)


def _amax(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """The amaxes over all axes of `x` but its leading ones that `exponent` has too; those are of
    separate scales.
    """
    leading = tuple(range(exponent.ndim))
    return observed_amax(x, PerChannel(leading) if leading else PerTensor()).reshape(exponent.shape)


def _flushed(x: jax.Array, exponent: jax.Array, cast: CastSpec) -> jax.Array:
    """The shares, over the same axes, of what is not zero and becomes zero."""
    axes = tuple(range(exponent.ndim, x.ndim))
    scaled = jnp.abs(x.astype(jnp.float32)) * jnp.expand_dims(scale_from_exponent(-exponent), axes)
    # Rounded to nearest, half the smallest value is a tie, which goes to zero, the even one.
    smallest = np.float32(cast.format.min_subnormal)
    becomes_zero = scaled <= smallest / 2 if cast.rounding == "nearest" else scaled < smallest
    nonzero = x != 0
    flushed, whole = (
        jnp.sum(which, axes, dtype=jnp.int32).astype(jnp.float32)
        for which in (nonzero & becomes_zero, nonzero)
    )
    return flushed / jnp.maximum(whole, np.float32(1))


@functools.cache
def _beside_exponent(measure: Callable[..., jax.Array], *static: Any):
    """`measure(x, exponent, *static)` of x and exponent, with the rule for batches above."""
    function = jax.custom_batching.custom_vmap(lambda x, exponent: measure(x, exponent, *static))

    @function.def_vmap
    def _(axis_size, in_batched, x, exponent):
        x_batched, exponent_batched = in_batched
        if exponent_batched:
            x = x if x_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return function(x, exponent), True
        return function(jnp.moveaxis(x, 0, exponent.ndim), exponent), False

    return function
