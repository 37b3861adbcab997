"""Any optax optimizer and delayed scaling, side by side over one tree."""

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fp8jax._site_scales import SiteScales
from fp8jax._state import is_scales, with_stacks
from fp8jax.optim._checks import OF_NO_PARAMS, check_alike, check_sites, is_placeholder
from fp8jax.optim._delayed_scaling import Step, init_state


class WithDelayedScalingState(NamedTuple):
    """State of `with_delayed_scaling`.

    Args:
      scaling: of the scales, a `ScalingState`.
      inner: of the inner optimizer.
      pending: where the inner optimizer accumulates over mini-steps, the maxima so far of each
        operand's valid amaxes, float32 `[operands]` for each member of `scaling.operands`; else ().
    """

    scaling: Any
    inner: Any
    pending: Any


def with_delayed_scaling(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Joins an optimizer and `delayed_scaling`, over a tree that holds both parameters and
    `SiteScales`, anywhere.

    The optimizer sees the parameters alone, so that its norms, clipping, decay, masks and labels
    concern nothing else: entries of dicts (and of other mappings) that hold `SiteScales` and no
    parameter are left out, and what else holds scales alone is an `optax.MaskedNode()`. Of
    `{"params": params, "fp8": scales}` that is `{"params": params}`, the structure that trees of
    masks and labels must have, as in `{"params": labels}`. A `value_fn`, as of `optax.lbfgs`, is
    called on that, and closes over the scales. `optax.tree_utils.tree_map_params` goes through the
    inner state, and takes that of the scales for no parameters, in one piece.

    This must be the outermost transformation: what is chained around it would rescale observations
    (which is detected and counted, see `fp8jax.metrics`) or moves of the exponents.

    Two inner transformations decide about the scales too:

    - `optax.MultiSteps`: until it emits, exponents stay; the valid amaxes of the mini-steps merge
      by max, and are stored and reduced as one when it does. What it skips leaves no amax.
    - `optax.apply_if_finite`: an update that it found not finite leaves no amax.

    A tree without `SiteScales` is `tx`'s alone. That is right for a recipe whose scaling is not
    delayed; else the scales were left out, as by `nnx.Optimizer(..., wrt=nnx.Param)`, and would
    never move. So `init` warns.

    Args:
      tx: the optimizer; an `optax.MultiSteps` is taken as it is.

    Returns:
      An `optax.GradientTransformationExtraArgs`; `update` needs `params`, and hands further
      arguments on to `tx`.

    Raises:
      ValueError: from `update`, without params; or where updates, params and state are not of the
        same sites and shapes; from `init`, where `tx` holds more than one `optax.MultiSteps`.
      TypeError: where `tx` is no optimizer; or a leaf of a `SiteScales` is not float32.

    >>> from fp8jax import SiteScales, recipes
    >>> params = {"w": jnp.ones(2), "fp8": SiteScales.zeros("dot", recipes.delayed().delayed_casts)}
    >>> tx = with_delayed_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3)))
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    >>> updates["fp8"].lhs
    Array(0., dtype=float32)
    """
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx must be an optax.GradientTransformation; got {tx!r}. Call what makes one: "
            "fp8jax.with_delayed_scaling(optax.adamw(1e-3))."
        )
    tx = optax.with_extra_args_support(tx)

    def init(params):
        if is_placeholder(params):
            return WithDelayedScalingState(OF_NO_PARAMS, tx.init(params), OF_NO_PARAMS)
        scales = list(check_sites(params, "params").values())
        if not scales and jax.tree.leaves(params):
            warnings.warn(
                "params of with_delayed_scaling hold no SiteScales: no scale will ever move. Pass "
                "the scales beside the parameters, as "
                "{'scales': fp8_fn.init(*args), 'params': params}, or Linen's variables as a "
                "whole; in NNX, wrt=nnx.Param, or nnx.Any(your filter, "
                "fp8jax.nnx.Fp8Scale). For a recipe without delayed scaling, use tx as it is.",
                stacklevel=2,
            )
        inner = tx.init(_without_scales(params))
        scaling = init_state(scales)
        accumulating = len(_find(optax.MultiStepsState, inner))
        if accumulating > 1:
            raise ValueError(
                "tx must hold one optax.MultiSteps at most, since scales move when it emits; got "
                f"{accumulating}. "
                "Wrap the whole optimizer in a single one."
            )
        pending = tuple(
            jnp.zeros(operand.stored.shape, jnp.float32)
            for operand in scaling.operands
            if accumulating
        )
        return WithDelayedScalingState(scaling, inner, pending)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "params must be the parameters and scales that are to be updated; got None. "
                "Call update(updates, state, params)."
            )
        scales, observations = check_sites(params, "params"), check_sites(updates, "updates")
        check_alike(observations, scales)
        step = Step(list(scales.values()), state.scaling)
        extra_args = {name: _without_scales(value) for name, value in extra_args.items()}
        if callable(value_fn := extra_args.get("value_fn")):
            # In the places that its caller knows; what asks for scales there is told to close over
            # them.
            extra_args["value_fn"] = functools.partial(_value_of, value_fn, params)
        inner_updates, inner = tx.update(
            _without_scales(updates), state.inner, _without_scales(params), **extra_args
        )

        amaxes, scaling = step.observe(list(observations.values()), state.scaling)
        amaxes, pending = _hold(amaxes, state.pending, state.inner, inner)
        moved, scaling = step.move(amaxes, scaling)
        return _with_scales(inner_updates, updates, moved), WithDelayedScalingState(
            scaling, inner, pending
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _hold(amaxes, pending, before, after):
    """What is to be stored now, and what is to wait, given the inner optimizer's states before and
    after its update.
    """
    finite = [state.last_finite for state in _find(optax.ApplyIfFiniteState, after)]
    taken = functools.reduce(jnp.logical_and, finite, np.True_)
    if not pending:
        return tuple(_where(taken, amax) for amax in amaxes) if finite else amaxes, pending
    (before,), (after,) = _find(optax.MultiStepsState, before), _find(optax.MultiStepsState, after)
    emitted = after.gradient_step != before.gradient_step
    accumulated = emitted | (after.mini_step != before.mini_step)  # and not skipped
    merged = [
        jnp.maximum(held, _where(accumulated, amax))
        for held, amax in zip(pending, amaxes, strict=True)
    ]
    return tuple(_where(emitted & taken, amax) for amax in merged), tuple(
        _where(~emitted, amax) for amax in merged
    )


def _where(condition, amax):
    return jnp.where(condition, amax, jnp.zeros_like(amax))


def _find(kind: type, tree: Any) -> list[Any]:
    """The nodes of type `kind` in `tree`, without those inside of another."""
    return [
        node
        for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
        if isinstance(node, kind)
    ]


def _without_scales(tree: Any) -> Any:
    """`tree` as the inner optimizer sees it."""
    if is_scales(tree) or not isinstance(tree, Mapping):
        return _masked(tree)
    entries = _entries(tree).items()
    return _like(
        tree, {key: _without_scales(child) for key, child in entries if not _is_scales_alone(child)}
    )


def _masked(tree: Any) -> Any:
    """`tree` with an `optax.MaskedNode` in the place of scales."""
    return jax.tree.map(
        lambda node: optax.MaskedNode() if is_scales(node) else node, tree, is_leaf=is_scales
    )


def _entries(mapping: Mapping) -> dict:
    """The entries as they are held: what a mapping returns may be a view of another type."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        mapping, is_leaf=lambda node: node is not mapping
    )
    return {path[0].key: child for path, child in flat}


