"""Layers of one shape, unrolled: evaluated as one scan where a jaxpr repeats itself.

A run of blocks of equations that are alike becomes a loop over the first one's equations. What each
block reads of the one before is carried; what all read alike is shared; what each has of its own,
such as weights, the scales of its sites, and literals that differ, is stacked in front; and what is
read behind the run is stacked by the loop and taken apart. Sites keep their names and their scales:
in the loop those of all blocks are one, as of layers that the function itself scans.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from fp8jax import shims
from fp8jax.boxes import Boxes
from fp8jax.observe import stack_scales
from fp8jax.ops.cast import Codes
from fp8jax.ops.ready import Ready, own_scales
from fp8jax.state import SiteScales
from fp8jax.transform.alike import OPENED, Alike, Block
from fp8jax.transform.analysis import Entered, Plan
from fp8jax.transform.common import Readers
from fp8jax.transform.control_flow import Flow, Kind, flow_of
from fp8jax.transform.joined_names import joined_name
from fp8jax.transform.runs import FEWEST, Line, Run, order_with_parts_first
from fp8jax.transform.sites import Site

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

    def scales(self, scales: Mapping[str, SiteScales | Ready]) -> dict[str, SiteScales]:
        """The scales of the loop's sites."""
        found = {}
        for joined, names in self.names.items():
            if names[0] in scales:
                of_blocks = [own_scales(scales[name]).replace(site=joined) for name in names]
                found[joined] = stack_scales(of_blocks)
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
    opened, _ = shims.open_jaxpr(jaxpr)
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
            opened, _ = shims.open_jaxpr(jaxpr)
            held = {
                variable: kinds[atom]
                for variable, atom in zip(opened.invars, operands, strict=True)
                if shims.is_variable(atom) and atom in kinds
            }
            plans.append(self.planned(opened, plan, held, depth) if plan.equations else plan)
        return dataclasses.replace(step, plans=tuple(plans))

    def _repeat(self, line: Line, run: Run, opened: Any, kinds: Kinds, depth: int) -> Repeat:
        template = _Template(line, run, opened)
        loop = next(self._loops)
        names: dict[str, tuple[str, ...]] = {}
        steps = {
            place: _joined(of_blocks, loop, run.count, depth, names)
            for place, of_blocks in template.steps.items()
        }
        _lead(template.block, steps)
        held = {
            variable: kinds[atom]
            for variable, atom in template.stands_for.items()
            if shims.is_variable(atom) and atom in kinds
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


class _Template:
    """The first block of a run as the body of a loop."""

    def __init__(self, line: Line, run: Run, opened: Any):
        self._line, self._run = line, run
        self._inputs: dict[Hashable, Any] = {}
        self.stands_for: dict[Any, Any] = {}
        self.shared, self.carried, self.each = [], [], []
        self._of_shared, self._of_carried, self._of_each, self._handed_on = [], [], [], []
        self.steps: dict[int, list[Any]] = {}
        equations = []
        for place in range(run.period):
            of_blocks = [run.start + block * run.period + place for block in range(run.count)]
            equation, steps = self._equation(
                [line.equations[at] for at in of_blocks], [line.steps[at] for at in of_blocks]
            )
            equations.append(equation)
            if steps[0] is not None:
                self.steps[place] = steps
        results = self._results(opened)
        inputs = (*self._of_shared, *self._of_carried, *self._of_each)
        self.block = Block((), (), inputs, tuple(equations), (*self._handed_on, *results))

    def flow(self) -> Flow:
        """The scan over the blocks."""
        return Flow(
            Kind.LOOP,
            [self.block],
            jax.lax.scan,
            {"length": self._run.count},
            num_consts=len(self.shared),
            num_carry=len(self.carried),
        )

    def _equation(self, of_blocks: list[Any], steps: list[Any]) -> tuple[Any, list[Any]]:
        first = of_blocks[0]
        invars = [
            self._operand([equation.invars[at] for equation in of_blocks])
            for at in range(len(first.invars))
        ]
        equation, step = first.replace(invars=invars), steps[0]
        if first.primitive.name not in OPENED:
            return equation, steps
        slots = zip(*map(_slots, of_blocks), strict=True)
        fresh = [None if _are_same(atoms) else self._each(atoms) for atoms in slots]
        if not any(variable is not None for variable in fresh):
            return equation, steps
        equation, step = _lifted(equation, step, iter(fresh))
        # The others' plans have their sites at the same places.
        return equation, [step, *steps[1:]]

    def _operand(self, atoms: list[Any]) -> Any:
        """What stands in the body for an operand of all blocks."""
        if not shims.is_variable(atoms[0]):
            return atoms[0] if _are_same(atoms) else self._each(atoms)
        place = self._line.place_of(self._run, 1, atoms[1])
        if place is not None and place[0] == 0:
            return atoms[0]
        if place is not None:
            made = self._line.equations[self._run.start + place[1]].outvars[place[2]]
            return self._input((made, atoms[0]), atoms[0], self._carry, made)
        if all(atom is atoms[0] for atom in atoms):
            return self._input(atoms[0], atoms[0], self._share)
        return self._each(atoms)

    def _each(self, atoms: Sequence[Any]) -> Any:
        key = tuple(map(id, atoms))
        return self._input(key, atoms[0], self._take, tuple(atoms))

    def _input(self, key: Hashable, like: Any, add, *more) -> Any:
        if key not in self._inputs:
            self._inputs[key] = variable = core.Var(like.aval)
            self.stands_for[variable] = like
            add(variable, like, *more)
        return self._inputs[key]

    def _share(self, variable, atom):
        self.shared.append(atom)
        self._of_shared.append(variable)

    def _carry(self, variable, atom, made):
        self.carried.append(atom)
        self._of_carried.append(variable)
        self._handed_on.append(made)

    def _take(self, variable, _, atoms):
        self.each.append(atoms)
        self._of_each.append(variable)

    def _results(self, opened: Any) -> list[Any]:
        """The block's variables that are stacked, since some are read behind the run."""
        line, run = self._line, self._run
        inside = set(line.order[run.start : run.stop])
        behind = [equation for i, equation in enumerate(opened.eqns) if i not in inside]
        read = {
            atom
            for atoms in (*(equation.invars for equation in behind), opened.outvars)
            for atom in atoms
            if shims.is_variable(atom)
        }
        handed_on = {made: at for at, made in reversed(list(enumerate(self._handed_on)))}
        stacked: dict[Any, int] = {}
        self.results: list[tuple[Any, int, int | None]] = []
        for at in range(run.start, run.stop):
            block, place = divmod(at - run.start, run.period)
            firsts = line.equations[run.start + place].outvars
            for variable, made in zip(line.equations[at].outvars, firsts, strict=True):
                if variable not in read:
                    continue
                if block == run.count - 1 and made in handed_on:
                    self.results.append((variable, handed_on[made], None))
                else:
                    position = stacked.setdefault(made, len(self._handed_on) + len(stacked))
                    self.results.append((variable, position, block))
        return list(stacked)


def _are_same(atoms: Sequence[Any]) -> bool:
    """Whether literals, or constants in their place, have the same value."""
    first = atoms[0].val
    if all(atom.val is first for atom in atoms):
        return True
    if any(
        jnp.issubdtype(atom.aval.dtype, jax.dtypes.extended) or isinstance(atom.val, Tracer)
        for atom in atoms
    ):
        return False
    return len({np.asarray(atom.val, atom.aval.dtype).tobytes() for atom in atoms}) == 1


@dataclasses.dataclass(frozen=True)
class _Constant:
    """A constant of an inner jaxpr, in the place of a literal."""

    val: Any
    aval: Any


def _slots(equation: Any) -> list[Any]:
    """The literals and constants in an equation's jaxpr, in the order that `_lifted` takes them."""
    opened, consts = shims.open_jaxpr(equation.params["jaxpr"])
    found = [_Constant(value, one.aval) for value, one in zip(consts, opened.constvars)]
    for inner in opened.eqns:
        found += [atom for atom in inner.invars if not shims.is_variable(atom)]
        if inner.primitive.name in OPENED:
            found += _slots(inner)
    return found


def _lifted(equation: Any, step: Any, fresh: Iterator[Any]) -> tuple[Any, Any]:
    """An equation with some of the literals in its jaxpr as operands, and the plan for it.

    Args:
      equation: a call of one jaxpr.
      step: what is planned for it.
      fresh: for each of `_slots` a variable to read in its place, or None.
    """
    opened, consts = shims.open_jaxpr(equation.params["jaxpr"])
    extra: dict[Any, Any] = {}  # by the variable inside, that outside
    kept = []
    for variable, const in zip(opened.constvars, consts, strict=True):
        outside = next(fresh)
        if outside is None:
            kept.append((variable, const))
        else:
            extra[variable] = outside
    equations, steps = [], dict(step.plans[0].equations) if step is not None else {}
    for index, inner in enumerate(opened.eqns):
        given = [atom if shims.is_variable(atom) else next(fresh) or atom for atom in inner.invars]
        extra |= {atom: atom for atom, old in zip(given, inner.invars) if atom is not old}
        inner = inner.replace(invars=given)
        if inner.primitive.name in OPENED:
            own, planned = _lifted(inner, steps.get(index), fresh)
            added = own.invars[len(inner.invars) :]
            if added:
                extra |= {atom: atom for atom in added}
                inner, steps[index] = own, planned
        equations.append(inner)
    if not extra:
        return equation, step
    block = Block(
        tuple(variable for variable, _ in kept),
        tuple(const for _, const in kept),
        (*opened.invars, *extra),
        tuple(equations),
        tuple(opened.outvars),
    )
    params = {**equation.params, "jaxpr": block}
    if "in_shardings" in params:
        params["in_shardings"] = (*params["in_shardings"], *[None] * len(extra))
    lifted = equation.replace(invars=[*equation.invars, *extra.values()], params=params)
    flow = flow_of(lifted)
    assert flow is not None  # of `OPENED`
    return lifted, Entered(flow, (Plan(steps),))


def _joined(
    of_blocks: Sequence[Any], loop: int, count: int, depth: int, names: dict[str, tuple[str, ...]]
) -> Any:
    """What is planned for an equation of all blocks, as of one in a loop.

    Args:
      of_blocks: the plans, in the order of the blocks.
      loop: the loop's identity.
      count: of blocks.
      depth: how many loops are around it.
      names: gets the sites' names by their common one.
    """
    first = of_blocks[0]
    if isinstance(first, Site):
        name = joined_name([site.name for site in of_blocks])
        names[name] = tuple(site.name for site in of_blocks)
        joined = {of_first[0]: one for one, of_first in names.items()}
        loops = (*first.loops[:depth], (loop, count), *first.loops[depth:])
        return dataclasses.replace(
            first,
            name=name,
            loops=loops,
            stacked_over=first.stacked_over | {loop},
            # What another block cast is out of reach.
            cast_with=tuple((by, joined[one]) for by, one in first.cast_with if one in joined),
        )
    plans = []
    for number, plan in enumerate(first.plans):
        equations = {
            # What was entered for its literals alone has no plan in the other blocks.
            index: _joined(
                [step, *(one.plans[number].equations.get(index) for one in of_blocks[1:] if one)],
                loop,
                count,
                depth,
                names,
            )
            for index, step in plan.equations.items()
        }
        plans.append(Plan(equations))
    return dataclasses.replace(first, plans=tuple(plans))


def _lead(block: Block, steps: dict[int, Any]) -> None:
    """Has the sites of a block that read the same, in each block, cast it once."""
    readers = Readers()
    for place, equation in enumerate(block.eqns):
        if isinstance(step := steps.get(place), Site):
            steps[place] = dataclasses.replace(step, cast_with=readers.leaders(equation, step))
        readers.pass_by(equation)


def _kinds_inside(opened: Any, plan: Plan, kinds: Kinds) -> dict[Any, frozenset]:
    """By variable of a jaxpr, how that is held which it is computed from, if not as plain arrays."""
    found = dict(kinds)
    for index, equation in enumerate(opened.eqns):
        if isinstance(plan.equations.get(index), Site) or not found:
            continue
        held = [found[a] for a in equation.invars if shims.is_variable(a) and a in found]
        if held:
            found.update((variable, frozenset().union(*held)) for variable in equation.outvars)
    return found
