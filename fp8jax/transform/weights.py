"""Where a site's weight comes from, and whether it can be had in front of the loops around the
site.

A weight operand is computed from weights alone, by a few equations at most: a change of dtype, a
transposition, the slice that a scan takes. These are evaluated in front of the loop, on whole
stacks of layers by `vmap`.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax

from fp8jax import shims
from fp8jax.transform.analysis import Entered, Plan
from fp8jax.transform.sites import Site

# Equations whose inner sites can be handed what was cast outside, and where the inputs of their
# jaxprs stand among their operands. Custom rules and shard_maps keep their casts inside.
_FIRST_INPUT = {
    "jit": lambda _: 0,
    "closed_call": lambda _: 0,
    "core_call": lambda _: 0,
    "remat2": lambda _: 0,
    "checkpoint": lambda _: 0,
    "scan": lambda _: 0,
    "cond": lambda _: 1,
    "while": lambda params: params["cond_nconsts"],
}


class _NotAhead(Exception):
    """An operand can't be computed in front of a loop."""


def sites_to_cast(equation, step: Entered, already: Collection[str]) -> dict[str, Site]:
    """Of the sites inside a loop, by name, those whose weights are to be cast in front of it, and
    aren't already.

    Where the loop doesn't change a weight, that spares all casts but one. Where each iteration has
    its own, what a backward pass would keep of each is made at once; not where it would keep
    nothing, for a rematerialization, or not run at all. Nor on several devices, where each
    iteration gathers what it multiplies.
    """
    each = shims.devices_at_hand() == 1
    return {
        site.name: site
        for site in step.sites()
        if site.weight is not None
        and site.name not in already
        and (
            step.loop not in site.stacked_over
            or each
            and not is_inside(("remat2", "checkpoint", "cond"), equation, step, site.name)
        )
    }


def is_inside(kinds: Collection[str], equation, step: Entered, name: str) -> bool:
    """Whether a site lies in an equation of these primitives, which is `equation` or in it."""
    if equation.primitive.name in kinds:
        return True
    jaxpr, plan = next(
        (jaxpr, plan)
        for jaxpr, plan in zip(shims.jaxprs_of(equation), step.plans, strict=True)
        if any(site.name == name for site in plan.sites())
    )
    index, inner = next(
        (index, inner) for index, inner in plan.equations.items() if _leads_to(inner, name)
    )
    return not isinstance(inner, Site) and is_inside(
        kinds, shims.open_jaxpr(jaxpr)[0].eqns[index], inner, name
    )


def weight_operand(equation, step: Entered, operands: Sequence[Any], name: str) -> jax.Array | None:
    """The weight operand of a site inside a loop, the same in each of its iterations.

    Args:
      equation: the loop.
      step: its plan.
      operands: its own operands.
      name: of the site.

    Returns:
      An array with the leading axes of the scans inside the loop that the site's weights are
      stacked over; None where it can't be had in front of the loop.
    """
    try:
        return _inside(equation, step, operands, name)
    except _NotAhead:
        return None


def equation_of(equation, step: Entered, name: str) -> Any:
    """The equation of a site inside another equation."""
    for jaxpr, plan in zip(shims.jaxprs_of(equation), step.plans, strict=True):
        for index, inner in plan.equations.items():
            if _leads_to(inner, name):
                found = shims.open_jaxpr(jaxpr)[0].eqns[index]
                return found if isinstance(inner, Site) else equation_of(found, inner, name)
    raise KeyError(name)


def _leads_to(step: Entered | Site, name: str) -> bool:
    return (
        step.name == name
        if isinstance(step, Site)
        else any(site.name == name for site in step.sites())
    )


