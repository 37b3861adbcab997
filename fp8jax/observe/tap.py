"""Observations without a backward pass of their own."""

import jax
import jax.numpy as jnp


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
