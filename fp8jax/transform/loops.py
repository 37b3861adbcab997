"""Scales on their way into a scan: sliced where its weights are, shared where they are not."""

from collections.abc import Callable, Mapping
from typing import Any

from fp8jax.observe import has_lanes, pack, share_over_scan, slices_of, unpack
from fp8jax.ops.ready import Ready, groups_by_axes, stacked_rows
from fp8jax.state import SiteScales
from fp8jax.transform.ahead import depth
from fp8jax.transform.analysis import Entered
from fp8jax.transform.sharing import Scales


def names_stacked_over(step: Entered) -> set[str]:
    """Of the sites whose scales a scan slices."""
    return {site.name for site in step.sites() if step.loop in site.stacked_over}


def scales_of_scan(
    step: Entered, given: Mapping[str, SiteScales | Ready], own: Scales, length: int
) -> tuple[Any, Callable[[Any], dict[str, SiteScales | Ready]]]:
    """What a scan takes as `xs` for the scales of its sites, and what makes an iteration's scales
    of its slice of that.

    What products read of the scales is made in front of the loop.

    Args:
      step: the scan.
      given: the scales of the sites as they came.
      own: the same, themselves.
      length: of the scan.
    """
    names = names_stacked_over(step)
    stacked = {name: node for name, node in own.items() if name in names}
    shared = {name: node for name, node in own.items() if name not in names}
    # Lanes are divided over devices, and would be gathered to be put together.
    with_lanes = {
        name: node for name, node in stacked.items() if has_lanes(node, depth(step, name))
    }
    groups = groups_by_axes(
        {name: node for name, node in stacked.items() if name not in with_lanes}
    )
    ready = [
        {name: node for name, node in group.items() if depth(step, name) == 1}
        for group in (*groups, *groups_by_axes(with_lanes))
    ]
    rows_of_shared = {
        name: (at_hand if isinstance(at_hand := given[name], Ready) else Ready.of(node)).row
        for name, node in shared.items()
        if depth(step, name) == 0
    }

    def of_iteration(slices):
        packed, with_lanes, shared, rows = slices
        scales = {**with_lanes, **shared}
        for group, one in zip(groups, packed):
            scales |= unpack(one, slices_of(group))
        for group, some in zip(ready, rows):
            scales |= {name: Ready.of(scales[name], some, at) for at, name in enumerate(group)}
        return scales | {name: Ready.of(scales[name], row) for name, row in rows_of_shared.items()}

    packed, rows = [pack(group) for group in groups], list(map(stacked_rows, ready))
    return (packed, with_lanes, share_over_scan(shared, length), rows), of_iteration
