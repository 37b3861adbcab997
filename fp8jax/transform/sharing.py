"""Scales that devices share: how they come into a program, and how what was observed leaves it."""

from collections.abc import Sequence

from fp8jax import shims
from fp8jax.observe import (
    merge_over_devices,
    merge_over_lanes,
    share_over_devices,
    share_over_lanes,
)
from fp8jax.state import SiteScales
from fp8jax.transform.sites import Site

Scales = dict[str, SiteScales]


def _axes_by_site(sites, manual: frozenset[str]) -> dict[str, tuple[str, ...]]:
    axes = {
        site.name: tuple(sorted(site.device_axes & manual)) for site in sites if site.has_scales
    }
    return {name: found for name, found in axes.items() if found}


def share_scales_over_devices(
    sites: Sequence[Site], scales: Scales, manual: frozenset[str], checked: bool
) -> Scales:
    """`scales`, where the axes `manual` have just become so; those that vary over an axis already
    are separate there.
    """
    shared = {}
    for name, axes in _axes_by_site(sites, manual).items():
        axes = tuple(axis for axis in axes if axis not in shims.varying_axes(scales[name].seal))
        shared[name] = share_over_devices(scales[name], axes, checked) if axes else scales[name]
    return scales | shared


def merge_observed_over_devices(
    sites: Sequence[Site], observed: Scales, manual: frozenset[str]
) -> Scales:
    """Observations of a forward pass, merged over the axes `manual`."""
    merged = {
        name: merge_over_devices(observed[name], axes)
        for name, axes in _axes_by_site(sites, manual).items()
        if name in observed
    }
    return observed | merged


def share_scales_over_lanes(scales: Scales, looped: bool) -> Scales:
    """`scales`, shared over as many lanes as the mesh at hand has devices, where `looped`: any site
    is in a loop.

    Where the axes of the mesh are explicit, the parts of an array have types of their own, and so
    it stays one.
    """
    lanes = shims.automatic_devices()
    return share_over_lanes(scales, lanes) if scales and lanes > 1 and looped else scales


def merge_observed_over_lanes(scales: Scales, observed: Scales) -> Scales:
    """Observations of a forward pass on what `share_scales_over_lanes` made of `scales`."""
    shared = {
        name: node for name, node in observed.items() if node.seal.ndim > scales[name].seal.ndim
    }
    return observed | merge_over_lanes(shared)
