"""The rule by which scales follow the amaxes, on vectors that have a row for each operand.

The rule is written down in the docstring of `fp8jax.optim.delayed_scaling`; here it is as arrays, in that order.
"""

import fractions
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.formats import Format
from fp8jax.observe import seal_fits
from fp8jax.recipe import DelayedScaling
from fp8jax.scaling import exponent_from_amax, scale_from_exponent

_TINIEST = np.finfo(np.float32).tiny


class OperandState(NamedTuple):
    """What is kept of the operands that share a rule and a format: a row, or an element, for each.

    Args:
      amax_history: float32 `[operands, window]`, the latest amaxes; a ring, 0 where none was stored yet.
      stored: int32 `[operands]`, how many were ever stored; the next one goes to `stored % window`.
      observed: int32 `[operands]`, observations that were valid, since the counters were reset.
      saturated: int32 `[operands]`, those of them beyond what their scale could represent.
      nonfinite: int32 `[operands]`, observations of an infinity or a NaN.
      unsealed: int32 `[operands]`, observations that something outside had added up, averaged or rescaled.
      flushed: float32 `[operands]`, the sum over valid observations of the shares flushed to zero; None where the rule
        doesn't ask for them.
    """

    amax_history: jax.Array
    stored: jax.Array
    observed: jax.Array
    saturated: jax.Array
    nonfinite: jax.Array
    unsealed: jax.Array
    flushed: jax.Array | None

    @classmethod
    def zeros(cls, operands: int, delayed: DelayedScaling) -> "OperandState":
        """Nothing observed, in buffers of their own."""
        return cls(jnp.zeros((operands, delayed.history_window), jnp.float32),
                   *(jnp.zeros((operands,), jnp.int32) for _ in cls._fields[1:-1]),
                   jnp.zeros((operands,), jnp.float32) if delayed.flushed else None)


def classify(
    state: OperandState, amax: jax.Array, seal: jax.Array, flushed: jax.Array | None, exponent: jax.Array, fmt: Format,
    seals: np.ndarray | None,
) -> tuple[jax.Array, OperandState]:
    """Tells valid observations from others, and counts both.

    Args:
      state: rows as below.
      amax, seal, exponent: float32 `[operands]`.
      flushed: the same, where the state has it.
      fmt: the format of the operands.
      seals: where several rows are groups of one operand, int `[operands]`, equal for them; else None.

    Returns:
      The amaxes with 0 in the place of those that are not valid, and the state with its counters moved on.
    """
    whole = amax
    if seals is not None:  # a seal is one for all groups of an operand
        _, operand_of = np.unique(seals, return_inverse=True)
        whole = jnp.zeros((operand_of.max() + 1,), jnp.float32).at[operand_of].max(amax)[operand_of]
    finite = jnp.isfinite(amax) & jnp.isfinite(whole) & jnp.isfinite(seal)
    seen = finite & (jnp.abs(amax) >= _TINIEST)
    valid = seen & seal_fits(whole, seal)
    # At the upper end of the exponents the limit is infinite, as it should be: nothing finite saturates there.
    saturated = valid & (amax > scale_from_exponent(exponent) * np.float32(fmt.max))
    state = state._replace(
        observed=state.observed + valid.astype(jnp.int32),
        saturated=state.saturated + saturated.astype(jnp.int32),
        nonfinite=state.nonfinite + (~finite).astype(jnp.int32),
        unsealed=state.unsealed + (seen & ~valid).astype(jnp.int32),
        flushed=None if state.flushed is None else state.flushed + jnp.where(valid, flushed, np.float32(0)),
    )
    return jnp.where(valid, amax, np.float32(0)), state


def move(
    state: OperandState, amax: jax.Array, exponent: jax.Array, fmt: Format, delayed: DelayedScaling,
) -> tuple[jax.Array, OperandState]:
    """Stores amaxes and moves the exponents that are due.

    Args:
      state: rows as below.
      amax: float32 `[operands]`, 0 where there is nothing to store.
      exponent: float32 `[operands]`, the present ones.
      fmt: the format of the operands.
      delayed: their rule.

    Returns:
      The exponents from now on, and the state.
    """
    window = delayed.history_window
    valid = amax > 0
    rows = np.arange(amax.size, dtype=np.int32)
    slot = jnp.where(valid, state.stored % np.int32(window), np.int32(window))  # beyond the ring, so it's dropped
    history = state.amax_history.at[rows, slot].set(amax, mode="drop", unique_indices=True)
    stored = state.stored + valid.astype(jnp.int32)

    due = stored % np.int32(delayed.interval) == 0
    threshold = scale_from_exponent(exponent) * np.float32(delayed.update_threshold * fmt.max)
    moved = exponent_from_amax(_reduce(history, stored, amax, delayed.reduce), fmt, delayed.margin)
    exponent = jnp.where(valid & (due | (amax > threshold)), moved, exponent)
    return exponent, state._replace(amax_history=history, stored=stored)


def _reduce(history: jax.Array, stored: jax.Array, latest: jax.Array, reduce: str | float) -> jax.Array:
    """The window's amaxes as one, float32 `[operands]`. Slots without an amax hold 0, below any amax."""
    if reduce == "most_recent":
        return latest
    if reduce == "max":
        return jnp.max(history, axis=1)
    window = history.shape[1]
    # By nearest rank: the ceil(p / 100 * n)-th smallest of n. From a table, since floats get 99 % of 100 wrong.
    share = fractions.Fraction(str(reduce)) / 100
    ranks = np.array([math.ceil(share * n) for n in range(window + 1)], np.int32)
    n = jnp.minimum(stored, np.int32(window))
    column = np.int32(window - 1) - n + jnp.asarray(ranks)[n]
    ordered = jnp.sort(history, axis=1)
    return jnp.take_along_axis(ordered, jnp.maximum(column, np.int32(0))[:, None], axis=1)[:, 0]
