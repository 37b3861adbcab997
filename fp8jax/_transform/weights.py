"""Where a site's weight comes from, and whether it can be had in front of the loops around the
site.

A weight operand is computed from weights alone, by a few equations at most: a change of dtype, a
transposition, the slice that a scan takes. These are evaluated in front of the loop, on whole
stacks of layers by `vmap`.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax

from fp8jax import _shims
from fp8jax._transform.analysis import Entered, Plan, leads_to
from fp8jax._transform.control_flow import Flow, Kind
from fp8jax._transform.sites import Site
from fp8jax.ops._cast import Codes


class _NotAhead(Exception):
    """An operand can't be computed in front of a loop."""


def sites_to_cast(step: Entered, already: Collection[str]) -> dict[str, Site]:
    """Of the sites inside a loop, by name, those whose weights are to be cast in front of it, and
    aren't already.

    Where the loop doesn't change a weight, that spares all casts but one. Where each iteration has
    its own, what a backward pass would keep of each is made at once; not where it would keep
    nothing, for a rematerialization, or not run at all. Nor on several devices, where each
    iteration gathers what it multiplies.
    """
    each = _shims.devices_at_hand() == 1
    return {
        site.name: site
        for site in step.sites()
        if site.weight is not None
        and site.name not in already
        and (
            step.loop not in site.stacked_over
            or each
            and not is_inside((Kind.RECOMPUTED, Kind.BRANCHES), step, site.name)
        )
    }


def is_inside(kinds: Collection[Kind], step: Entered, name: str) -> bool:
    """Whether a site lies in a flow of these kinds, which is `step` or in it."""
    return any(flow.kind in kinds for flow, _ in _way(step, name))


def equation_of(step: Entered, name: str) -> Any:
    """The equation of a site inside another equation."""
    *_, (_, equation) = _way(step, name)
    return equation


def _way(step: Site | Entered, name: str) -> Iterator[tuple[Flow, Any]]:
    """The flows that a site lies in, from `step` inwards, each with its equation that leads on."""
    while isinstance(step, Entered):
        body, plan = step.leading_to(name)
        index = plan.leading_to(name)
        yield step.flow, _shims.open_jaxpr(body)[0].eqns[index]
        step = plan.equations[index]


def weight_operand(step: Entered, operands: Sequence[Any], name: str) -> jax.Array | None:
    """The weight operand of a site inside a loop, the same in each of its iterations.

    Args:
      step: the loop.
      operands: its own operands.
      name: of the site.

    Returns:
      An array with the leading axes of the scans inside the loop that the site's weights are
      stacked over; None where it can't be had in front of the loop.
    """
    # Of a weight that is codes there is nothing to cast.
    operands = [None if isinstance(operand, Codes) else operand for operand in operands]
    try:
        return _inside(step, operands, name)
    except _NotAhead:
        return None


def _inside(step: Entered, operands, name: str) -> jax.Array:
    """The weight operand of a site inside an equation; operands that are None aren't known."""
    if not step.flow.takes_casts:
        raise _NotAhead
    body, plan = step.leading_to(name)
    inputs = operands[step.flow.num_own :]
    if not step.flow.is_loop:
        return _gather(body, plan, inputs, name)
    opened, _ = _shims.open_jaxpr(body)
    own, consts, carry, scanned = step.flow.parts(operands)
    _, _, carried, slices = step.flow.parts([*own, *opened.invars])
    # What an iteration hands on changed, no one can know before.
    carry = [
        value if before is after else None
        for value, before, after in zip(carry, carried, opened.outvars)
    ]
    shared = [*consts, *carry, *(None for _ in scanned)]
    (site,) = (site for site in plan.sites() if site.name == name)
    if step.loop not in site.stacked_over:
        return _gather(body, plan, shared, name)
    _, variables = _backward_slice(body, plan, name)
    sliced = [
        index
        for index, variable in enumerate(slices, len(consts) + len(carry))
        if variable in variables
    ]
    if not sliced or any(inputs[index] is None for index in sliced):
        raise _NotAhead

    def of_iteration(*slices):
        given = dict(zip(sliced, slices))
        values = [given.get(index, value) for index, value in enumerate(shared)]
        return _gather(body, plan, values, name)

    return jax.vmap(of_iteration)(*(inputs[index] for index in sliced))


def _backward_slice(jaxpr: Any, plan: Plan, name: str) -> tuple[set[int], set[Any]]:
    """The equations, by index, and the variables that a site's weight operand is computed from."""
    opened, _ = _shims.open_jaxpr(jaxpr)
    equations, variables = set(), set()

    def need(atoms):
        variables.update(atom for atom in atoms if _shims.is_variable(atom))

    for index in reversed(range(len(opened.eqns))):
        equation, step = opened.eqns[index], plan.equations.get(index)
        if any(variable in variables for variable in equation.outvars):
            if step is not None or equation.effects:
                raise _NotAhead
            equations.add(index)
            need(equation.invars)
        if step is None or not leads_to(step, name):
            continue
        if isinstance(step, Site):
            need([_weight_atom(equation, step)])
            continue
        if not step.flow.takes_casts:
            raise _NotAhead
        body, inner_plan = step.leading_to(name)
        _, inner_variables = _backward_slice(body, inner_plan, name)
        inputs = equation.invars[step.flow.num_own :]
        pairs = zip(inputs, _shims.open_jaxpr(body)[0].invars, strict=True)
        need(atom for atom, variable in pairs if variable in inner_variables)
    return equations, variables


def _gather(jaxpr: Any, plan: Plan, inputs: Sequence[Any], name: str) -> Any:
    """The weight operand of a site in a jaxpr whose inputs are known, or None where they aren't."""
    opened, consts = _shims.open_jaxpr(jaxpr)
    equations, variables = _backward_slice(jaxpr, plan, name)
    values = dict(zip((*opened.constvars, *opened.invars), (*consts, *inputs), strict=True))
    if any(values.get(variable, 0) is None for variable in variables):
        raise _NotAhead

    def read(atom):
        return values.get(atom) if _shims.is_variable(atom) else atom.val

    for index, equation in enumerate(opened.eqns):
        step = plan.equations.get(index)
        if index in equations:
            with equation.ctx.manager:
                outputs = _shims.bind(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, outputs, strict=True))
        if step is not None and leads_to(step, name):
            if isinstance(step, Site):
                return read(_weight_atom(equation, step))
            return _inside(step, [read(atom) for atom in equation.invars], name)
    raise KeyError(name)


def _weight_atom(equation, site: Site):
    return equation.invars[("lhs", "rhs").index(site.weight)]
