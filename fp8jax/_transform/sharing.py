"""Scales that devices share: how they come into a program, and how what was observed leaves it."""

from collections.abc import Collection, Sequence

from fp8jax import _shims
from fp8jax._observe import (
    merge_over_devices,
    merge_over_lanes,
    share_over_devices,
    share_over_lanes,
)
from fp8jax._site_exponents import SiteExponents
from fp8jax._transform.sites import Site

ScalesBySite = dict[str, SiteExponents]


def _axes_by_site(sites, manual: frozenset[str]) -> dict[str, tuple[str, ...]]:
    axes = {
        site.name: tuple(sorted(site.device_axes & manual)) for site in sites if site.has_scales
    }
    return {name: found for name, found in axes.items() if found}


def share_scales_over_devices(
    sites: Sequence[Site], scales: ScalesBySite, manual: frozenset[str], checked: bool
) -> ScalesBySite:
    """`scales`, where the axes `manual` have just become so; those that vary over an axis already
    are separate there.
    """
    shared = {}
    for name, axes in _axes_by_site(sites, manual).items():
        axes = tuple(axis for axis in axes if axis not in _shims.varying_axes(scales[name].values))
        shared[name] = share_over_devices(scales[name], axes, checked) if axes else scales[name]
    return scales | shared


def merge_observed_over_devices(
    sites: Sequence[Site], observed: ScalesBySite, manual: frozenset[str]
) -> ScalesBySite:
    """Observations of a forward pass, merged over the axes `manual`."""
    merged = {
        name: merge_over_devices(observed[name], axes)
        for name, axes in _axes_by_site(sites, manual).items()
        if name in observed
    }
    return observed | merged


def share_scales_over_lanes(scales: ScalesBySite, looped: Collection[str]) -> ScalesBySite:
    """`scales`, those of the sites `looped`, which are in loops, shared over as many lanes as the
    mesh at hand has devices.

    Where the axes of the mesh are explicit, the parts of an array have types of their own, and so
    it stays one.
    """
    lanes = _shims.automatic_devices()
    inside = {name: node for name, node in scales.items() if name in looped}
    return {**scales, **share_over_lanes(inside, lanes)} if inside and lanes > 1 else scales


def merge_observed_over_lanes(scales: ScalesBySite, observed: ScalesBySite) -> ScalesBySite:
    """Observations of a forward pass on what `share_scales_over_lanes` made of `scales`."""
    shared = {name: node for name, node in observed.items() if node.ndim > scales[name].ndim}
    return observed | merge_over_lanes(shared)
