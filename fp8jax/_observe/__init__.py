"""What is seen of operands, and how observations merge: by max, under every transformation of JAX.

An amax leaves a site as the cotangent of the site's scale (see `fp8jax.ops._dot`). JAX merges
cotangents by adding them up, which for amaxes is wrong; so each place where JAX would add is given
its own rule here:

- `vmap`: `observed` reduces over the batch that a scale is shared by, and so its result has no
  batch to sum over.
- `scan`: `share_over_scan` gives each iteration its own copy of a shared scale, and merges their
  cotangents by max.
- `shard_map`: each device observes its own shard; `share_over_devices` merges them.
- `cond`: an untaken branch observes nothing; `share_over_branches` merges those that `vmap` turns
  into selects.
- everywhere else, where something outside adds, averages or rescales them, an update finds the
  amax from sums, see `largest_amax`.

The *seal* of an amax `a` is `sqrt(a)`, merged like the amax outside of a function, where it leaves
it (`exponents_of`). The root is monotone, so after any
merge by max `seal**2 == amax` still; it is strictly concave, so after a sum, or a mean of unequal
terms, it is not.
"""

from fp8jax._observe.lanes import first_lane, has_lanes, merge_over_lanes, share_over_lanes
from fp8jax._observe.measure import Observed, observed, stacked_observed
from fp8jax._observe.seal import largest_amax, seal_fits, seal_of
from fp8jax._observe.share import (
    SharedCalls,
    batched_like,
    led_alone,
    merge_over_axis,
    merge_over_devices,
    share_over_branches,
    share_over_calls,
    share_over_devices,
    share_over_scan,
)
from fp8jax._observe.stack import stack_exponents
from fp8jax._observe.tap import after, tap, with_seen
from fp8jax._observe.unbind import (
    bind,
    bind_scales,
    exponents_of,
    groups_of,
    led_by,
    observed_in,
    observed_together,
    site_exponents,
    unbind,
)

__all__ = [
    "Observed",
    "SharedCalls",
    "after",
    "batched_like",
    "bind",
    "bind_scales",
    "exponents_of",
    "first_lane",
    "groups_of",
    "has_lanes",
    "led_alone",
    "led_by",
    "merge_over_axis",
    "merge_over_devices",
    "merge_over_lanes",
    "observed",
    "observed_in",
    "observed_together",
    "largest_amax",
    "seal_fits",
    "seal_of",
    "share_over_branches",
    "share_over_calls",
    "share_over_devices",
    "share_over_lanes",
    "share_over_scan",
    "site_exponents",
    "stack_exponents",
    "stacked_observed",
    "tap",
    "unbind",
    "with_seen",
]
