"""The mean of gradients over devices, with everything that travels in FP8.

There is no reduction in FP8, and there should be none: each sum would round again. So a mean is
taken in two exchanges. In the first, each device sends every other one its share of the gradients,
as codes (all-to-all), and sums what it gets in float32. In the second, it sends its share of the
means to all, as codes again (all-gather). Both together move a byte for each byte pair that an
all-reduce of bfloat16 moves, and one more for each block of 128.

What a rounding loses is remembered where it happened and added to the next gradient before that is
rounded (error feedback, Seide et al., Interspeech 2014): over time nothing is lost, and the sum of
all means is off by one step's error at most.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fp8jax._formats import E4M3, Format, get_format
from fp8jax._scaling import BlockWise
from fp8jax._shims import varying_axes
from fp8jax._tensor import Fp8Tensor, quantize

BLOCK = 128


class ExchangeState(NamedTuple):
    """State of `exchange_gradients`: what roundings have lost so far, each device's own.

    Every leaf has a leading axis of devices, so that one ``PartitionSpec(axis_name)`` fits them
    all.

    Args:
      gradients: of each device's gradients, float32 `[devices, *shape]` for each parameter.
      means: of each device's share of the means, float32 `[devices, blocks, 128]`.
    """

    gradients: Any
    means: jax.Array


def exchange_gradients(
    axis_name: str, devices: int, fmt: Any = E4M3
) -> optax.GradientTransformation:
    """Replaces gradients by their mean over devices, in FP8; for use inside `jax.shard_map`, first
    in a chain.

    Non-finite gradients make the elements' means NaN (E5M2: infinite or NaN), on all devices, and
    leave no error behind.

    Args:
      axis_name: the mesh axis over which gradients differ.
      devices: its size.
      fmt: an FP8 format, its name or its dtype, of what travels.

    Returns:
      An `optax.GradientTransformation`. `init(params)` makes an `ExchangeState` outside of
      shard_map (under `jit` with ``out_shardings=NamedSharding(mesh, P(axis_name))``, it is never
      on one device). `update` runs inside, where the state's spec is ``P(axis_name)``; the means
      have the gradients' dtypes and are the same on all devices, bit for bit.

    Raises:
      ValueError: where the format holds no signed values; from `update`, where gradients and state
        don't fit each other, the axis has another size, or gradients are summed already, which
        `jax.grad` does by itself with respect to what is the same on all devices.

    >>> import functools
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> devices = jax.device_count()
    >>> mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    >>> tx = exchange_gradients("data", devices)
    >>> weights = jnp.ones(4)
    >>> specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P("data"))}
    >>> @jax.jit
    ... @functools.partial(jax.shard_map, mesh=mesh, **specs)
    ... def mean_gradient(weights, state, x):
    ...     weights = jax.lax.pcast(weights, "data", to="varying")  # so that grad sums nothing
    ...     return tx.update(jax.grad(lambda w: (x @ w).mean())(weights), state)
    >>> mean, state = mean_gradient(weights, tx.init(weights), jnp.ones((8, 4)))
    >>> mean
    Array([1., 1., 1., 1.], dtype=float32)
    """
    fmt = get_format(fmt)
    if not fmt.signed:
        raise ValueError(f"fmt must be a format of signed values; got {fmt}. Use E4M3 or E5M2.")

    def init(params):
        share = -(-sum(_blocks(jnp.size(param)) for param in jax.tree.leaves(params)) // devices)
        lost = jax.tree.map(
            lambda param: jnp.zeros((devices, *jnp.shape(param)), np.float32), params
        )
        return ExchangeState(lost, jnp.zeros((devices, share, BLOCK), np.float32))

    def update(updates, state, params=None):
        del params
        _check(updates, state, axis_name, devices)
        gradients, structure = jax.tree.flatten(updates)
        if not gradients:
            return updates, state
        wanted = [
            g.astype(np.float32) + lost[0]
            for g, lost in zip(gradients, jax.tree.leaves(state.gradients), strict=True)
        ]
        # Leaves don't share blocks.
        blocks = jnp.concatenate([_fill(leaf, BLOCK).reshape(-1, BLOCK) for leaf in wanted])
        blocks = _fill(blocks, devices * BLOCK).reshape(devices, -1, BLOCK)
        sent, lost = _encode(blocks, fmt)
        parts = _decode(lax.all_to_all(sent, axis_name, 0, 0, tiled=True), fmt)
        share = parts.sum(0) * np.float32(1 / devices) + state.means[0]
        sent, lost_of_means = _encode(share[None], fmt)
        means = _decode(lax.all_gather(sent, axis_name, axis=0, tiled=True, to="invarying"), fmt)
        return (
            structure.unflatten(_leaves(means, gradients)),
            ExchangeState(
                structure.unflatten(
                    [leaf[None].astype(np.float32) for leaf in _leaves(lost, wanted)]
                ),
                lost_of_means,
            ),
        )

    return optax.GradientTransformation(init, update)


def _check(updates, state, axis_name, devices) -> None:
    got = jax.tree.structure(updates), jax.tree.structure(state.gradients)
    if got[0] != got[1]:
        raise ValueError(
            f"updates and state must be of the same structure; got {got[0]} and {got[1]}. Make the "
            "state by init(params)."
        )
    if lax.axis_size(axis_name) != devices:
        raise ValueError(
            f"devices must be the size of the axis {axis_name!r}; got {devices}, and the axis has "
            f"{lax.axis_size(axis_name)}."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(state.gradients), strict=True
    )
    for (path, gradient), lost in pairs:
        where = jax.tree_util.keystr(path)
        if not jnp.issubdtype(gradient.dtype, jnp.floating):
            raise TypeError(
                f"updates must be real floating arrays; got {gradient.dtype} at {where}. Leave "
                "that leaf out by optax.masked."
            )
        if lost.shape != (1, *gradient.shape):
            raise ValueError(
                "state.gradients must be (1, *shape) of the gradients inside of shard_map; got "
                f"{lost.shape} for {gradient.shape} "
                f"at {where}. Make the state by init(params), and pass it with the spec "
                f"P({axis_name!r})."
            )
        if axis_name in varying_axes(lost) and axis_name not in varying_axes(gradient):
            raise ValueError(
                f"updates must be each device's own; got a gradient at {where} that is the same "
                f"over {axis_name!r}, so already a "
                f"sum. Differentiate with respect to jax.lax.pcast(params, {axis_name!r}, "
                'to="varying").'
            )


def _encode(blocks: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """`[parts, blocks, 128]` as float8 `[parts, bytes]` (codes, then the scales' biased exponents),
    and what is lost by it.
    """
    q = quantize(blocks, fmt, BlockWise(BLOCK), overflow="ocp")
    lost = blocks - q.dequantize(blocks.dtype)
    lost = jnp.where(jnp.isfinite(lost), lost, np.float32(0))
    exponents = lax.shift_right_logical(
        lax.bitcast_convert_type(q.scale, np.uint32), np.uint32(23)
    ).astype(np.uint8)
    parts = [
        array.reshape(len(blocks), -1)
        for array in (lax.bitcast_convert_type(q.data, np.uint8), exponents)
    ]
    return lax.bitcast_convert_type(jnp.concatenate(parts, axis=1), E4M3.dtype), lost


def _decode(sent: jax.Array, fmt: Format) -> jax.Array:
    """`[parts, bytes]` back to float32 `[parts, blocks, 128]`."""
    octets = lax.bitcast_convert_type(sent, np.uint8)
    codes, exponents = jnp.split(octets, [octets.shape[1] // (BLOCK + 1) * BLOCK], axis=1)
    scale = lax.bitcast_convert_type(exponents.astype(np.uint32) << np.uint32(23), np.float32)
    data = lax.bitcast_convert_type(codes, fmt.dtype).reshape(len(octets), -1, BLOCK)
    return Fp8Tensor(data, scale[..., None], fmt, BlockWise(BLOCK)).dequantize()


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _fill(x: jax.Array, multiple: int) -> jax.Array:
    """`x` flat, with zeros up to a multiple."""
    return jnp.pad(x.reshape(-1), (0, -x.size % multiple))


def _leaves(blocks: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    """Blocks of all leaves, back in the leaves' shapes and dtypes."""
    flat, leaves, start = blocks.reshape(-1), [], 0
    for leaf in like:
        leaves.append(flat[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += _blocks(leaf.size) * BLOCK
    return leaves
