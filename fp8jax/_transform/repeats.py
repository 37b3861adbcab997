"""Layers of one shape, unrolled: evaluated as one scan where a jaxpr repeats itself.

A run of blocks of equations that are alike becomes a loop over the first one's equations. What each
block reads of the one before is carried; what all read alike is shared; what each has of its own,
such as weights, the scales of its sites, and literals that differ, is stacked in front; and what is
read behind the run is stacked by the loop and taken apart. Sites keep their names and their scales:
in the loop those of all blocks are one, as of layers that the function itself scans.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _shims
from fp8jax._boxes import Boxes
from fp8jax._observe import stack_exponents
from fp8jax._site_exponents import SiteExponents
from fp8jax._transform.alike import Alike
from fp8jax._transform.analysis import Entered, Plan
from fp8jax._transform.blocks import Template, joined_step, lead
from fp8jax._transform.runs import FEWEST, Line, Run, order_with_parts_first
from fp8jax._transform.sites import Site
from fp8jax.ops._cast import Codes
from fp8jax.ops._ready import Ready, own_scales

Kinds = Mapping[Any, frozenset]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Blocks of equations that are evaluated as one scan.

    Args:
      step: the scan, and what is planned for it.
      run: where the blocks are.
      shared: what all blocks read, from outside.
      carried: what the first one reads in the place of what others read of the one before.
      each: what each reads of its own: for each such operand, a variable or a literal a block.
      results: what is read behind the run: variable, position among the loop's outputs, and which
        block's; None for what the last one hands on.
      names: of the sites of all blocks, by the name that they have in the loop.
    """

    step: Entered
    run: Run
    shared: tuple[Any, ...]
    carried: tuple[Any, ...]
    each: tuple[tuple[Any, ...], ...]
    results: tuple[tuple[Any, int, int | None], ...]
    names: dict[str, tuple[str, ...]]

    @property
    def said(self) -> str:
        """The run in words."""
        first = next(iter(self.names.values()), ("?",))
        return (
            f"{self.run.count} blocks of {self.run.period} equations, from {first[0]} to "
            f"{first[-1]}, as one scan"
        )

    def own_names(self) -> tuple[str, ...]:
        """The names of all blocks' sites."""
        return tuple(itertools.chain.from_iterable(self.names.values()))

    def operands(self, values: Mapping[Any, Any]) -> list[Any]:
        """The scan's operands, of the values of the jaxpr so far."""

        def read(atom):
            return atom.val if hasattr(atom, "val") else values[atom]

        each = [_stacked([(atom.aval, read(atom)) for atom in atoms]) for atoms in self.each]
        return [*map(read, self.shared), *map(read, self.carried), *each]

    def scales(self, scales: Mapping[str, SiteExponents | Ready]) -> dict[str, SiteExponents]:
        """The scales of the loop's sites."""
        found = {}
        for joined, names in self.names.items():
            if names[0] in scales:
                of_blocks = [own_scales(scales[name]).replace(site=joined) for name in names]
                found[joined] = stack_exponents(of_blocks)
        return found

    def ahead(self, ahead: Mapping[str, Any]) -> dict[str, Any]:
        """What was cast of the sites' weights before, around this run."""
        found = {}
        for joined, names in self.names.items():
            of_blocks = [ahead[name] for name in names if name in ahead]
            shapes = {
                (jax.tree.structure(one), *map(jnp.shape, jax.tree.leaves(one)))
                for one in of_blocks
            }
            # Where some have it and some don't, each block casts its own.
            if len(of_blocks) == len(names) and len(shapes) == 1:
                found[joined] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_blocks)
        return found

    def outputs(self, found: Sequence[Any]) -> dict[Any, Any]:
        """The values of the variables that are read behind the run."""
        return {
            variable: found[position]
            if block is None
            else jax.lax.index_in_dim(found[position], block, keepdims=False)
            for variable, position, block in self.results
        }

    def observed(self, observed: Mapping[str, Any]) -> dict[str, Any]:
        """What the blocks' sites observed, by their own names."""
        return {
            name: jax.tree.map(lambda leaf: leaf[block], observed[joined]).replace(site=name)
            for joined, names in self.names.items()
            if joined in observed
            for block, name in enumerate(names)
        }


def _stacked(of_blocks: Sequence[tuple[Any, Any]]) -> Any:
    """What blocks read of their own, pairs of types and values, as a scan's operand."""
    values = [value for _, value in of_blocks]
    if isinstance(values[0], Codes):
        extents = values[0].scaling.block(values[0].shape)
        return dataclasses.replace(
            values[0],
            data=jnp.stack([value.data for value in values]),
            scale=jnp.stack([value.scale for value in values]),
            scaling=Boxes((1, *extents)),
            name=f"{values[0].name} and its like",
        )
    dtype = of_blocks[0][0].dtype
    if not any(isinstance(value, jax.Array) for value in values):
        return np.stack([np.asarray(value, dtype) for value in values])
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return jnp.stack(values)
    return jnp.stack([jnp.asarray(value, dtype) for value in values])


