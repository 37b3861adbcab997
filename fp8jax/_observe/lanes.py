"""Scales in lanes, one for each device's part of a batch, so that what is observed in a loop merges
after it.
"""

import functools

import jax
import jax.numpy as jnp

from fp8jax import _xla
from fp8jax._site_exponents import SiteExponents


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def share_over_lanes(scales: dict[str, SiteExponents], lanes: int) -> dict[str, SiteExponents]:
    """Copies of `scales`, one for each of so many parts of a batch, whose observations merge by
    max.

    For loops on arrays that are divided over devices. An amax of a whole array would be a
    collective in each iteration; the amaxes of the parts are none, and after the loop those of all
    sites and iterations merge in one.

    Returns:
      The scales with an axis of `lanes` as their last one but that of the site's own numbers.

    >>> scales = {"dot": SiteExponents(jnp.float32([2, 0, 0]), "dot", ())}
    >>> share_over_lanes(scales, 2)["dot"].values[:, 0]
    Array([2., 2.], dtype=float32)
    """

    def copies(node):
        values = node.values
        shape = (*values.shape[:-1], lanes, values.shape[-1])
        kept = (*range(values.ndim - 1), values.ndim)
        return node.replace(values=jax.lax.broadcast_in_dim(values, shape, kept), whole=values)

    return {name: copies(node) for name, node in scales.items()}


def merge_over_lanes(observations: dict[str, SiteExponents]) -> dict[str, SiteExponents]:
    """The maxima over the lanes of what `share_over_lanes` has shared."""
    return {
        name: node.replace(values=jnp.max(node.values, axis=-2), whole=None)
        for name, node in observations.items()
    }


def has_lanes(scales: SiteExponents, stacked: int) -> bool:
    """Whether the scales of one site, stacked over so many loops, have lanes."""
    return scales.ndim > stacked


def first_lane(scales: SiteExponents) -> SiteExponents:
    """The scales of one site that `share_over_lanes` has shared, as they were; for what has no
    lanes.
    """
    if scales.whole is not None:
        return scales.replace(values=scales.whole, whole=None)
    values = jax.lax.index_in_dim(scales.values, 0, scales.ndim - 1, keepdims=False)
    return scales.replace(values=values)


def _share_over_lanes_bwd(lanes, residuals, observations):
    del lanes, residuals
    wholes = {name: node.whole for name, node in observations.items()}
    merged, wholes = _xla.merged((merge_over_lanes(observations), wholes))
    return (
        {
            name: node.replace(values=jnp.maximum(node.values, wholes[name]))
            for name, node in merged.items()
        },
    )


share_over_lanes.defvjp(
    lambda scales, lanes: (share_over_lanes(scales, lanes), None), _share_over_lanes_bwd
)
