"""The scales of many sites in one array: apart for the sites that read them, and what those
observed together again.
"""

import collections
import functools
from collections.abc import Mapping

import jax

from fp8jax import _shims
from fp8jax._bank import Group, together
from fp8jax._observe.share import merged_beside
from fp8jax._site_scales import SiteScales


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unbind(array: jax.Array, group: Group) -> tuple[SiteScales, ...]:
    """The `SiteScales` of all sites of a group, from the group's array in a `Scales`; what they
    observed comes back as one array.

    The observations of a batch that shares the array merge by max.

    Args:
      array: float32 `stack + (sites, columns)`.
      group: which sites these are (static).

    >>> from fp8jax import recipes
    >>> group = Group(("down", "up"), recipes.delayed().delayed_casts)
    >>> [node.rhs for node in unbind(jax.numpy.arange(16.0).reshape(2, 8), group)]
    [Array(1., dtype=float32), Array(9., dtype=float32)]
    """
    alone = _apart(array, len(group.sites), group.casts)
    return tuple(node.replace(site=site) for site, node in zip(group.sites, alone, strict=True))


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _apart(array: jax.Array, sites: int, casts: tuple) -> tuple[SiteScales, ...]:
    # Without the names, so that it is traced once for all groups alike.
    rows = (jax.lax.index_in_dim(array, site, -2, keepdims=False) for site in range(sites))
    return tuple(Group((), casts).node("", row) for row in rows)


unbind.defvjp(
    lambda array, group: (unbind(array, group), array),
    lambda group, array, observations: (merged_beside(together(observations), array),),
)


@jax.custom_vjp
def bind(nodes: tuple[SiteScales, ...]) -> jax.Array:
    """The inverse of `unbind`, of sites with the same casts and stack.

    Of a batch that shares some of the scales and not others, the observations merge for those.

    >>> from fp8jax import recipes
    >>> casts = recipes.delayed().delayed_casts
    >>> bind(tuple(SiteScales.zeros(name, casts, (3,)) for name in ("down", "up"))).shape
    (3, 2, 8)
    """
    return together(nodes)


def _bind_bwd(nodes, observations):
    group = Group(tuple(node.site for node in nodes), nodes[0].casts)
    return (jax.tree.map(merged_beside, unbind(observations, group), nodes),)


bind.defvjp(lambda nodes: (bind(nodes), nodes), _bind_bwd)


def groups_of(scales: Mapping[str, SiteScales]) -> dict[Group, tuple[SiteScales, ...]]:
    """`scales` in groups that can be one array each: of the same casts and shapes, and varying over
    the same mesh axes.
    """
    kinds = collections.defaultdict(list)
    for node in scales.values():
        kinds[node.casts, node.seal.shape, _shims.varying_axes(node.seal)].append(node)
    return {
        Group(tuple(node.site for node in nodes), nodes[0].casts): tuple(nodes)
        for nodes in kinds.values()
    }