def with_repeats(
    jaxpr: Any, plan: Plan, held_as: Sequence[Hashable]
) -> tuple[Plan, tuple[Repeat, ...]]:
    """The plan with runs of blocks, here and in inner jaxprs, as scans; and these.

    Args:
      jaxpr: that `plan` was made for.
      plan: its sites.
      held_as: for each of its inputs None, or how it is held where it is no plain array.

    Raises:
      ValueError: where there is no run of at least three blocks.
    """
    opened, _ = _shims.open_jaxpr(jaxpr)
    kinds = {
        variable: frozenset((kind,))
        for variable, kind in zip(opened.invars, held_as, strict=True)
        if kind is not None
    }
    finder = _Finder()
    plan = finder.planned(opened, plan, kinds, 0)
    if not finder.found:
        raise ValueError(
            "scan_repeats=True needs layers that are alike: a block of equations with a product "
            f"in FP8, {FEWEST} times or more in a row, each reading what the one before computed; "
            f"got none. The first difference: {finder.why()}. Leave scan_repeats out, or make the "
            "layers alike."
        )
    return plan, tuple(finder.found)


class _Finder:
    """Finds runs, and makes repeats of them."""

    def __init__(self):
        self.found: list[Repeat] = []
        self._alike = Alike()
        self._loops = itertools.count(-1, -1)
        self._without: list[Line] = []

    def why(self) -> str:
        """Why there is none: of the jaxpr with the most products."""
        line = max(self._without, key=lambda line: sum(step is not None for step in line.steps))
        return line.first_difference()

    def planned(self, opened: Any, plan: Plan, kinds: Kinds, depth: int) -> Plan:
        """The plan of an open jaxpr with its runs.

        Args:
          opened: the jaxpr.
          plan: for it, without any.
          kinds: by variable, how it is held, of those that are no plain arrays.
          depth: how many loops are around it.
        """
        kinds = _kinds_inside(opened, plan, kinds)
        lines = [
            Line(opened, plan.equations, order, self._alike, kinds)
            for order in (range(len(opened.eqns)), order_with_parts_first(opened, plan.equations))
        ]
        runs = [line.runs() for line in lines]
        spared = [sum(run.spared for run in of_line) for of_line in runs]
        which = int(spared[1] > spared[0])
        line, of_line = lines[which], runs[which]
        if not of_line and plan.equations:
            self._without.append(line)
        schedule, at, inside = [], 0, set()
        for run in of_line:
            schedule += [*line.order[at : run.start], self._repeat(line, run, opened, kinds, depth)]
            at = run.stop
            inside.update(line.order[run.start : run.stop])
        schedule += line.order[at:]
        equations = {
            index: self._entered(opened.eqns[index], step, kinds, depth)
            if isinstance(step, Entered) and index not in inside
            else step
            for index, step in plan.equations.items()
        }
        return Plan(equations, tuple(schedule) if of_line else None)

    def _entered(self, equation: Any, step: Entered, kinds: Kinds, depth: int) -> Entered:
        depth += "length" in step.flow.options
        operands = equation.invars[step.flow.num_own :]
        plans = []
        for jaxpr, plan in zip(step.flow.bodies, step.plans, strict=True):
            opened, _ = _shims.open_jaxpr(jaxpr)
            held = {
                variable: kinds[atom]
                for variable, atom in zip(opened.invars, operands, strict=True)
                if _shims.is_variable(atom) and atom in kinds
            }
            plans.append(self.planned(opened, plan, held, depth) if plan.equations else plan)
        return dataclasses.replace(step, plans=tuple(plans))

    def _repeat(self, line: Line, run: Run, opened: Any, kinds: Kinds, depth: int) -> Repeat:
        template = Template(line, run, opened)
        loop = next(self._loops)
        names: dict[str, tuple[str, ...]] = {}
        steps = {
            place: joined_step(of_blocks, loop, run.count, depth, names)
            for place, of_blocks in template.steps.items()
        }
        lead(template.block, steps)
        held = {
            variable: kinds[atom]
            for variable, atom in template.stands_for.items()
            if _shims.is_variable(atom) and atom in kinds
        }
        plan = self.planned(template.block, Plan(steps), held, depth + 1)
        repeat = Repeat(
            Entered(template.flow(), (plan,), loop),
            run,
            tuple(template.shared),
            tuple(template.carried),
            tuple(template.each),
            tuple(template.results),
            names,
        )
        self.found.append(repeat)
        return repeat


def _kinds_inside(opened: Any, plan: Plan, kinds: Kinds) -> dict[Any, frozenset]:
    """By variable, how that is held which it is computed from, if not as plain arrays."""
    found = dict(kinds)
    for index, equation in enumerate(opened.eqns):
        if isinstance(plan.equations.get(index), Site) or not found:
            continue
        held = [found[a] for a in equation.invars if _shims.is_variable(a) and a in found]
        if held:
            found.update((variable, frozenset().union(*held)) for variable in equation.outvars)
    return found
