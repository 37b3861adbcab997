"""A product in its own precision, observed as if it ran in FP8: what a site is while FP8 is
switched off.
"""

import jax
import jax.numpy as jnp

from fp8jax._site_exponents import SiteExponents
from fp8jax.ops._operands import observation, observe, observe_operands


def observed_alone(
    out: jax.Array, lhs: jax.Array, rhs: jax.Array, scales: SiteExponents
) -> jax.Array:
    """`out` as it is; on the way back, the amaxes of `lhs`, of `rhs` and of `out`'s gradient become
    the cotangent of `scales`.

    Args:
      out: the product of `lhs` and `rhs`; any shape.
      lhs, rhs: its operands.
      scales: of its site.

    >>> from fp8jax import recipes
    >>> scales = SiteExponents(jnp.zeros(3), "dot", recipes.delayed().delayed_casts)
    >>> out, lhs, rhs = jnp.ones(2), jnp.ones(2), -jnp.ones(2)
    >>> seen = jax.grad(lambda s: (observed_alone(out, lhs, rhs, s) * 3.0).sum())(scales)
    >>> seen.values
    Array([1., 1., 3.], dtype=float32)
    """
    return _observed_alone(out, scales, observe_operands(lhs, rhs, scales))


@jax.custom_vjp
def _observed_alone(out, scales, seen):
    del scales, seen
    return out


def _forward(out, scales, seen):
    return out, (scales, seen)


def _backward(residuals, gradient):
    scales, seen = residuals
    of_gradient = observation(scales, None, None, observe(gradient, scales, "grad"))
    return (
        gradient,
        jax.tree.map(jnp.maximum, seen, of_gradient),
        jax.tree.map(jnp.zeros_like, seen),
    )


_observed_alone.defvjp(_forward, _backward)
