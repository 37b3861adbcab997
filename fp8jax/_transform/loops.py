"""Scales on their way into a scan: sliced where its weights are, shared where they are not."""

from collections.abc import Callable, Mapping
from typing import Any

from fp8jax._observe import bind, groups_of, has_lanes, share_over_scan, unbind
from fp8jax._site_exponents import SiteExponents
from fp8jax._transform.ahead import depth
from fp8jax._transform.analysis import Entered
from fp8jax._transform.sharing import ScalesBySite
from fp8jax.ops._ready import Ready, stacked_rows, stacked_rows_of_lanes


def names_stacked_over(step: Entered) -> set[str]:
    """Of the sites whose scales a scan slices."""
    return {site.name for site in step.sites() if step.loop in site.stacked_over}


def scales_of_scan(
    step: Entered, given: Mapping[str, SiteExponents | Ready], own: ScalesBySite, length: int
) -> tuple[Any, Callable[[Any], dict[str, SiteExponents | Ready]]]:
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
    groups = groups_of({name: node for name, node in stacked.items() if name not in with_lanes})
    arrays = [bind(nodes) for nodes in groups.values()]
    rows = [stacked_rows(array) for array in arrays]
    ready_lanes = [name for name in with_lanes if depth(step, name) == 1]
    rows_of_lanes = stacked_rows_of_lanes([with_lanes[name] for name in ready_lanes])
    rows_of_shared = {
        name: (at_hand if isinstance(at_hand := given[name], Ready) else Ready.of(node)).row
        for name, node in shared.items()
        if depth(step, name) == 0
    }

    def of_iteration(slices):
        arrays, rows, with_lanes, rows_of_lanes, shared = slices
        scales = {**with_lanes, **shared}
        for at, name in enumerate(ready_lanes):
            scales[name] = Ready.of(with_lanes[name], rows_of_lanes, at)
        for group, array, of_group in zip(groups, arrays, rows, strict=True):
            for at, node in enumerate(unbind(array, (group,))):
                ready = node if of_group is None else Ready.of(node, of_group, at)
                scales[node.site] = ready
        return scales | {name: Ready.of(scales[name], row) for name, row in rows_of_shared.items()}

    xs = arrays, rows, with_lanes, rows_of_lanes, share_over_scan(shared, length)
    return xs, of_iteration
