"""What optimizers with FP8 moments share: their options, checks, and one leaf's way from gradient
to next moments.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax._formats import Format, get_format
from fp8jax._scaling import merge_groups, split_groups
from fp8jax._xla import max_on_cpu
from fp8jax.optim._moments import Fp8Moment, blocks_of, root_of
from fp8jax.optim._noise import leaf_words, random_bits, swapped

ROUNDINGS = ("stochastic", "nearest")
_INFINITY = np.int32(0x7F800000)  # its bits


def check_rounding(rounding: str, key: Any) -> None:
    """Raises unless an optimizer's rounding is known and its key has an effect."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}; got {rounding!r}.")
    if rounding == "nearest" and key is not None:
        raise ValueError(
            'key has no effect on rounding "nearest"; got one. Drop it, or use '
            'rounding="stochastic".'
        )


def zeros_moments(params: Any, fmt: Format | np.dtype) -> Any:
    """A moment for each parameter: an `Fp8Moment`, or where `fmt` is a wide dtype, an array.

    In a state of NNX (`nnx.state(model)`), an `Fp8Moment` is a mapping of its arrays:
    `nnx.Optimizer` makes it one at the first update anyway, and a state that is another pytree from
    then on fits no scan and no checkpoint.
    """
    state = _state_of_nnx(params)

    def zeros(path, param):
        dtype = jnp.result_type(param)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params must be real floating arrays for FP8 moments; got {dtype} at "
                f"{jax.tree_util.keystr(path)}. Leave "
                "that leaf to another optimizer: optax.masked, optax.partition."
            )
        if isinstance(fmt, Format):
            moment = Fp8Moment.zeros(jnp.asarray(param), fmt)
            return moment if state is None else state(_arrays_of(moment))
        return jnp.zeros_like(param, dtype=fmt)

    return jax.tree_util.tree_map_with_path(zeros, params)


def _state_of_nnx(params: Any) -> type | None:
    """`nnx.State` where variables of NNX are among the parameters; told without importing it."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return None
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.State if any(isinstance(node, nnx.Variable) for node in nodes) else None


def _arrays_of(moment: Fp8Moment) -> dict[str, jax.Array]:
    return {name: getattr(moment, name) for name in ("data", "scale", "power")}


def _mapping(kind: Callable[[dict], Any], moment: Fp8Moment) -> Any:
    return kind(_arrays_of(moment))


def as_they_came(moments: Sequence[Any], tree: Any, structure: Any) -> Any:
    """The next moments as a tree like the old ones, mappings of arrays where these were."""
    return structure.unflatten(
        [
            _mapping(type(old), new) if isinstance(old, Mapping) else new
            for new, old in zip(moments, structure.flatten_up_to(tree), strict=True)
        ]
    )


def as_moment(node: Any) -> Any:
    """An `Fp8Moment` that was made a mapping of its arrays, as in states of NNX, made one again."""
    if isinstance(node, Mapping) and {"data", "scale", "power"} <= set(node):
        return Fp8Moment(
            node["data"],
            node["scale"],
            node["power"],
            get_format(node["data"].dtype),
            blocks_of(node["data"].shape),
        )
    if not hasattr(node, "shape"):
        raise ValueError(f"no moment: {type(node).__name__}")
    return node


def match_leaves(updates: Any, **moments: Any) -> tuple[list[tuple], Any]:
    """For each leaf, the gradient and its moments, checked to be of one structure and shape; and
    the structure.
    """
    gradients, structure = jax.tree_util.tree_flatten_with_path(updates)
    columns = []
    for name, tree in moments.items():
        try:
            leaves = [as_moment(node) for node in structure.flatten_up_to(tree)]
        except ValueError as error:
            raise ValueError(
                f"updates and the state's {name} must be of the same structure; got {structure} "
                f"and {jax.tree.structure(tree)}. "
                "Make a new state by init(params) where the parameters have changed."
            ) from error
        columns.append(leaves)
    for (path, gradient), *held in zip(gradients, *columns, strict=True):
        for name, moment in zip(moments, held, strict=True):
            if jnp.shape(gradient) != moment.shape:
                raise ValueError(
                    f"updates and the state's {name} must have the same shapes; got "
                    f"{jnp.shape(gradient)} and {moment.shape} "
                    f"at {jax.tree_util.keystr(path)}. Make a new state by init(params) where the "
                    "parameters have changed."
                )
        if not jnp.issubdtype(jnp.result_type(gradient), jnp.floating):
            raise TypeError(
                f"updates must be real floating arrays; got {jnp.result_type(gradient)} at "
                f"{jax.tree_util.keystr(path)}. Leave that leaf to another optimizer: "
                "optax.masked, optax.partition."
            )
    return [
        (jnp.asarray(gradient), *held)
        for (_, gradient), *held in zip(gradients, *columns, strict=True)
    ], structure


def words_of(key: Any, count: jax.Array, leaves: int, rounding: str) -> list:
    """Each leaf's words for this update, None where rounding is to nearest."""
    if rounding == "nearest":
        return [None] * leaves
    if getattr(key, "shape", None) != (2,) or key.dtype != np.uint32:
        got = f"{key.dtype}{list(key.shape)}" if hasattr(key, "shape") else repr(key)
        raise ValueError(
            f'the state\'s key must be uint32[2] for rounding="stochastic"; got {got}. Make the '
            "state by init(params) of the "
            "same optimizer, or keep the key that it made."
        )
    return leaf_words(key, count, leaves)


