"""The scales of many sites in one array: apart for the sites that read them, and what those
observed together again.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _shims, _xla
from fp8jax._bank import Group, together
from fp8jax._observe.seal import seal_of
from fp8jax._observe.share import merged_beside
from fp8jax._recipe import OPERANDS
from fp8jax._site_exponents import SiteExponents
from fp8jax._site_scales import SiteScales, observes_flushed

_COUNT = len(OPERANDS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def exponents_of(arrays: tuple[jax.Array, ...], casts: tuple[tuple, ...]) -> jax.Array:
    """The exponents of all sites in some arrays of a `Scales`; the amaxes that come back get their
    seals, and the number of uses, which is 1 where anything was seen.

    The observations of a batch that shares an array merge by max.

    Args:
      arrays: float32 `stack + (sites, columns)`, with one stack.
      casts: of each one's sites (static). All observe what they flush, or none.

    Returns:
      float32 `stack + (sites, 3)`, or `stack + (sites, 6)`: as of `SiteExponents`, of all sites.

    >>> from fp8jax import recipes
    >>> casts = (recipes.delayed().delayed_casts,)
    >>> exponents_of((jnp.arange(16.0).reshape(2, 8),), casts)
    Array([[ 0.,  1.,  2.],
           [ 8.,  9., 10.]], dtype=float32)
    """
    whole = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-2)
    exponents = whole[..., :_COUNT]
    if not observes_flushed(casts[0]):
        return exponents
    flushed = whole[..., 2 * _COUNT + 1 : 3 * _COUNT + 1]
    return jnp.concatenate([exponents, flushed], axis=-1)


def _exponents_bwd(casts, arrays, amaxes):
    ends = np.cumsum([array.shape[-2] for array in arrays])[:-1].tolist()
    parts = jnp.split(amaxes, ends, axis=-2) if ends else [amaxes]
    of_arrays = zip(parts, casts, arrays, strict=True)
    return (tuple(merged_beside(_sealed(part, own), array) for part, own, array in of_arrays),)


exponents_of.defvjp(
    lambda arrays, casts: (exponents_of(arrays, casts), arrays),
    _exponents_bwd,
)


def _sealed(amaxes: jax.Array, casts: tuple) -> jax.Array:
    """The array of a `Scales`, from the amaxes, and the shares flushed, of its sites."""
    amax, flushed = amaxes[..., :_COUNT], amaxes[..., _COUNT:]
    uses = jnp.any(amax != 0, axis=-1, keepdims=True).astype(jnp.float32)
    parts = [amax, seal_of(amax), uses, flushed]
    rest = Group(("",), casts).shape[1] - sum(part.shape[-1] for part in parts)
    return jnp.concatenate([*parts, *[jnp.zeros_like(uses)] * rest], axis=-1)


def observed_in(node: SiteExponents) -> SiteScales:
    """What a site observed, as its `SiteScales`."""
    return Group((), node.casts).node(node.site, _sealed(node.values, node.casts))


def observed_together(nodes: Sequence[SiteExponents | None], group: Group, like: Any) -> jax.Array:
    """What the sites of a group observed, as the group's array in a `Scales`; None where nothing.

    Args:
      nodes: of its sites.
      group: of the array.
      like: the array of the exponents, or another of its shape.
    """
    width = _COUNT * (1 + observes_flushed(group.casts))
    none = jnp.zeros_like(like[..., 0, :1], shape=(*like.shape[:-2], width))
    rows = [none if node is None else node.values for node in nodes]
    return _sealed(_stacked(rows), group.casts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def led_by(exponents: jax.Array, sources: tuple[tuple[int, ...], ...]) -> jax.Array:
    """The exponents of many sites, where some take those of others for an operand that both read;
    what is observed is each one's own.

    Args:
      exponents: float32 `stack + (sites, 3 or 6)`.
      sources: for each site the index of the one whose exponent it takes, for each operand
        (static).

    >>> exponents = jnp.float32([[1, 2, 3], [4, 5, 6]])
    >>> led = lambda exponents: led_by(exponents, ((0, 0, 0), (0, 1, 1)))
    >>> led(exponents)
    Array([[1., 2., 3.],
           [1., 5., 6.]], dtype=float32)
    >>> jax.grad(lambda exponents: (led(exponents) * 7).sum())(exponents)[1]
    Array([7., 7., 7.], dtype=float32)
    """
    own, rest = exponents[..., :_COUNT], exponents[..., _COUNT:]
    at = np.broadcast_to(np.asarray(sources, np.int32), own.shape)
    led = jnp.take_along_axis(own, jnp.asarray(at), axis=-2)
    return jnp.concatenate([led, rest], axis=-1) if rest.shape[-1] else led


led_by.defvjp(
    lambda exponents, sources: (led_by(exponents, sources), None), lambda _, __, seen: (seen,)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unbind(exponents: jax.Array, groups: tuple[Group, ...]) -> tuple[SiteExponents, ...]:
    """The exponents of each site, from one array of all; what they observed comes back as one.

    The observations of a batch that shares the array merge by max.

    Args:
      exponents: float32 `stack + (sites, 3 or 6)`.
      groups: which sites these are (static).

    >>> from fp8jax import recipes
    >>> group = Group(("down", "up"), recipes.delayed().delayed_casts)
    >>> [node.values for node in unbind(jnp.float32([[1, 2, 3], [4, 5, 6]]), (group,))]
    [Array([1., 2., 3.], dtype=float32), Array([4., 5., 6.], dtype=float32)]
    """
    sites = [(site, group.casts) for group in groups for site in group.sites]
    rows = zip(jnp.unstack(exponents, axis=-2), sites, strict=True)
    return tuple(SiteExponents(row, site, casts) for row, (site, casts) in rows)


unbind.defvjp(
    lambda exponents, groups: (unbind(exponents, groups), exponents),
    lambda groups, exponents, seen: (
        merged_beside(_stacked([node.values for node in seen]), exponents),
    ),
)


@functools.partial(jax.jit, inline=True)
def _stacked(rows: Sequence[jax.Array]) -> jax.Array:
    axis = rows[0].ndim - 1
    return _xla.joined([jax.lax.expand_dims(row, (axis,)) for row in rows], axis)


@jax.custom_vjp
def bind(nodes: tuple[SiteExponents, ...]) -> jax.Array:
    """The inverse of `unbind`, of sites of one group.

    Of a batch that shares some of the exponents and not others, the observations merge for those.

    >>> from fp8jax import recipes
    >>> casts = recipes.delayed().delayed_casts
    >>> bind(tuple(SiteExponents(jnp.ones((5, 3)), name, casts) for name in ("down", "up"))).shape
    (5, 2, 3)
    """
    return _stacked([node.values for node in nodes])


def _bind_bwd(nodes, seen):
    group = Group(tuple(node.site for node in nodes), nodes[0].casts)
    return (jax.tree.map(merged_beside, unbind(seen, (group,)), nodes),)


bind.defvjp(lambda nodes: (bind(nodes), nodes), _bind_bwd)


@jax.custom_vjp
def bind_scales(nodes: tuple[SiteScales, ...]) -> jax.Array:
    """The array of a group in a `Scales`, from its sites' `SiteScales`; observations merge as of
    `bind`.
    """
    return together(nodes)


def _bind_scales_bwd(nodes, observations):
    rows = jnp.unstack(observations, axis=-2)
    apart = tuple(
        Group((), node.casts).node(node.site, row) for node, row in zip(nodes, rows, strict=True)
    )
    return (jax.tree.map(merged_beside, apart, nodes),)


bind_scales.defvjp(lambda nodes: (bind_scales(nodes), nodes), _bind_scales_bwd)


def groups_of(nodes: Mapping[str, Any]) -> dict[Group, tuple[Any, ...]]:
    """`SiteExponents`, or `SiteScales`, by groups that can be one array each: of the same casts and
    shapes, and varying over the same mesh axes.
    """
    kinds = collections.defaultdict(list)
    for node in nodes.values():
        leaves = jax.tree.leaves(node)
        shapes = tuple(leaf.shape for leaf in leaves)
        kinds[node.casts, shapes, *map(_shims.varying_axes, leaves)].append(node)
    return {
        Group(tuple(node.site for node in alike), alike[0].casts): tuple(alike)
        for alike in kinds.values()
    }


@jax.custom_vjp
def site_exponents(scales: SiteScales) -> SiteExponents:
    """The exponents of a `SiteScales` of its own; what is observed comes back as its cotangent.

    >>> from fp8jax import recipes
    >>> scales = SiteScales.zeros("up", recipes.delayed().delayed_casts)
    >>> amaxes = lambda scales: (site_exponents(scales).values * jnp.float32([4, 9, 0])).sum()
    >>> jax.grad(amaxes)(scales).seal
    Array([2., 3., 0.], dtype=float32)
    """
    array = Group((), scales.casts).numbers(scales)[..., None, :]
    values = exponents_of((array,), (scales.casts,))[..., 0, :]
    return SiteExponents(values, scales.site, scales.casts)


site_exponents.defvjp(
    lambda scales: (site_exponents(scales), scales),
    lambda scales, seen: (jax.tree.map(merged_beside, observed_in(seen), scales),),
)