def _inside(equation, step: Entered, operands, name: str) -> jax.Array:
    """The weight operand of a site inside an equation; operands that are None aren't known."""
    kind = equation.primitive.name
    if kind not in _FIRST_INPUT:
        raise _NotAhead
    inputs = operands[_FIRST_INPUT[kind](equation.params) :]
    jaxpr, plan = next(
        (jaxpr, plan)
        for jaxpr, plan in zip(shims.jaxprs_of(equation), step.plans, strict=True)
        if any(site.name == name for site in plan.sites())
    )
    if kind not in ("scan", "while"):
        return _gather(jaxpr, plan, inputs, name)
    num_consts, num_carry = (
        shims.scan_counts(equation.params)
        if kind == "scan"
        else (equation.params["body_nconsts"], len(equation.outvars))
    )
    first_scanned = num_consts + num_carry
    shared = [*inputs[:first_scanned], *(None for _ in inputs[first_scanned:])]
    opened, _ = shims.open_jaxpr(jaxpr)
    for index in range(
        num_consts, first_scanned
    ):  # What an iteration hands on changed, no one can know before.
        if opened.outvars[index - num_consts] is not opened.invars[index]:
            shared[index] = None
    (site,) = (site for site in plan.sites() if site.name == name)
    if step.loop not in site.stacked_over:
        return _gather(jaxpr, plan, shared, name)
    _, variables = _backward_slice(jaxpr, plan, name)
    sliced = [
        index
        for index, variable in enumerate(opened.invars)
        if index >= first_scanned and variable in variables
    ]
    if not sliced or any(inputs[index] is None for index in sliced):
        raise _NotAhead

    def of_iteration(*slices):
        given = dict(zip(sliced, slices))
        return _gather(
            jaxpr, plan, [given.get(index, value) for index, value in enumerate(shared)], name
        )

    return jax.vmap(of_iteration)(*(inputs[index] for index in sliced))


def _backward_slice(jaxpr: Any, plan: Plan, name: str) -> tuple[set[int], set[Any]]:
    """The equations, by index, and the variables that a site's weight operand is computed from."""
    opened, _ = shims.open_jaxpr(jaxpr)
    equations, variables = set(), set()

    def need(atoms):
        variables.update(atom for atom in atoms if shims.is_variable(atom))

    for index in reversed(range(len(opened.eqns))):
        equation, step = opened.eqns[index], plan.equations.get(index)
        if any(variable in variables for variable in equation.outvars):
            if step is not None or equation.effects:
                raise _NotAhead
            equations.add(index)
            need(equation.invars)
        if step is None or not _leads_to(step, name):
            continue
        if isinstance(step, Site):
            need([_weight_atom(equation, step)])
            continue
        if equation.primitive.name not in _FIRST_INPUT:
            raise _NotAhead
        outer = equation.invars[_FIRST_INPUT[equation.primitive.name](equation.params) :]
        for inner, inner_plan in zip(shims.jaxprs_of(equation), step.plans, strict=True):
            if any(site.name == name for site in inner_plan.sites()):
                _, inner_variables = _backward_slice(inner, inner_plan, name)
                need(
                    atom
                    for atom, variable in zip(outer, shims.open_jaxpr(inner)[0].invars)
                    if variable in inner_variables
                )
    return equations, variables


def _gather(jaxpr: Any, plan: Plan, inputs: Sequence[Any], name: str) -> Any:
    """The weight operand of a site in a jaxpr whose inputs are known, or None where they aren't."""
    opened, consts = shims.open_jaxpr(jaxpr)
    equations, variables = _backward_slice(jaxpr, plan, name)
    values = dict(zip((*opened.constvars, *opened.invars), (*consts, *inputs), strict=True))
    if any(values.get(variable, 0) is None for variable in variables):
        raise _NotAhead

    def read(atom):
        return values.get(atom) if shims.is_variable(atom) else atom.val

    for index, equation in enumerate(opened.eqns):
        step = plan.equations.get(index)
        if index in equations:
            with equation.ctx.manager:
                values.update(
                    zip(
                        equation.outvars,
                        shims.bind(equation, [read(atom) for atom in equation.invars]),
                    )
                )
        if step is not None and _leads_to(step, name):
            if isinstance(step, Site):
                return read(_weight_atom(equation, step))
            return _inside(equation, step, [read(atom) for atom in equation.invars], name)
    raise KeyError(name)


def _weight_atom(equation, site: Site):
    return equation.invars[("lhs", "rhs").index(site.weight)]