class Leaf:
    """A gradient and its moments in float32, split into the moments' blocks.

    What concerns blocks is worked out before what concerns elements, for all moments at once.

    Args:
      gradient: a floating array.
      moments: of the gradient's powers 1, 2, ..., each an `Fp8Moment` or an array.
      decays: their decay rates.
      words: two random words of the leaf, or None to round to nearest.

    Attributes:
      gradient: the gradient, split.
      values: the moments, split.
    """

    def __init__(self, gradient: jax.Array, moments: Sequence, decays: tuple, words: Any):
        self._dtype, self._shape, self._moments = gradient.dtype, gradient.shape, moments
        self._scaling = blocks_of(gradient.shape)
        self.gradient, axes = split_groups(gradient.astype(np.float32), self._scaling)
        held = [isinstance(moment, Fp8Moment) for moment in moments]
        amax, lowest, *maxima = _maxima(
            [
                _finite_bits(self.gradient),
                _from_the_top(moments[-1], self._scaling),
                *(m.magnitudes() for m, fp8 in zip(moments, held) if fp8),
            ],
            axes,
            self._scaling.group_shape(self._shape),
        )
        amax = lax.bitcast_convert_type(amax, np.float32)
        # The smallest of the last moment tells what range all need.
        smallest = _smallest(moments[-1], lowest) * scalar(decays[-1])
        plans = []
        for order, (moment, decay) in enumerate(zip(moments, decays, strict=True), 1):
            needed = smallest if order == len(moments) else root_of(smallest)
            added = scalar(1 - decay) * amax**order
            plans.append(
                moment.plan(maxima.pop(0), scalar(decay), added, needed, order == 1)
                if isinstance(moment, Fp8Moment)
                else None
            )
        self._plans = _apart(plans)
        self.values = [
            split_groups(moment.astype(np.float32), self._scaling)[0]
            if plan is None
            else moment.values(plan[0])
            for moment, plan in zip(moments, self._plans, strict=True)
        ]
        # A second rounding of an element takes the same bits with their halves swapped: the lower
        # sixteen only matter where the upper ones tie.
        bits = None if words is None else random_bits(self.gradient.shape, words)
        self._bits = [bits, bits if bits is None else swapped(bits)]

    def store(self, *splits: jax.Array) -> list[Fp8Moment | jax.Array]:
        """The next moments from their values, of the kinds of the old ones."""
        return [
            merge_groups(split, self._shape, self._scaling).astype(moment.dtype)
            if plan is None
            else moment.store(split, plan[1], bits, order == 1)
            for order, (split, moment, plan, bits) in enumerate(
                zip(splits, self._moments, self._plans, self._bits), 1
            )
        ]

    def update(self, split: jax.Array) -> jax.Array:
        """What was split like the gradient, of the gradient's shape, float32 or wider."""
        return merge_groups(split, self._shape, self._scaling).astype(
            jnp.promote_types(self._dtype, np.float32)
        )


