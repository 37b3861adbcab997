"""The rule by which scales follow the amaxes, on vectors that have an element for each operand.

The rule is written down in the docstring of `fp8jax.optim.delayed_scaling`; here it is as arrays,
in that order.
"""

import fractions
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax._formats import Format
from fp8jax._observe import largest_amax, seal_fits
from fp8jax._recipe import DelayedScaling
from fp8jax._scaling import exponent_from_amax, scale_from_exponent

_TINIEST = np.finfo(np.float32).tiny
_BLOCK = 16  # slots that a maximum is taken of at once


class OperandState(NamedTuple):
    """What is kept of the operands that share a rule and a format: a column, or an element, for
    each.

    Args:
      amax_history: float32 `[window, operands]`, the latest amaxes; a ring, 0 where none was stored
        yet.
      maxima: where the rule needs the maximum of a window longer than 16, float32 `[ceil(window /
        16), operands]`, the maxima of blocks of 16 slots of the history; and, until 16 suffice,
        those of blocks of these. Otherwise empty.
      seconds: where the rule has an `outlier_ratio`, of the same shapes as `maxima`, the second
        largest amaxes of these blocks.
      stored: int32 `[operands]`, how many were ever stored; the next one goes to `stored % window`.
      observed: int32 `[operands]`, observations that were valid, since the counters were reset.
      saturated: int32 `[operands]`, those of them beyond what their scale could represent.
      nonfinite: int32 `[operands]`, observations of operands in which nothing was finite.
      unsealed: int32 `[operands]`, observations that can't have been made of amaxes by adding,
        averaging or rescaling them.
      flushed: float32 `[operands]`, the sum over valid observations of the shares flushed to zero;
        None where the rule doesn't ask for them.
    """

    amax_history: jax.Array
    maxima: tuple[jax.Array, ...]
    seconds: tuple[jax.Array, ...]
    stored: jax.Array
    observed: jax.Array
    saturated: jax.Array
    nonfinite: jax.Array
    unsealed: jax.Array
    flushed: jax.Array | None

    @classmethod
    def zeros(cls, operands: int, delayed: DelayedScaling) -> "OperandState":
        """Nothing observed, in buffers of their own."""
        window, *blocks = _slots(delayed)
        levels = [[jnp.zeros((slots, operands), jnp.float32) for slots in blocks] for _ in range(2)]
        return cls(
            jnp.zeros((window, operands), jnp.float32),
            tuple(levels[0]),
            tuple(levels[1]) if delayed.outlier_ratio else (),
            **{name: jnp.zeros((operands,), jnp.int32) for name in cls._fields[3:-1]},
            flushed=jnp.zeros((operands,), jnp.float32) if delayed.flushed else None,
        )


