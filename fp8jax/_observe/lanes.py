"""Scales in lanes, one for each device's part of a batch, so that what is observed in a loop merges
after it.
"""

import functools

import jax
import jax.numpy as jnp

from fp8jax import _xla
from fp8jax._site_scales import OF_ALL, OF_SITE, SiteScales


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def share_over_lanes(scales: dict[str, SiteScales], lanes: int) -> dict[str, SiteScales]:
    """Copies of `scales`, one for each of so many parts of a batch, whose observations merge by
    max.

    For loops on arrays that are divided over devices. An amax of a whole array would be a
    collective in each iteration; the amaxes of the parts are none, and after the loop those of all
    sites and iterations merge in one.

    Returns:
      The scales with an axis of `lanes` as the last one of each operand's leaf, and the last but
      one of what all have together.

    >>> scales = {"dot": SiteScales(jnp.float32(2), None, None, jnp.zeros(3), None, "dot", ())}
    >>> share_over_lanes(scales, 2)["dot"].lhs
    Array([2., 2.], dtype=float32)
    """

    def copies(leaf, axis):
        return jax.lax.broadcast_in_dim(
            leaf,
            (*leaf.shape[:axis], lanes, *leaf.shape[axis:]),
            tuple(i + (i >= axis) for i in range(leaf.ndim)),
        )

    return _at_lanes(copies, scales, new=1)


def merge_over_lanes(observations: dict[str, SiteScales]) -> dict[str, SiteScales]:
    """The maxima over the lanes of what `share_over_lanes` has shared."""
    return _at_lanes(lambda leaf, axis: jnp.max(leaf, axis), observations, new=0)


def has_lanes(scales: SiteScales, stacked: int) -> bool:
    """Whether the scales of one site, stacked over so many loops, have lanes."""
    return scales.seal.ndim > stacked + 1


def first_lane(scales: SiteScales) -> SiteScales:
    """The scales of one site that `share_over_lanes` has shared, as they were."""
    return _at_lanes(
        lambda leaf, axis: jax.lax.index_in_dim(leaf, 0, axis, keepdims=False), {"": scales}, new=0
    )[""]


def _at_lanes(function, scales, new):
    """`function(leaf, axis)` of all leaves; `axis` is that of lanes, or where they will be, if
    `new` is 1.
    """

    def visit(node):
        of_site = {name: getattr(node, name) for name in OF_SITE}
        return node.replace(
            **{
                name: None if leaf is None else function(leaf, leaf.ndim - 1 + new)
                for name, leaf in of_site.items()
            },
            **{
                name: function(getattr(node, name), node.seal.ndim - 2 + new)
                for name in OF_ALL
                if getattr(node, name) is not None
            },
        )

    return {name: visit(node) for name, node in scales.items()}


def _share_over_lanes_bwd(lanes, residuals, observations):
    del lanes, residuals
    return (_xla.merged(merge_over_lanes(observations)),)


share_over_lanes.defvjp(
    lambda scales, lanes: (share_over_lanes(scales, lanes), None), _share_over_lanes_bwd
)