def _finite_bits(x: jax.Array) -> jax.Array:
    """The bits of magnitudes, which are ordered like these; 0 for infinities and NaNs."""
    bits = lax.bitcast_convert_type(x, np.int32) & np.int32(0x7FFFFFFF)
    return jnp.where(bits < _INFINITY, bits, np.int32(0))


def _from_the_top(moment: Any, scaling: Any) -> jax.Array:
    """Integers, split into blocks, whose maxima belong to the smallest magnitudes that are not
    zero.
    """
    if isinstance(moment, Fp8Moment):
        return moment.reversed_magnitudes()
    bits = _finite_bits(split_groups(moment.astype(np.float32), scaling)[0])
    return jnp.where(bits > np.int32(0), _INFINITY - bits, np.int32(0))


def _smallest(moment: Any, maxima: jax.Array) -> jax.Array:
    """For each block a moment's smallest magnitude that is not zero, or 0; float32, from maxima of
    `_from_the_top`.
    """
    if isinstance(moment, Fp8Moment):
        return moment.smallest(maxima)
    bits = jnp.where(maxima > np.int32(0), _INFINITY - maxima, np.int32(0))
    return lax.bitcast_convert_type(bits, np.float32)


def _maxima(arrays: list[jax.Array], axes: list[int], shape: tuple[int, ...]) -> list[jax.Array]:
    """The maxima over `axes` of several arrays of integers of one shape, not negative."""
    zeros = [np.zeros((), array.dtype) for array in arrays]

    def together(*arrays):  # One kernel, which else would be one each.
        return tuple(lax.reduce(arrays, tuple(zeros), lambda a, b: tuple(map(lax.max, a, b)), axes))

    def apart(*arrays):  # XLA's CPU compiler vectorizes a reduction of several arrays not at all.
        return tuple(
            max_on_cpu(array, axes)
            if array.dtype == np.int32
            else lax.reduce(array, zero, lax.max, axes)
            for array, zero in zip(arrays, zeros, strict=True)
        )

    return [
        maximum.reshape(shape)
        for maximum in lax.platform_dependent(*arrays, cpu=apart, default=together)
    ]


def _apart(plans: list) -> list:
    """The same plans, where compilers should make an end of what concerns blocks, before what
    concerns elements.
    """
    lowest = np.int32(np.iinfo(np.int32).min)

    # XLA's CPU compiler would work a block's plan out for each element that reads it. It drops
    # barriers early, but fuses no reduction with what reads it.
    def reduced(plans):
        def one(block):
            pair = jnp.stack([block, jnp.full_like(block, lowest)], axis=-1)
            return lax.reduce(pair, lowest, lax.max, (block.ndim,))

        return jax.tree.map(one, plans)

    # XLA for GPUs makes a kernel of the plans by itself. But where that also writes a new scale to
    # the place of the old one which the elements are still to be read with, it copies the latter in
    # a kernel more. A single moment's only: of two, elements are read earlier.
    def guarded(plans):
        if len(plans) > 1 or plans[0] is None:
            return plans
        ((old, new),) = plans
        return [(lax.optimization_barrier(old), new)]

    return lax.platform_dependent(plans, cpu=reduced, default=guarded)


def scalar(value: jax.typing.ArrayLike) -> jax.Array:
    """A hyperparameter as float32."""
    return jnp.asarray(value, np.float32)
