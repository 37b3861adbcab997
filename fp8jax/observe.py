"""Amaxes, and how they merge: by max, under every transformation of JAX.

An amax leaves a site as the cotangent of the site's scale (see `fp8jax.ops.dot`). JAX merges cotangents by adding them
up, which for amaxes is wrong; so each place where JAX would add is given its own rule here:

- `vmap`: `observed_amax` reduces over the batch that a scale is shared by, and so its result has no batch to sum over.
- `scan`: `share_over_scan` gives each iteration its own copy of a shared scale, and merges their cotangents by max.
- `shard_map`: each device observes its own shard; `share_over_devices` merges them.
- `cond`: an untaken branch observes nothing; `share_over_branches` merges those that `vmap` turns into selects.
- everywhere else, where something outside adds, averages or clips them, the *seal* tells.

The seal of an amax `a` is `sqrt(a)`, merged like the amax. The root is monotone, so after any merge by max
`seal**2 == amax` still; it is strictly concave, so after a sum, a mean of unequal terms, or a rescaling, it is not.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from fp8jax.recipe import OPERANDS
from fp8jax.scaling import PerChannel, PerTensor, group_amax
from fp8jax.state import SiteScales

# seal**2 differs from an intact amax by two roundings of float32 (2**-22); a mean of two amaxes that differ by
# 0.5 % moves it by 1.6e-6, and any sum or rescaling by far more.
_SEAL_TOLERANCE = 2.0**-20


@jax.custom_batching.custom_vmap
def _amax_beside_exponent(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """The amaxes over all axes of `x` but its leading ones that `exponent` has too; those are of separate scales."""
    leading = tuple(range(exponent.ndim))
    return group_amax(x, PerChannel(leading)).reshape(exponent.shape) if leading else group_amax(x, PerTensor())


@_amax_beside_exponent.def_vmap
def _amax_of_batch(axis_size, in_batched, x, exponent):
    x_batched, exponent_batched = in_batched
    if exponent_batched:
        x = x if x_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        return _amax_beside_exponent(x, exponent), True
    return _amax_beside_exponent(jnp.moveaxis(x, 0, exponent.ndim), exponent), False


def observed_amax(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """The amax of all that is cast with the scale `2**exponent`.

    Under `vmap`, where the exponent is shared by the batch, that is one amax over the whole batch; where each member
    has an exponent of its own, one amax each.

    Args:
      x: float array of any shape.
      exponent: float32 scalar; or, from `share_over_lanes`, `[lanes]`.

    Returns:
      float32 like `exponent`, not differentiable; 0 where `x` is empty. Of several lanes, each has the amax of its part of
      the leading axis; or all of the whole, where that axis can't be divided evenly.

    >>> float(observed_amax(jnp.array([1.0, -3.0]), jnp.float32(0)))
    3.0
    >>> jax.vmap(observed_amax, in_axes=(0, None), out_axes=None)(jnp.array([[1.0], [-3.0]]), jnp.float32(0))
    Array(3., dtype=float32)
    """
    x, exponent = jax.lax.stop_gradient(x), jax.lax.stop_gradient(exponent)
    if exponent.ndim and (not x.ndim or x.shape[0] % exponent.size):
        return jnp.broadcast_to(_amax_beside_exponent(x, exponent[0]), exponent.shape)
    if exponent.ndim:
        x = x.reshape(exponent.size, x.shape[0] // exponent.size, *x.shape[1:])
    return _amax_beside_exponent(x, exponent)


def stacked_amax(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """The amaxes of all that is cast with each of the scales `2**exponent`; those of the leading axes of `x`, or of all of it.

    >>> stacked_amax(jnp.array([[1.0, -3.0], [2.0, 0.0]]), jnp.zeros(2))
    Array([3., 2.], dtype=float32)
    """
    return _amax_beside_exponent(jax.lax.stop_gradient(x), jax.lax.stop_gradient(exponent))


def seal_of(amax: jax.Array) -> jax.Array:
    """The seal of an amax: its square root, float32 of the same shape.

    >>> float(seal_of(jnp.float32(9.0)))
    3.0
    """
    return jnp.sqrt(amax)


def seal_fits(amax: jax.Array, seal: jax.Array) -> jax.Array:
    """Whether `amax` comes from merging by max alone: bool of the shape of `amax`; only for finite values.

    >>> a, b = jnp.float32(1.0), jnp.float32(1.5)
    >>> bool(seal_fits(jnp.maximum(a, b), jnp.maximum(seal_of(a), seal_of(b))))
    True
    >>> bool(seal_fits((a + b) / 2, (seal_of(a) + seal_of(b)) / 2))
    False
    """
    tiniest = jnp.finfo(jnp.float32).tiny
    return jnp.abs(jnp.square(seal) - amax) <= _SEAL_TOLERANCE * amax + tiniest


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
def pack(scales):
    """All numbers of `scales`, whose leaves have the same leading axis, in one array; for a scan's `xs`.

    A scan slices each array that goes in, and stacks each array of observations that comes out, by a kernel of its own.

    Args:
      scales: pytree of float32 arrays `[length, ...]`.

    Returns:
      float32 array `[length, numbers]`.

    >>> pack({"a": jnp.zeros(2), "b": jnp.ones((2, 3))})
    Array([[0., 1., 1., 1.],
           [0., 1., 1., 1.]], dtype=float32)
    """
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(scales)], axis=1)


def _pack_bwd(scales, observations):
    leaves, tree = jax.tree.flatten(scales)
    pieces = _pieces(observations, [leaf.shape for leaf in leaves])
    # A batch that shares some of the scales and not others was made to have all of its own.
    return (jax.tree.unflatten(tree, list(map(_merged_beside, pieces, leaves))),)


pack.defvjp(lambda scales: (pack(scales), scales), _pack_bwd)


def slices_of(scales) -> tuple:
    """What one iteration sees of `scales`: the structure, and the shapes of the leaves; hashable, for `unpack`."""
    leaves, tree = jax.tree.flatten(scales)
    return tree, tuple(leaf.shape[1:] for leaf in leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unpack(packed: jax.Array, slices: tuple):
    """One iteration's slice of what `pack` put together, as a pytree again.

    >>> scales = {"a": jnp.zeros(2), "b": jnp.ones((2, 3))}
    >>> unpack(pack(scales)[0], slices_of(scales))
    {'a': Array(0., dtype=float32), 'b': Array([1., 1., 1.], dtype=float32)}
    """
    tree, shapes = slices
    return jax.tree.unflatten(tree, _pieces(packed, shapes))


def _unpack_bwd(slices, residuals, observations):
    del slices, residuals
    return (jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(observations)]),)


unpack.defvjp(lambda packed, slices: (unpack(packed, slices), None), _unpack_bwd)


def _pieces(packed: jax.Array, shapes) -> list[jax.Array]:
    """The last axis of `packed` cut into arrays of these shapes; the axis before it, if any, is theirs too."""
    sizes = [math.prod(shape[packed.ndim - 1:]) for shape in shapes]
    ends = itertools.accumulate(sizes)
    return [jax.lax.slice_in_dim(packed, end - size, end, axis=-1).reshape(shape) for shape, size, end in zip(shapes, sizes, ends)]


@jax.custom_vjp
def share_over_calls(scales):
    """`scales` twice, for one use and for those after it, whose observations merge by max.

    >>> jax.grad(lambda s: sum(c * x for c, x in zip((3.0, 5.0), share_over_calls(s))))(jnp.float32(1.0))
    Array(5., dtype=float32)
    """
    return scales, scales


def _share_over_calls_bwd(residuals, observations):
    del residuals
    return (jax.tree.map(jnp.maximum, *observations),)


share_over_calls.defvjp(lambda scales: ((scales, scales), None), _share_over_calls_bwd)


def merge_over_axis(observations):
    """The maxima over the leading axis of each leaf; 0, which is "no observation", where that axis is empty."""
    return jax.tree.map(lambda leaf: jnp.max(leaf, axis=0, initial=0.0), observations)


@jax.custom_batching.custom_vmap
def _batched_like(scale: jax.Array, index: jax.Array) -> jax.Array:
    del index
    return scale


@_batched_like.def_vmap
def _batched_like_index(axis_size, in_batched, scale, index):
    scale_batched, index_batched = in_batched
    if index_batched and not scale_batched:
        scale = jnp.broadcast_to(scale, (axis_size, *scale.shape))
    return _batched_like(scale, index), scale_batched or index_batched


@jax.custom_batching.custom_vmap
def _merged_beside(observation: jax.Array, scale: jax.Array) -> jax.Array:
    del scale  # Its batching says over what the observations merge.
    return observation


@_merged_beside.def_vmap
def _merged_over_batch(axis_size, in_batched, observation, scale):
    observation_batched, scale_batched = in_batched
    if scale_batched:
        observation = observation if observation_batched else jnp.broadcast_to(observation, (axis_size, *observation.shape))
        return _merged_beside(observation, scale), True
    return _merged_beside(merge_over_axis(observation) if observation_batched else observation, scale), False


@jax.custom_vjp
def share_over_branches(scales, index: jax.Array):
    """`scales`, for the branches of a conditional on `index`.

    Under `vmap` with an index that differs in the batch, JAX makes a select of the conditional, and copies of all that
    goes into it; the observations of these copies it would add. Here the copies are made, and merge by max.
    """
    return _share_over_branches_fwd(scales, index)[0]


def _share_over_branches_fwd(scales, index):
    return jax.tree.map(lambda leaf: _batched_like(leaf, index), scales), scales


def _share_over_branches_bwd(scales, observations):
    return jax.tree.map(_merged_beside, observations, scales), None


share_over_branches.defvjp(_share_over_branches_fwd, _share_over_branches_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def share_over_devices(scales, axes: tuple[str, ...], checked: bool):
    """`scales`, for products whose operands differ over these manual mesh axes; their observations merge by `pmax`.

    All in one place and not a `pmax` at each product: one collective for a function, and none inside a conditional, where
    devices that take different branches would wait for each other for ever.

    Args:
      scales: pytree of float32 arrays, the same on all devices.
      axes: names of the axes.
      checked: whether the region tracks what varies (`check_vma=True`). Where it does not, JAX adds up the cotangents of
        what devices share, so that all but the first device return 0.
    """
    return _share_over_devices_fwd(scales, axes, checked)[0]


def _share_over_devices_fwd(scales, axes, checked):
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying") if checked else leaf, scales), None


def _share_over_devices_bwd(axes, checked, residuals, observations):
    del residuals
    merged = merge_over_devices(observations, axes)
    if not checked:
        is_first = functools.reduce(jnp.logical_and, (jax.lax.axis_index(axis) == 0 for axis in axes))
        merged = jax.tree.map(lambda leaf: jnp.where(is_first, leaf, 0.0), merged)
    return (merged,)


share_over_devices.defvjp(_share_over_devices_fwd, _share_over_devices_bwd)


def merge_over_devices(observations, axes: tuple[str, ...]):
    """The maxima over manual mesh axes."""
    return jax.tree.map(lambda leaf: jax.lax.pmax(leaf, axes), observations)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def share_over_lanes(scales: dict[str, SiteScales], lanes: int) -> dict[str, SiteScales]:
    """Copies of `scales`, one for each of so many parts of a batch, whose observations merge by max.

    For loops on arrays that are divided over devices. An amax of a whole array would be a collective in each iteration; the
    amaxes of the parts are none, and after the loop those of all sites and iterations merge in one.

    Returns:
      The scales with an axis of `lanes` as the last one of each operand's leaf, and the last but one of the seals.

    >>> scales = {"dot": SiteScales(jnp.float32(2), None, None, jnp.zeros(3), "dot", ())}
    >>> share_over_lanes(scales, 2)["dot"].lhs
    Array([2., 2.], dtype=float32)
    """
    def copies(leaf, axis):
        return jax.lax.broadcast_in_dim(leaf, (*leaf.shape[:axis], lanes, *leaf.shape[axis:]),
                                        tuple(i + (i >= axis) for i in range(leaf.ndim)))

    return _at_lanes(copies, scales, new=1)


def merge_over_lanes(observations: dict[str, SiteScales]) -> dict[str, SiteScales]:
    """The maxima over the lanes of what `share_over_lanes` has shared."""
    return _at_lanes(lambda leaf, axis: jnp.max(leaf, axis), observations, new=0)


def has_lanes(scales: SiteScales, stacked: int) -> bool:
    """Whether the scales of one site, stacked over so many loops, have lanes."""
    return scales.seal.ndim > stacked + 1


def first_lane(scales: SiteScales) -> SiteScales:
    """The scales of one site that `share_over_lanes` has shared, as they were."""
    return _at_lanes(lambda leaf, axis: jax.lax.index_in_dim(leaf, 0, axis, keepdims=False), {"": scales}, new=0)[""]


def _at_lanes(function, scales, new):
    """`function(leaf, axis)` of all leaves; `axis` is that of lanes, or where they will be, if `new` is 1."""
    def visit(node):
        operands = {name: getattr(node, name) for name in OPERANDS}
        return node.replace(
            **{name: None if leaf is None else function(leaf, leaf.ndim - 1 + new) for name, leaf in operands.items()},
            seal=function(node.seal, node.seal.ndim - 2 + new))

    return {name: visit(node) for name, node in scales.items()}


def _share_over_lanes_bwd(lanes, residuals, observations):
    del lanes, residuals
    return (merge_over_lanes(observations),)


share_over_lanes.defvjp(lambda scales, lanes: (share_over_lanes(scales, lanes), None), _share_over_lanes_bwd)


@jax.custom_vjp
def tap(outputs, scales, observations):
    """`outputs` as they are; on the way back, `observations` become the cotangent of `scales`.

    For what observes without a backward pass of its own. The observations get no cotangent.
    """
    del scales, observations
    return outputs


def _tap_fwd(outputs, scales, observations):
    del scales
    return outputs, observations


def _tap_bwd(observations, cotangents):
    return cotangents, observations, jax.tree.map(jnp.zeros_like, observations)


tap.defvjp(_tap_fwd, _tap_bwd)
