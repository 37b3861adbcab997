"""Runs of blocks of equations that are alike, each reading what the one before computed."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fp8jax import _shims
from fp8jax._transform.alike import Alike

# With fewer, the loop and its copies cost what they spare.
FEWEST = 3
# What takes its part of an array by constants of its own, and may stand in front of all blocks.
_TAKES = ("slice", "squeeze")


@dataclasses.dataclass(frozen=True)
class Run:
    """Blocks of as many equations each, one after the other.

    Args:
      start: the first equation's place in the order of the line.
      period: the number of equations of a block.
      count: of blocks.
    """

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """The place behind the last equation."""
        return self.start + self.period * self.count

    @property
    def spared(self) -> int:
        """How many equations fewer one block is."""
        return self.period * (self.count - 1)


class Line:
    """The equations of a jaxpr in an order that they may be evaluated in.

    Args:
      opened: the jaxpr.
      plan: by index of an equation, what is planned for it.
      order: their indices.
      alike: numbers them.
      kinds: by variable, how it is held where it is no plain array.
    """

    def __init__(self, opened: Any, steps: Mapping[int, Any], order, alike: Alike, kinds):
        self.order: list[int] = list(order)
        self.equations = [opened.eqns[index] for index in self.order]
        self.steps = [steps.get(index) for index in self.order]
        self._alike = alike
        numbers = []
        for place, (equation, step) in enumerate(zip(self.equations, self.steps)):
            held = [
                kinds.get(atom, frozenset()) if _shims.is_variable(atom) else frozenset()
                for atom in equation.invars
            ]
            # What has effects happens in its own order.
            alone = -1 - place if equation.effects else None
            numbers.append(alike.equation(equation, step, held) if alone is None else alone)
        self.numbers = np.array(numbers, np.int64)
        self._has_site = np.array([step is not None for step in self.steps], bool)
        self.made_at = {
            variable: (place, position)
            for place, equation in enumerate(self.equations)
            for position, variable in enumerate(equation.outvars)
        }

    def runs(self, low: int = 0, high: int | None = None) -> list[Run]:
        """Runs between two places, the longest ones first found, in their order."""
        high = len(self.order) if high is None else high
        best = self._best(low, high)
        if best is None:
            return []
        return [*self.runs(low, best.start), best, *self.runs(best.stop, high)]

    def place_of(self, run: Run, block: int, atom: Any) -> tuple[int, int, int] | None:
        """Where in the run an operand of a block comes from: how many blocks before, the equation
        in that block, and which of its results; None where it comes from outside.
        """
        made = self.made_at.get(atom) if _shims.is_variable(atom) else None
        if made is None or made[0] < run.start:
            return None
        before, place = divmod(made[0] - run.start, run.period)
        return block - before, place, made[1]

    def first_difference(self) -> str:
        """Why there is no run, in words."""
        periods = self._periods(0, len(self.order), fewest=2)
        matching = {period: self._matches(0, len(self.order), period) for period in periods}
        near = max(
            ((start, length, p) for p, found in matching.items() for start, length in found),
            key=lambda one: (one[1] // one[2] + 1 >= FEWEST, min(one[1], one[2]), -one[2]),
            default=None,
        )
        if near is None:
            return self._difference_of_products()
        start, length, period = near
        run = Run(start, period, length // period + 1)
        if run.count >= FEWEST:
            return self._difference_of_wiring(run)
        # Behind what is alike, and in front of it; where the same is done to something else.
        for one in (start + length, start - 1):
            if 0 <= one < len(self.order) - period:
                pair = [(self.equations[i], self.steps[i]) for i in (one, one + period)]
                if pair[0][0].primitive is pair[1][0].primitive:
                    return self._alike.difference(*pair)
        return f"no block of equations is there {FEWEST} times in a row"

    def _difference_of_products(self) -> str:
        by_kind = collections.defaultdict(list)
        for place in np.flatnonzero(self._has_site):
            by_kind[self.equations[place].primitive].append(place)
        for places in by_kind.values():
            if len(places) > 1:
                pair = [(self.equations[i], self.steps[i]) for i in places[:2]]
                return self._alike.difference(*pair)
        return "no two products are alike"

    def _difference_of_wiring(self, run: Run) -> str:
        for block in range(1, run.count):
            for place in range(run.period):
                equation = self.equations[run.start + block * run.period + place]
                for atom in equation.invars:
                    if (found := self.place_of(run, block, atom)) and found[0] > 1:
                        return (
                            f"{equation.primitive.name} reads what a block computed that is not "
                            f"the one before ({_shims.source_of(equation) or 'no source known'})"
                        )
        return "the blocks don't read each what the one before computed"

    def _best(self, low: int, high: int) -> Run | None:
        found = []
        crossing = None
        for period in self._periods(low, high, FEWEST):
            for start, length in self._matches(low, high, period):
                count = length // period + 1
                if count >= FEWEST:
                    found.append((Run(start, period, count), length % period))
        best: Run | None = None
        for run, slack in sorted(found, key=lambda one: (-one[0].spared, one[0].period)):
            if best is not None and run.spared <= best.spared:
                break
            crossing = self._bytes_over() if crossing is None else crossing
            # Blocks begin where least is handed on.
            first = run.start + run.period
            begin = run.start + int(np.argmin(crossing[first : first + slack + 1]))
            for part in self._wired_alike(dataclasses.replace(run, start=begin)):
                if best is None or part.spared > best.spared:
                    best = part
        return best

    def _periods(self, low: int, high: int, fewest: int) -> list[int]:
        """Distances between products that are alike."""
        places = collections.defaultdict(list)
        for place in range(low, high):
            if self._has_site[place]:
                places[self.numbers[place]].append(place)
        found = set()
        for some in places.values():
            distances = np.subtract.outer(some, some)
            found.update(np.unique(distances[distances > 0]).tolist())
        return sorted(period for period in found if period * fewest <= high - low)

    def _matches(self, low: int, high: int, period: int) -> list[tuple[int, int]]:
        """Stretches, as (start, length), in which each equation is as the one a period later."""
        same = self.numbers[low : high - period] == self.numbers[low + period : high]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
        stretches = zip(edges[::2].tolist(), edges[1::2].tolist())
        return [
            (low + start, stop - start)
            for start, stop in stretches
            if self._has_site[low + start : low + stop].any()
        ]

    def _bytes_over(self) -> np.ndarray:
        """How much is computed before each place and read from there on; of equations' results."""
        last = {}
        for place, equation in enumerate(self.equations):
            last.update((atom, place) for atom in equation.invars if _shims.is_variable(atom))
        over = np.zeros(len(self.order) + 1)
        for variable, (place, _) in self.made_at.items():
            if variable in last:
                size = _shims.least_size(getattr(variable.aval, "shape", ()))
                size *= getattr(variable.aval.dtype, "itemsize", 4)
                over[place + 1] += size
                over[last[variable] + 1] -= size
        return np.cumsum(over)

    def _wired_alike(self, run: Run) -> Iterator[Run]:
        """The parts of a run whose blocks read alike from themselves and from the one before."""
        start, left = run.start, run.count
        while left >= FEWEST:
            part = Run(start, run.period, left)
            count = self._count_wired(part)
            if count >= FEWEST and self._is_chained(part):
                yield dataclasses.replace(part, count=count)
            start, left = start + count * run.period, left - count

    def _count_wired(self, run: Run) -> int:
        second = self._wiring(run, 1)
        if any(place and place[0] > 1 for place in second):
            return 1
        for before, after in zip(self._wiring(run, 0), second, strict=True):
            own = after if after is not None and after[0] == 0 else None
            if before != own:
                return 1
        for block in range(2, run.count):
            if self._wiring(run, block) != second:
                return block
        return run.count

    def _is_chained(self, run: Run) -> bool:
        has_site = self._has_site[run.start : run.start + run.period].any()
        return bool(has_site) and any(place and place[0] == 1 for place in self._wiring(run, 1))

    def _wiring(self, run: Run, block: int) -> list[tuple[int, int, int] | None]:
        first = run.start + block * run.period
        return [
            self.place_of(run, block, atom)
            for equation in self.equations[first : first + run.period]
            for atom in equation.invars
        ]


def order_with_parts_first(opened: Any, steps: Mapping[int, Any]) -> list[int]:
    """The equations' order with slices as early as can be, of what no product was computed for.

    A layer that takes its weights from a stack, or its key from many, does so by numbers of its
    own. In front of all layers these are no part of them.
    """
    depends, moved = set(), set()
    for index, equation in enumerate(opened.eqns):
        reads = [atom for atom in equation.invars if _shims.is_variable(atom)]
        if index in steps or any(atom in depends for atom in reads):
            depends.update(equation.outvars)
        elif equation.primitive.name in _TAKES:
            moved.add(index)
    made_by = {variable: index for index, one in enumerate(opened.eqns) for variable in one.outvars}
    waiting, order = collections.defaultdict(list), []

    def emit(indices: Sequence[int]):
        for index in indices:
            order.append(index)
            emit(waiting[index])

    for index in sorted(moved):
        made = [made_by.get(a, -1) for a in opened.eqns[index].invars if _shims.is_variable(a)]
        waiting[max(made, default=-1)].append(index)
    emit(waiting[-1])
    emit([index for index in range(len(opened.eqns)) if index not in moved])
    return order
