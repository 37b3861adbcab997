"""Scales as a caller gives them, in any tree; and observations as it gets them back."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fp8jax._bank import Group, Scales, check_array, placed_like, whole
from fp8jax._observe import bind_scales, groups_of, observed_in, observed_together
from fp8jax._site_scales import LEAVES, SiteScales
from fp8jax._state import is_scales, is_site_scales
from fp8jax._transform.sharing import ScalesBySite
from fp8jax._transform.sites import Site


def scales_for(sites: Sequence[Site], scales: Any) -> Scales:
    """The scales of these sites, found in any tree and checked; perhaps with those of others that
    lie in the same arrays.
    """
    needed = {site.name: site for site in sites if site.has_scales}
    arrays, groups, loose = [], [], []
    found = collections.Counter()
    for node in filter(is_scales, jax.tree.leaves(scales, is_leaf=is_scales)):
        if is_site_scales(node):
            found[node.site] += 1
            loose += [node] if node.site in needed else []
            continue
        for array, group in zip(node.arrays, node.groups, strict=True):
            found.update(group.sites)
            if any(site in needed for site in group.sites):
                check_array(array, group)
                arrays.append(array)
                groups.append(group)
    _check_that_all_are_there(needed, found, scales)
    for node in loose:
        _check(needed[node.site], node)
    for array, group in zip(arrays, groups):
        _check_group(needed, array, group)
    # NumPy's, too, as states read from bytes are.
    alone = {node.site: jax.tree.map(jnp.asarray, node) for node in loose}
    bound = groups_of(alone)
    return Scales(
        (*(whole(jnp.asarray(array)) for array in arrays), *map(bind_scales, bound.values())),
        (*groups, *bound),
    )


def _check_that_all_are_there(
    needed: dict[str, Site], found: collections.Counter, scales: Any
) -> None:
    for site, count in found.items():
        if count > 1:
            raise ValueError(
                f"scales must hold each site once; got site {site!r} twice. Pass the scales of "
                "this function alone."
            )
    missing = sorted(needed.keys() - found.keys())
    masked = jax.tree.leaves(scales, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if missing and any(isinstance(node, optax.MaskedNode) for node in masked):
        raise ValueError(
            "scales must be given; got optax.MaskedNode() in the place of those of "
            f"{', '.join(missing)}, as the optimizer sees them "
            "inside with_delayed_scaling. Close over the scales: value_fn=lambda t: "
            "fp8_loss(trained['scales'], t['params'], x)."
        )
    if missing:
        raise ValueError(
            "scales must hold every site that the arguments lead through; got none for "
            f"{', '.join(missing)}. "
            "Make them with init on these arguments; fp8jax.migrate_scales(old, new) carries over "
            "those that match."
        )


def _check_group(needed: dict[str, Site], array: Any, group: Group) -> None:
    shape, dtype = jnp.shape(array), jnp.result_type(array)
    for name in group.sites:
        site = needed.get(name)
        alike = (group.casts, shape[:-2], dtype)
        if site is not None and alike != (site.delayed_casts, site.stack, jnp.float32):
            _check(site, Scales((jax.ShapeDtypeStruct(shape, dtype),), (group,))[name])


def _check(site: Site, node: SiteScales) -> None:
    if node.casts != site.delayed_casts:
        raise ValueError(
            f"scales of site {site.name!r} must be those of its recipe; got scales for the casts "
            f"{node.casts}, "
            f"and the recipe has {site.delayed_casts}. Make them anew with init."
        )
    zeros = jax.eval_shape(lambda: SiteScales.zeros(site.name, site.delayed_casts, site.stack))
    for operand in LEAVES:
        got, want = getattr(node, operand), getattr(zeros, operand)
        if want is not None and (
            got is None or (jnp.shape(got), jnp.result_type(got)) != (want.shape, want.dtype)
        ):
            seen = None if got is None else f"{jnp.result_type(got)}{list(jnp.shape(got))}"
            raise ValueError(
                f"scales of site {site.name!r} must have {operand} of "
                f"{want.dtype}{list(want.shape)}; got {seen}. "
                "They are of another model, or were cast: make them anew with init."
            )


def observed_like(scales: Any, observed: ScalesBySite) -> Any:
    """Observations in a tree like `scales`: 0 where there are none."""

    def visit(node):
        if is_site_scales(node):
            seen = observed.get(node.site)
            return jax.tree.map(jnp.zeros_like, node) if seen is None else observed_in(seen)
        if not isinstance(node, Scales):
            return node
        arrays = []
        for array, group in zip(node.arrays, node.groups, strict=True):
            like = whole(jnp.asarray(array))
            seen = observed_together([observed.get(site) for site in group.sites], group, like)
            arrays.append(placed_like(seen, array))
        return Scales(tuple(arrays), node.groups)

    return jax.tree.map(visit, scales, is_leaf=is_scales)
