"""Any optax optimizer and delayed scaling, side by side over one tree."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fp8jax.optim.checks import check_alike, check_sites
from fp8jax.optim.delayed_scaling import ScalingState, Step, init_state
from fp8jax.state import SiteScales, is_scales, with_stacks


class WithDelayedScalingState(NamedTuple):
    """State of `with_delayed_scaling`.

    Args:
      scaling: of the scales.
      inner: of the inner optimizer.
      pending: where the inner optimizer accumulates over mini-steps, the maxima so far of each operand's valid amaxes,
        float32 `[operands]` for each member of `scaling.operands`; else ().
    """

    scaling: ScalingState
    inner: Any
    pending: tuple[jax.Array, ...]


def with_delayed_scaling(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Joins an optimizer and `delayed_scaling`, over a tree that holds both parameters and `SiteScales`, anywhere.

    The optimizer sees the tree with `optax.MaskedNode()` in the place of each `SiteScales`, so that its norms, clipping
    and decay concern the parameters alone. This must be the outermost transformation: what is chained around it would
    rescale observations (which is detected and counted, see `fp8jax.metrics`) or moves of the exponents.

    Two inner transformations decide about the scales too:

    - `optax.MultiSteps`: until it emits, exponents stay; the valid amaxes of the mini-steps merge by max, and are stored
      and reduced as one when it does. What it skips leaves no amax.
    - `optax.apply_if_finite`: an update that it found not finite leaves no amax.

    A tree without `SiteScales` (a recipe whose scaling is not delayed) is `tx`'s alone.

    Args:
      tx: the optimizer; an `optax.MultiSteps` is taken as it is.

    Returns:
      An `optax.GradientTransformationExtraArgs`; `update` needs `params`, and hands further arguments on to `tx`.

    Raises:
      ValueError: from `update`, without params; or where updates, params and state are not of the same sites and shapes; from
        `init`, where `tx` holds more than one `optax.MultiSteps`.
      TypeError: where a leaf of a `SiteScales` is not float32.

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
    tx = optax.with_extra_args_support(tx)

    def init(params):
        scales = list(check_sites(params, "params").values())
        inner = tx.init(_without_scales(params))
        scaling = init_state(scales)
        accumulating = len(_find(optax.MultiStepsState, inner))
        if accumulating > 1:
            raise ValueError(
                f"tx must hold one optax.MultiSteps at most, since scales move when it emits; got {accumulating}. "
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
    """What is to be stored now, and what is to wait, given the inner optimizer's states before and after its update."""
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
    return jax.tree.map(
        lambda node: optax.MaskedNode() if is_scales(node) else node, tree, is_leaf=is_scales
    )


def _with_scales(inner: Any, tree: Any, nodes: list[SiteScales]) -> Any:
    """`inner`, which is like `tree` without scales, with `nodes` in their places."""
    return with_stacks(tree, nodes, inner, other=lambda leaf, other: other)
