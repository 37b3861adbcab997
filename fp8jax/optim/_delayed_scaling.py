"""Delayed scaling as an optax transformation: observed amaxes in, moves of the scales' exponents
out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fp8jax._recipe import OPERANDS
from fp8jax._site_scales import SiteScales
from fp8jax._state import check_exponents, with_stacks
from fp8jax.optim import _rule
from fp8jax.optim._checks import (
    OF_NO_PARAMS,
    check_alike,
    check_scales_alone,
    check_state,
    is_placeholder,
)
from fp8jax.optim._rows import Rows, join, rows_of, split
from fp8jax.optim._rule import OperandState


class ScalingState(NamedTuple):
    """State of `delayed_scaling`.

    Args:
      operands: an `OperandState` for each combination of `DelayedScaling` and format among the
        operands, in the order of their first appearance. Its rows are the elements of these
        operands' leaves, in the order of flattening; `fp8jax.metrics` puts names to them.
    """

    operands: tuple[OperandState, ...]


def delayed_scaling() -> optax.GradientTransformation:
    """Moves scales after the amaxes that were observed, for a tree that holds `SiteScales` and
    nothing else.

    What it does with an operand is said by the `DelayedScaling` in the operand's cast, statically.
    An update goes through the following for each operand (where layers are stacked or an operand
    has groups, for each element of its leaf), in this order. `a` is the observed amax, `s` its
    seal, `u` the number of its uses, `e` the exponent so far, `max` that of the format::

        classify   if a, s or u is infinite or NaN:       nonfinite += 1; end
                   if a == 0 (or below 2**-126):          end, since nothing was observed
                   if no amaxes add up to a, s and u:     unsealed += 1; end
                   observed += 1
                   flushed += f / u, the share flushed to zero  if DelayedScaling.flushed
                   a = the largest of them, see below
                   if a > max * 2**e:                     saturated += 1
        push       amax_history[stored % history_window] = a
                   stored += 1
        outlier    w = the stored amaxes that are still in the window, n of them; a is one of them
                   u = the second largest of w            (if stored == 1:  max * 2**e)
                   if a > outlier_ratio * u:              a counts as sqrt(outlier_ratio) * u now
                   else if max(w) > outlier_ratio * u:    leave the largest out of w, so n -= 1
        reduce     r = max(w)                             if reduce == "max"
                       a                                  if reduce == "most_recent"
                       sorted(w)[ceil(p / 100 * n) - 1]   if reduce is a percentile p
        interval   due = stored % interval == 0
        threshold  early = a > update_threshold * max * 2**e
        move       if due or early:
                       e = ceil(log2(r * margin / max)), within [-126, 126]

    An update at which an operand had no valid observation ends early. It leaves that operand's
    history, interval and exponent as they were, as if there had been no such update. A threshold
    decides when a scale moves, not whereto: with a percentile, an early move goes to the percentile
    too, and may leave the outlier that caused it out. `update_threshold` has no say where
    `interval` is 1, since every update is due.

    A gradient with respect to scales may have been added up outside of the function: two calls of
    it in one loss, a mean over microbatches or devices, a clipped norm. Then `a`, `s` and `u` are
    sums of amaxes, of their roots, and of ones, all times one factor. Of one use, and of two that
    were added, `a` becomes the largest amax. Of n it becomes a bound of the largest,
    `(m + sqrt((n - 1) * v))**2` where `m` is the mean of the roots, and `v` their variance
    (Samuelson's inequality); n is `u` where that is an integer, and otherwise taken to be 16.

    The step `outlier` is skipped where `outlier_ratio` is None, and from the second amax on where
    `history_window` is 1, which leaves nothing to compare with. Of what an outlier reaches beyond
    the scale, all is clipped, and counted as saturated. So one bad batch, and a real jump of the
    amax, lead to these exponents, with E4M3, whose largest value is 448, and `DelayedScaling`'s
    defaults::

        update     1    2    3     4    5         update     1    2    3        4        5
        a          3.0  3.0  1e30  3.0  3.0       a          3.0  3.0  12288.0  12288.0  12288.0
        r          3.0  3.0  96.0  3.0  3.0       r          3.0  3.0  96.0     12288.0  12288.0
        e after    -7   -7   -2    -7   -7        e after    -7   -7   -2       5        5

    While a site clips, those behind it don't see how much it does, unless something in between
    normalizes. So after a lasting jump by a factor `J`, a chain of n sites has scales that fit
    after `n + max(0, ceil(log(J / outlier_ratio) / log(sqrt(outlier_ratio))))` updates: 1 more than
    the n of a chain without this step, up to 2**15 with the default. The five binades that an
    unconfirmed one does move its scale are what lets the next site begin.

    The cost of an update hardly grows with the window, unless it is a percentile's, which sorts it:
    for "max", the state keeps the maxima (and second largest) of blocks of 16 amaxes, and of blocks
    of these, of which an update reads one each.

    Returns:
      An `optax.GradientTransformation`. `init(params)` makes a `ScalingState`; of `params`, only
      the structure matters. `update(updates, state, params)` takes observations, the gradient with
      respect to the scales, and returns differences of exponents: small integers, so that
      `optax.apply_updates` moves each exponent exactly.

    Raises:
      ValueError: from `init` or `update`, where there are no scales, or the arguments are not of
        the same sites and shapes.
      TypeError: from `init` or `update`, where there is anything but scales, or a leaf is not
        float32.

    >>> from fp8jax import recipes
    >>> from fp8jax._observe import seal_of
    >>> scales = SiteScales.zeros("mlp", recipes.delayed().delayed_casts)
    >>> seen = jnp.array([3.0, 448.0, 2.0**-12])
    >>> of_one_use = {"seal": seal_of(seen), "uses": jnp.float32(1)}
    >>> amaxes = scales.replace(lhs=seen[0], rhs=seen[1], grad=seen[2], **of_one_use)
    >>> tx = delayed_scaling()
    >>> updates, state = tx.update(amaxes, tx.init(scales), scales)
    >>> updates.lhs, updates.rhs, updates.grad
    (Array(-7., dtype=float32), Array(0., dtype=float32), Array(-27., dtype=float32))
    >>> optax.apply_updates(scales, updates).scales()["lhs"]
    Array(0.0078125, dtype=float32)
    """

    def init(params) -> Any:
        if is_placeholder(params):
            return OF_NO_PARAMS
        return init_state(list(check_scales_alone(params, "params").values()))

    def update(updates, state, params=None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "params must be the scales that are to be updated; got None. Call update(updates, "
                "state, params)."
            )
        scales = check_scales_alone(params, "params")
        observations = check_scales_alone(updates, "updates")
        check_alike(observations, scales)
        step = Step(list(scales.values()), state)
        amaxes, state = step.observe(list(observations.values()), state)
        moved, state = step.move(amaxes, state)
        return with_stacks(updates, moved), state

    return optax.GradientTransformation(init, update)


def init_state(scales: Sequence[SiteScales]) -> ScalingState:
    """The state before the first observation."""
    return ScalingState(
        tuple(OperandState.zeros(rows.count, rows.delayed) for rows in rows_of(scales))
    )


class Step:
    """One update of the state of `scales`, in two parts, so that several observations can be made
    for one move.
    """

    def __init__(self, scales: Sequence[SiteScales], state: ScalingState):
        check_exponents(list(scales), "params")
        self._scales = scales
        self._rows: tuple[Rows, ...] = rows_of(scales)
        check_state(state.operands, self._rows)
        self._exponents = self._vectors(scales)

    def _vectors(self, nodes: Sequence[SiteScales]) -> Sequence[jax.Array]:
        """The operands' leaves of `nodes`, one vector for each member of the state."""
        if not self._rows:
            return ()
        leaves = [leaf for rows in self._rows for leaf in rows.leaves(nodes)]
        return lax.split(join(leaves), [rows.count for rows in self._rows])

    def observe(
        self,
        observations: Sequence[SiteScales],
        state: ScalingState,
    ) -> tuple[tuple[jax.Array, ...], ScalingState]:
        """The valid amaxes as vectors, like the state's, 0 for the others; and the state with its
        counters moved on.
        """
        if not self._rows:
            return (), state
        seals = join([node.seal for node in observations if any(node.casts)])
        uses = join([node.uses for node in observations if any(node.casts)])
        flushed = None
        if any(rows.delayed.flushed for rows in self._rows):
            # Where a site has none, its seals stand in, so that the same places hold for both.
            flushed = join(
                [
                    node.seal if node.flushed is None else node.flushed
                    for node in observations
                    if any(node.casts)
                ]
            )
        found = [
            _rule.classify(
                operand,
                amax,
                seals[rows.seals],
                uses[rows.seals // len(OPERANDS)],
                flushed[rows.seals] if flushed is not None and rows.delayed.flushed else None,
                exponent,
                rows.format,
                rows.seals if rows.grouped else None,
            )
            for operand, rows, amax, exponent in zip(
                state.operands,
                self._rows,
                self._vectors(observations),
                self._exponents,
                strict=True,
            )
        ]
        return tuple(amax for amax, _ in found), ScalingState(
            tuple(operand for _, operand in found)
        )

    def move(
        self, amaxes: Sequence[jax.Array], state: ScalingState
    ) -> tuple[list[SiteScales], ScalingState]:
        """The differences of exponents, as nodes in the order of `scales`, and the state with the
        amaxes stored.
        """
        differences, operands = [], []
        for amax, operand, rows, exponent in zip(
            amaxes, state.operands, self._rows, self._exponents, strict=True
        ):
            moved, operand = _rule.move(operand, amax, exponent, rows.format, rows.delayed)
            differences.append(moved - exponent)
            operands.append(operand)
        leaves = [{} for _ in self._scales]
        members = [member for rows in self._rows for member in rows.members]
        shapes = [shape for rows in self._rows for shape in rows.shapes]
        if members:
            for (position, name), leaf in zip(
                members, split(join(differences), shapes), strict=True
            ):
                leaves[position][name] = leaf
        shapes = {
            leaf.shape
            for node in self._scales
            if any(node.casts)
            for leaf in (node.seal, node.uses)
        }
        zeros = {shape: jnp.zeros(shape, jnp.float32) for shape in shapes}
        nodes = (
            node.replace(
                seal=zeros[node.seal.shape],
                uses=zeros[node.uses.shape],
                flushed=None if node.flushed is None else zeros[node.seal.shape],
                **found,
            )
            if any(node.casts)
            else node
            for node, found in zip(self._scales, leaves, strict=True)
        )
        return list(nodes), ScalingState(tuple(operands))
