"""Scales with several uses, whose observations merge by max."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from fp8jax import _shims


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def share_over_scan(scales, length: int):
    """Copies of `scales`, one for each iteration of a scan, whose observations merge by max.

    Args:
      scales: pytree of float32 arrays.
      length: number of iterations.

    Returns:
      The pytree with a leading axis of `length` on each leaf, for the scan's `xs`.

    >>> jax.grad(lambda s: (share_over_scan(s, 2) * jnp.array([3.0, 5.0])).sum())(jnp.float32(1.0))
    Array(5., dtype=float32)
    """
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (length, *jnp.shape(leaf))), scales)


def _share_fwd(scales, length):
    return share_over_scan(scales, length), None


def _share_bwd(length, residuals, observations):
    del length, residuals
    return (merge_over_axis(observations),)


share_over_scan.defvjp(_share_fwd, _share_bwd)


@jax.custom_vjp
def share_over_calls(scales):
    """`scales` twice, for one use and for those after it, whose observations merge by max.

    >>> uses = lambda s: sum(c * x for c, x in zip((3.0, 5.0), share_over_calls(s)))
    >>> jax.grad(uses)(jnp.float32(1.0))
    Array(5., dtype=float32)
    """
    return scales, scales


def _share_over_calls_fwd(scales):
    scales = jax.tree.map(lambda primal: primal.value, scales)
    return (scales, scales), None


def _share_over_calls_bwd(residuals, observations):
    del residuals
    return (jax.tree.map(_larger, *observations),)


def _larger(one, other):
    """The larger of two observations. What no later call uses has none, and costs nothing."""
    if isinstance(one, SymbolicZero):
        return other
    return one if isinstance(other, SymbolicZero) else jnp.maximum(one, other)


share_over_calls.defvjp(_share_over_calls_fwd, _share_over_calls_bwd, symbolic_zeros=True)


class SharedCalls:
    """The scales of what may be called several times in one trace, whose observations merge by max.

    What is left for later calls is of use only in the trace that it was made in.
    """

    def __init__(self):
        self._made_in, self._left = None, None

    def own(self, scales: Any, first: Any) -> Any:
        """The scales of this call.

        Args:
          scales: those of all calls.
          first: a leaf that they come from, the same in each call that shares them.
        """
        trace = _shims.current_trace(), id(first)
        own, self._left = share_over_calls(self._left if self._made_in == trace else scales)
        self._made_in = trace
        return own


def merge_over_axis(observations):
    """The maxima over the leading axis of each leaf; 0, which is "no observation", where that axis
    is empty.
    """
    return jax.tree.map(lambda leaf: jnp.max(leaf, axis=0, initial=0.0), observations)


@jax.custom_batching.custom_vmap
def batched_like(scales, arrays):
    """`scales`; under `vmap`, each member's own where one of `arrays` is each member's own.

    >>> jax.vmap(batched_like, in_axes=(None, 0))(jnp.float32(3), jnp.zeros(2))
    Array([3., 3.], dtype=float32)
    """
    del arrays
    return scales


@batched_like.def_vmap
def _batched_like_arrays(axis_size, in_batched, scales, arrays):
    scales_batched, arrays_batched = in_batched
    if any(jax.tree.leaves(arrays_batched)):
        scales = jax.tree.map(
            lambda leaf, batched: (
                leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
            ),
            scales,
            scales_batched,
        )
        scales_batched = jax.tree.map(lambda _: True, scales_batched)
    return batched_like(scales, arrays), scales_batched


@jax.custom_batching.custom_vmap
def merged_beside(observation: jax.Array, scale: jax.Array) -> jax.Array:
    del scale  # Its batching says over what the observations merge.
    return observation


@merged_beside.def_vmap
def _merged_over_batch(axis_size, in_batched, observation, scale):
    observation_batched, scale_batched = in_batched
    if scale_batched:
        observation = (
            observation
            if observation_batched
            else jnp.broadcast_to(observation, (axis_size, *observation.shape))
        )
        return merged_beside(observation, scale), True
    return merged_beside(
        merge_over_axis(observation) if observation_batched else observation, scale
    ), False


@jax.custom_vjp
def share_over_branches(scales, index: jax.Array):
    """`scales`, for the branches of a conditional on `index`.

    Under `vmap` with an index that differs in the batch, JAX makes a select of the conditional, and
    copies of all that goes into it; the observations of these copies it would add. Here the copies
    are made, and merge by max.
    """
    return _share_over_branches_fwd(scales, index)[0]


def _share_over_branches_fwd(scales, index):
    return batched_like(scales, index), scales


def _share_over_branches_bwd(scales, observations):
    return jax.tree.map(merged_beside, observations, scales), None


share_over_branches.defvjp(_share_over_branches_fwd, _share_over_branches_bwd)


@jax.custom_vjp
def led_alone(scales, leaders):
    """The exponents of a site, with those of others for the operands that are cast by them; what is
    observed is its own. As of `led_by`, which takes many sites of one array.

    Args:
      scales: its `SiteExponents`.
      leaders: for lhs, rhs and grad the `SiteExponents` that it takes that one's of.
    """
    return _led_alone_fwd(scales, leaders)[0]


def _led_alone_fwd(scales, leaders):
    columns = [leader.values[..., column] for column, leader in enumerate(leaders)]
    rest = scales.values[..., len(columns) :]
    values = jnp.concatenate([jnp.stack(columns, axis=-1), rest], axis=-1)
    # Of the members of a batch with leaders of their own, each has observations of its own.
    return batched_like(scales.replace(values=values), columns), scales


led_alone.defvjp(
    _led_alone_fwd, lambda scales, seen: (jax.tree.map(merged_beside, seen, scales), None)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def share_over_devices(scales, axes: tuple[str, ...], checked: bool):
    """`scales`, for products whose operands differ over these manual mesh axes; their observations
    merge by `pmax`.

    All in one place and not a `pmax` at each product: one collective for a function, and none
    inside a conditional, where devices that take different branches would wait for each other for
    ever.

    Args:
      scales: pytree of float32 arrays, the same on all devices.
      axes: names of the axes.
      checked: whether the region tracks what varies (`check_vma=True`). Where it does not, JAX adds
        up the cotangents of what devices share, so that all but the first device return 0.
    """
    return _share_over_devices_fwd(scales, axes, checked)[0]


def _share_over_devices_fwd(scales, axes, checked):
    return jax.tree.map(
        lambda leaf: jax.lax.pcast(leaf, axes, to="varying") if checked else leaf, scales
    ), None


def _share_over_devices_bwd(axes, checked, residuals, observations):
    del residuals
    merged = merge_over_devices(observations, axes)
    if not checked:
        is_first = functools.reduce(
            jnp.logical_and, (jax.lax.axis_index(axis) == 0 for axis in axes)
        )
        merged = jax.tree.map(lambda leaf: jnp.where(is_first, leaf, 0.0), merged)
    return (merged,)


share_over_devices.defvjp(_share_over_devices_fwd, _share_over_devices_bwd)


def merge_over_devices(observations, axes: tuple[str, ...]):
    """The maxima over manual mesh axes."""
    return jax.tree.map(lambda leaf: jax.lax.pmax(leaf, axes), observations)
