"""What delayed scaling went through, as plain numbers: for a logger, for a plot, for a look."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax._monitor import Errors, SiteError, monitor
from fp8jax.optim._checks import check_sites, check_state
from fp8jax.optim._delayed_scaling import ScalingState
from fp8jax.optim._rows import rows_of

__all__ = [
    "COUNTERS",
    "Errors",
    "SiteError",
    "flushed_shares",
    "histories",
    "monitor",
    "reset",
    "saturated_shares",
    "summary",
]

COUNTERS = ("observed", "saturated", "nonfinite", "unsealed")
_FAULTS = COUNTERS[1:]


def summary(state: Any, scales: Any) -> dict[str, int | float]:
    """The counters since their last reset: totals, and by name each operand that something went
    wrong with.

    - `observed`: observations that were valid, one per operand, layer and update (or mini-step).
    - `saturated`: those of them with values beyond what their scale could represent; these values
      were clipped.
    - `nonfinite`: observations of operands in which nothing was finite. They were not stored, the
      scale stayed. Where some of it is finite, that is the amax; `monitor` tells the share of the
      rest.
    - `flushed_share`, where any recipe's `DelayedScaling` has `flushed=True`: the mean over those
      operands of `flushed_shares`, and "fp8/flushed/SITE/OPERAND" where it isn't 0.
    - `unsealed`: observations that something outside the quantized function changed, and not by
      adding, averaging or rescaling them, so that no amaxes can be told from them. Not stored
      either. Keep `fp8jax.with_delayed_scaling` outermost.

    Args:
      state: an optimizer's state that holds a `ScalingState` somewhere.
      scales: a tree that holds the `SiteScales` that it is the state of.

    Returns:
      Flat, "fp8/observed" and so on, with "fp8/saturated_share" among them; then
      "fp8/saturated/SITE/OPERAND" (with the layer's index where layers are stacked) and the like,
      only where not 0. It reads the arrays, so it waits for the device: call it outside of `jit`,
      and not at each step.

    Raises:
      ValueError: where there is no state in `state`, or not that of `scales`.

    >>> import fp8jax
    >>> scales = fp8jax.SiteScales.zeros("mlp", fp8jax.recipes.delayed().delayed_casts)
    >>> tx = fp8jax.optim.delayed_scaling()
    >>> _, state = tx.update(scales.replace(lhs=jnp.float32(jnp.inf)), tx.init(scales), scales)
    >>> {name: value for name, value in summary(state, scales).items() if value}
    {'fp8/nonfinite': 1, 'fp8/nonfinite/mlp/lhs': 1}
    """
    nodes, rows, state = _matched(state, scales)
    counts = jax.device_get(
        [[getattr(operand, name) for name in COUNTERS] for operand in state.operands]
    )
    named = {
        counter: {
            name: int(value)
            for row, count in zip(rows, counts, strict=True)
            for name, value in zip(row.names(nodes), count[index], strict=True)
        }
        for index, counter in enumerate(COUNTERS)
    }
    totals = {counter: sum(values.values()) for counter, values in named.items()}
    result: dict[str, int | float] = {f"fp8/{counter}": total for counter, total in totals.items()}
    result["fp8/saturated_share"] = totals["saturated"] / max(totals["observed"], 1)
    for counter in _FAULTS:
        result |= {
            f"fp8/{counter}/{name}": value for name, value in named[counter].items() if value
        }
    flushed = flushed_shares(state, scales) if any(row.delayed.flushed for row in rows) else {}
    if flushed:
        result["fp8/flushed_share"] = sum(flushed.values()) / len(flushed)
        result |= {f"fp8/flushed/{name}": share for name, share in flushed.items() if share}
    return result


def histories(state: Any, scales: Any) -> dict[str, np.ndarray]:
    """The amaxes in the windows, from the oldest to the latest.

    Args:
      state: an optimizer's state that holds a `ScalingState` somewhere.
      scales: a tree that holds the `SiteScales` that it is the state of.

    Returns:
      By "SITE/OPERAND" (with the layer's index where layers are stacked), float32 of at most
      `history_window` amaxes.

    Raises:
      ValueError: where there is no state in `state`, or not that of `scales`.

    >>> import fp8jax
    >>> scales = fp8jax.SiteScales.zeros("mlp", fp8jax.recipes.delayed().delayed_casts)
    >>> histories(fp8jax.optim.delayed_scaling().init(scales), scales)["mlp/grad"]
    array([], dtype=float32)
    """
    nodes, rows, state = _matched(state, scales)
    found = {}
    for row, operand in zip(rows, jax.device_get(state.operands), strict=True):
        window = row.delayed.history_window
        for name, amaxes, stored in zip(
            row.names(nodes), operand.amax_history.T, operand.stored, strict=True
        ):
            found[name] = (
                amaxes[:stored] if stored < window else np.roll(amaxes, -(stored % window))
            )
    return found


def saturated_shares(state: Any, scales: Any) -> dict[str, float]:
    """The share of each operand's observations since the last reset that had values beyond what the
    scale could represent.

    Args:
      state: an optimizer's state that holds a `ScalingState` somewhere.
      scales: a tree that holds the `SiteScales` that it is the state of.

    Returns:
      By "SITE/OPERAND" (with the layer's index where layers are stacked), in [0, 1]; 0 where
      nothing was observed.

    Raises:
      ValueError: where there is no state in `state`, or not that of `scales`.

    >>> import fp8jax
    >>> scales = fp8jax.SiteScales.zeros("mlp", fp8jax.recipes.delayed().delayed_casts)
    >>> saturated_shares(fp8jax.optim.delayed_scaling().init(scales), scales)["mlp/grad"]
    0.0
    """
    nodes, rows, state = _matched(state, scales)
    return _shares(
        nodes, rows, [(operand.saturated, operand.observed) for operand in state.operands]
    )


def flushed_shares(state: Any, scales: Any) -> dict[str, float]:
    """The share of each operand that its casts turned into zeros, on average over the observations
    since the last reset.

    Of the elements that were not zero before; where a site is used several times in a step, on
    several devices, or in parts of a batch, of the part with the largest share. Only of operands
    whose `DelayedScaling` has `flushed=True`.

    Args:
      state: an optimizer's state that holds a `ScalingState` somewhere.
      scales: a tree that holds the `SiteScales` that it is the state of.

    Returns:
      By "SITE/OPERAND" (with the layer's index where layers are stacked), in [0, 1]; 0 where
      nothing was observed.

    Raises:
      ValueError: where there is no state in `state`, or not that of `scales`; where no operand
        observes its share.

    >>> import fp8jax
    >>> recipe = fp8jax.recipes.delayed(flushed=True)
    >>> scales = fp8jax.SiteScales.zeros("mlp", recipe.delayed_casts)
    >>> flushed_shares(fp8jax.optim.delayed_scaling().init(scales), scales)["mlp/grad"]
    0.0
    """
    nodes, rows, state = _matched(state, scales)
    rows_and_operands = [
        (row, operand)
        for row, operand in zip(rows, state.operands, strict=True)
        if row.delayed.flushed
    ]
    if not rows_and_operands:
        raise ValueError(
            "scales must be of a recipe that observes what is flushed to zero; got none that does. "
            "Use DelayedScaling(flushed=True) in its casts."
        )
    return _shares(
        nodes,
        [row for row, _ in rows_and_operands],
        [(operand.flushed, operand.observed) for _, operand in rows_and_operands],
    )


def reset(state: Any) -> Any:
    """`state` with all counters at 0; histories and scales are untouched. Can be jitted.

    >>> import fp8jax
    >>> scales = fp8jax.SiteScales.zeros("mlp", fp8jax.recipes.delayed().delayed_casts)
    >>> tx = fp8jax.optim.delayed_scaling()
    >>> _, state = tx.update(scales.replace(lhs=jnp.float32(jnp.inf)), tx.init(scales), scales)
    >>> summary(reset(state), scales)["fp8/nonfinite"]
    0
    """

    def visit(node):
        if not isinstance(node, ScalingState):
            return node
        return ScalingState(
            tuple(
                operand._replace(
                    **{
                        name: jax.tree.map(jnp.zeros_like, getattr(operand, name))
                        for name in (*COUNTERS, "flushed")
                    }
                )
                for operand in node.operands
            )
        )

    return jax.tree.map(visit, state, is_leaf=_is_scaling)


def _shares(nodes: Any, rows: Any, counts: Any) -> dict[str, float]:
    """By name of the operand, parts of what was observed; from pairs of both for each of `rows`."""
    return {
        name: float(part) / max(int(observed), 1)
        for row, count in zip(rows, jax.device_get(counts), strict=True)
        for name, part, observed in zip(row.names(nodes), *count, strict=True)
    }


def _is_scaling(node: Any) -> bool:
    return isinstance(node, ScalingState)


def _matched(state: Any, scales: Any):
    """The nodes of `scales`, their rows, and the one `ScalingState` in `state`."""
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_scaling) if _is_scaling(node)]
    if len(found) != 1:
        raise ValueError(
            f"state must hold one ScalingState; got {len(found)} in a {type(state).__name__}. Pass "
            "the state of "
            "fp8jax.delayed_scaling, or of the optimizer from fp8jax.with_delayed_scaling."
        )
    nodes = list(check_sites(scales, "scales").values())
    rows = rows_of(nodes)
    check_state(found[0].operands, rows)
    return nodes, rows, found[0]
