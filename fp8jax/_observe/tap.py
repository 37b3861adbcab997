"""Observations without a backward pass of their own, and scales that wait for observations."""

import jax
import jax.numpy as jnp

from fp8jax import _xla
from fp8jax._observe.share import merged_beside


@jax.custom_vjp
def tap(outputs, scales, observations):
    """`outputs` as they are; on the way back, `observations` become the cotangent of `scales`.

    For what observes without a backward pass of its own. The observations get no cotangent.
    """
    del scales, observations
    return outputs


def _tap_fwd(outputs, scales, observations):
    del scales
    return outputs, observations


def _tap_bwd(observations, cotangents):
    return cotangents, observations, jax.tree.map(jnp.zeros_like, observations)


tap.defvjp(_tap_fwd, _tap_bwd)


@jax.custom_vjp
def after(scales, observations):
    """`scales` as they are, which on CPUs are not read before the observations were made.

    See `fp8jax._xla.after`.

    Args:
      scales: pytree of float arrays.
      observations: the same of amaxes or seals, of shapes that broadcast to these; they get no
        cotangent.

    >>> after(jnp.zeros(2), jnp.float32(5))
    Array([0., 0.], dtype=float32)
    """

    return _xla.after(scales, observations)


after.defvjp(
    lambda scales, observations: (after(scales, observations), observations),
    lambda observations, cotangents: (cotangents, jax.tree.map(jnp.zeros_like, observations)),
)


@jax.custom_vjp
def with_seen(scales, observations):
    """`scales` as they are; on the way back, `observations` merge with those of their uses by max.

    For what was seen in front of a loop that uses them, once and not in each iteration. Where no
    use comes by on the way back, nothing does. The observations get no cotangent.

    >>> jax.grad(lambda s: with_seen(s, jnp.float32(5.0)) * 3.0)(jnp.float32(1.0))
    Array(5., dtype=float32)
    """
    del observations
    return scales


def _with_seen_bwd(residuals, of_uses):
    scales, observations = residuals
    seen = jax.tree.map(merged_beside, observations, scales)
    return jax.tree.map(jnp.maximum, of_uses, seen), jax.tree.map(jnp.zeros_like, observations)


with_seen.defvjp(lambda scales, observations: (scales, (scales, observations)), _with_seen_bwd)