def _value_of(value_fn: Callable, tree: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """`value_fn` of the inner optimizer's parameters, in the places that they have in `tree`."""
    with warnings.catch_warnings():  # In a line search scales are to stay.
        warnings.filterwarnings("ignore", "gradients with respect to the weights")
        return value_fn(_unpruned(inner, tree), *args, **kwargs)


def _unpruned(inner: Any, tree: Any) -> Any:
    """`inner`, which is like `_without_scales(tree)`, with an `optax.MaskedNode` in the place of
    each `SiteScales`.
    """
    if is_scales(tree) or not isinstance(tree, Mapping):
        return inner
    own = _entries(inner)
    return _like(
        tree,
        {
            key: _masked(child) if _is_scales_alone(child) else _unpruned(own[key], child)
            for key, child in _entries(tree).items()
        },
    )


def _is_scales_alone(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=is_scales)
    return bool(leaves) and all(map(is_scales, leaves))


def _like(mapping: Any, entries: dict) -> Any:
    """A mapping of the kind of another one, with these entries."""
    if not isinstance(mapping, dict):
        return type(mapping)(entries)
    made = copy.copy(mapping)  # What a defaultdict makes of missing keys goes with it.
    made.clear()
    made.update(entries)
    return made


def _with_scales(inner: Any, tree: Any, nodes: list[SiteScales]) -> Any:
    """`inner`, which is like `_without_scales(tree)`, with `nodes` in the places of the scales."""
    return with_stacks(tree, nodes, _unpruned(inner, tree), other=lambda leaf, other: other)
