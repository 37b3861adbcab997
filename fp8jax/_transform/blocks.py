"""The first block of a run as the body of a loop, and the plans of all blocks as its plan."""

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from fp8jax import _shims
from fp8jax._transform.alike import Block
from fp8jax._transform.analysis import Entered, Plan
from fp8jax._transform.common import Readers
from fp8jax._transform.control_flow import Flow, Kind, flow_of, is_extendable
from fp8jax._transform.joined_names import joined_name
from fp8jax._transform.runs import Line, Run
from fp8jax._transform.sites import Site


class Template:
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
        if not is_extendable(first):
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
        if not _shims.is_variable(atoms[0]):
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
            if _shims.is_variable(atom)
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
    opened, consts = _shims.open_jaxpr(equation.params["jaxpr"])
    found = [_Constant(value, one.aval) for value, one in zip(consts, opened.constvars)]
    for inner in opened.eqns:
        found += [atom for atom in inner.invars if not _shims.is_variable(atom)]
        if is_extendable(inner):
            found += _slots(inner)
    return found


def _lifted(equation: Any, step: Any, fresh: Iterator[Any]) -> tuple[Any, Any]:
    """An equation with some of the literals in its jaxpr as operands, and the plan for it.

    Args:
      equation: a call of one jaxpr.
      step: what is planned for it.
      fresh: for each of `_slots` a variable to read in its place, or None.
    """
    opened, consts = _shims.open_jaxpr(equation.params["jaxpr"])
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
        given = [atom if _shims.is_variable(atom) else next(fresh) or atom for atom in inner.invars]
        extra |= {atom: atom for atom, old in zip(given, inner.invars) if atom is not old}
        inner = inner.replace(invars=given)
        if is_extendable(inner):
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
    assert flow is not None  # being extendable
    return lifted, Entered(flow, (Plan(steps),))


def joined_step(
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
            index: joined_step(
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


def lead(block: Block, steps: dict[int, Any]) -> None:
    """Has the sites of a block that read the same, in each block, cast it once."""
    readers = Readers()
    for place, equation in enumerate(block.eqns):
        if isinstance(step := steps.get(place), Site):
            steps[place] = dataclasses.replace(step, cast_with=readers.leaders(equation, step))
        readers.pass_by(equation)