def _slots(delayed: DelayedScaling) -> list[int]:
    """The slots of the history, and of each level of maxima above it."""
    slots = [delayed.history_window]
    # A percentile sorts the whole window, and the latest amax alone needs no other.
    needs_maximum = (
        delayed.reduce == "max" or delayed.reduce == "most_recent" and delayed.outlier_ratio
    )
    while needs_maximum and slots[-1] > _BLOCK:
        slots.append(-(-slots[-1] // _BLOCK))
    return slots


def classify(
    state: OperandState,
    amax: jax.Array,
    seal: jax.Array,
    uses: jax.Array,
    flushed: jax.Array | None,
    exponent: jax.Array,
    fmt: Format,
    seals: np.ndarray | None,
) -> tuple[jax.Array, OperandState]:
    """Tells valid observations from others, and counts both.

    Args:
      state: of so many operands.
      amax, seal, uses, exponent: float32 `[operands]`.
      flushed: the same, where the state has it.
      fmt: the format of the operands.
      seals: where several rows are groups of one operand, int `[operands]`, equal for them; else
        None.

    Returns:
      The amaxes with 0 in the place of those that are not valid, and the state with its counters
      moved on.
    """
    finite = jnp.isfinite(amax) & jnp.isfinite(seal) & jnp.isfinite(uses)
    if seals is None:
        largest, fits = largest_amax(amax, seal, uses)
    else:  # a seal is one for all groups of an operand: what was added up can't be told
        _, operand_of = np.unique(seals, return_inverse=True)
        whole = jnp.zeros((operand_of.max() + 1,), jnp.float32).at[operand_of].max(amax)[operand_of]
        finite &= jnp.isfinite(whole)
        largest, fits = amax, seal_fits(whole, seal)
    seen = finite & (jnp.abs(amax) >= _TINIEST)
    valid, amax = seen & fits, largest
    # At the upper end of the exponents the limit is infinite, as it should be: nothing finite
    # saturates there.
    saturated = valid & (amax > scale_from_exponent(exponent) * np.float32(fmt.max))
    total = state.flushed
    if total is not None and flushed is not None:
        total = total + jnp.where(valid, flushed / uses, np.float32(0))
    state = state._replace(
        observed=state.observed + valid.astype(jnp.int32),
        saturated=state.saturated + saturated.astype(jnp.int32),
        nonfinite=state.nonfinite + (~finite).astype(jnp.int32),
        unsealed=state.unsealed + (seen & ~valid).astype(jnp.int32),
        flushed=total,
    )
    return jnp.where(valid, amax, np.float32(0)), state


def move(
    state: OperandState,
    amax: jax.Array,
    exponent: jax.Array,
    fmt: Format,
    delayed: DelayedScaling,
) -> tuple[jax.Array, OperandState]:
    """Stores amaxes and moves the exponents that are due.

    Args:
      state: of so many operands.
      amax: float32 `[operands]`, 0 where there is nothing to store.
      exponent: float32 `[operands]`, the present ones.
      fmt: the format of the operands.
      delayed: their rule.

    Returns:
      The exponents from now on, and the state.
    """
    window = np.int32(delayed.history_window)
    valid = amax > 0
    slot = lax.rem(state.stored, window)
    # Slot first, operand second: neighbours in memory, as most operands are at the same slot.
    history = _write(
        state.amax_history, jnp.where(valid, slot, window), amax
    )  # beyond the ring, so it's dropped
    maxima, seconds = _update_maxima(state.maxima, state.seconds, history, slot)
    stored = state.stored + valid.astype(jnp.int32)

    due = stored % np.int32(delayed.interval) == 0
    threshold = scale_from_exponent(exponent) * np.float32(delayed.update_threshold * fmt.max)
    moves = valid & (due | (amax > threshold))
    limit = scale_from_exponent(exponent) * np.float32(fmt.max)
    reduced = _reduce(history, maxima, seconds, amax, stored, limit, delayed)
    exponent = jnp.where(moves, exponent_from_amax(reduced, fmt, delayed.margin), exponent)
    state = state._replace(amax_history=history, maxima=maxima, seconds=seconds, stored=stored)
    return exponent, state


def _reduce(
    history: jax.Array,
    maxima: tuple[jax.Array, ...],
    seconds: tuple[jax.Array, ...],
    amax: jax.Array,
    stored: jax.Array,
    limit: jax.Array,
    delayed: DelayedScaling,
) -> jax.Array:
    """What scales are to fit, float32 `[operands]`.

    Args:
      history, maxima, seconds, stored: with the latest amaxes in them.
      amax: the latest amaxes.
      limit: the largest values that the present scales can represent; they stand for the others
        where an amax is the first.
      delayed: the rule.
    """
    percentile = delayed.percentile
    ordered = history if percentile is None else jnp.sort(history, axis=0)
    if delayed.outlier_ratio is None:
        if percentile is not None:
            return _percentile(ordered, stored, 0, percentile)
        return amax if delayed.reduce == "most_recent" else _largest((history, *maxima)[-1])
    if history.shape[0] == 1:
        largest, second = amax, jnp.full_like(amax, np.inf)
    elif percentile is not None:
        largest, second = ordered[-1], ordered[-2]
    else:
        largest, second = _two_largest((history, *maxima)[-1], seconds[-1] if seconds else None)
    second = jnp.where(stored == 1, limit, second)
    ratio = np.float32(delayed.outlier_ratio)
    is_outlier = amax > second * ratio
    left_out = (largest > second * ratio) & ~is_outlier
    if delayed.reduce == "most_recent":
        reduced = amax
    elif percentile is not None:
        reduced = _percentile(ordered, stored, left_out.astype(jnp.int32), percentile)
    else:
        reduced = jnp.where(left_out, second, largest)
    # The latest one, until it is confirmed: only itself is above this bound.
    bound = second * np.float32(math.sqrt(delayed.outlier_ratio))
    return jnp.where(is_outlier, jnp.minimum(reduced, bound), reduced)


def _write(ring: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    # A state that was read from bytes or brought to the host is of NumPy's arrays.
    return (
        jnp.asarray(ring)
        .at[slot, np.arange(slot.size, dtype=np.int32)]
        .set(value, mode="drop", unique_indices=True)
    )


def _update_maxima(
    maxima: tuple[jax.Array, ...],
    seconds: tuple[jax.Array, ...],
    history: jax.Array,
    slot: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The maxima, and second largest amaxes, after a write to one slot of the history: of the
    blocks that it is in, level by level.

    So an update reads a block of each level, where a maximum of the whole history would read all of
    it.
    """
    updated, updated_seconds, below, below_second = [], [], history, None
    for position, level in enumerate(maxima):
        slot = lax.div(slot, np.int32(_BLOCK))
        first = slot * np.int32(_BLOCK)
        block = _blocks(below, first)
        if seconds:
            block_second = None if below_second is None else _blocks(below_second, first)
            largest, second = _two_largest(block, block_second)
            below_second = _write(seconds[position], slot, second)
            updated_seconds.append(below_second)
        else:
            largest = _largest(block)
        below = _write(level, slot, largest)
        updated.append(below)
    return tuple(updated), tuple(updated_seconds)


def _blocks(ring: jax.Array, first: jax.Array) -> jax.Array:
    """Of each operand, the block that begins at a slot, float32 `[16, operands]`, filled up with
    zeros: the last one may be shorter.
    """
    start = lax.min(first, np.int32(ring.shape[0] - _BLOCK))
    # No `dynamic_slice` under `vmap`: that would transpose the ring.
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=(0,), collapsed_slice_dims=(1,), start_index_map=(0, 1)
    )
    blocks = lax.gather(
        ring,
        jnp.stack([start, np.arange(start.size, dtype=np.int32)], axis=1),
        dimensions,
        (_BLOCK, 1),
        unique_indices=True,
        mode="promise_in_bounds",
    )
    return jnp.where(
        lax.broadcasted_iota(np.int32, blocks.shape, 0) >= (first - start)[None],
        blocks,
        np.float32(0),
    )


def _largest(amaxes: jax.Array) -> jax.Array:
    """The maxima over the first axis, as integers: of floats, which may be NaN, XLA's CPU compiler
    vectorizes none.
    """
    bits = lax.reduce(lax.bitcast_convert_type(amaxes, np.int32), np.int32(0), lax.max, (0,))
    return lax.bitcast_convert_type(bits, np.float32)


def _two_largest(amaxes: jax.Array, seconds: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The largest and the second largest over the first axis; of pairs of these, where `seconds`
    are given. Of two that are equal, both.

    As integers, by halves: each step is plain arithmetic on whole rows.
    """
    largest = lax.bitcast_convert_type(amaxes, np.int32)
    second = (
        jnp.zeros_like(largest) if seconds is None else lax.bitcast_convert_type(seconds, np.int32)
    )
    while (count := largest.shape[0]) > 1:
        half = (count + 1) // 2
        a, b = largest[: count - half], largest[half:]
        both = lax.max(lax.min(a, b), lax.max(second[: count - half], second[half:]))
        middle = slice(count - half, half)
        largest = jnp.concatenate([lax.max(a, b), largest[middle]])
        second = jnp.concatenate([both, second[middle]])
    largest, second = (
        lax.bitcast_convert_type(found[0], np.float32) for found in (largest, second)
    )
    return largest, second


def _percentile(
    ordered: jax.Array, stored: jax.Array, left_out: jax.Array | int, percentile: float
) -> jax.Array:
    """A percentile of the window's sorted amaxes, without so many of the largest, float32
    `[operands]`.

    Slots without an amax hold 0, below any amax.
    """
    window = ordered.shape[0]
    # By nearest rank: the ceil(p / 100 * n)-th smallest of n. From a table, since floats get 99 %
    # of 100 wrong.
    share = fractions.Fraction(str(percentile)) / 100
    ranks = np.array([math.ceil(share * n) for n in range(window + 1)], np.int32)
    n = jnp.minimum(stored, np.int32(window))
    position = np.int32(window - 1) - n + jnp.asarray(ranks)[n - left_out]
    return jnp.take_along_axis(ordered, jnp.maximum(position, np.int32(0))[None], axis=0)[0]
