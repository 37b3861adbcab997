"""Evaluates a jaxpr with its selected sites in FP8, as the plan says.

Everything without a selected site inside is bound as it was. An equation with sites inside is
traced again through the public function that made it (`jax.jit`, `jax.lax.scan`, ...), with the
scales of its sites as one more operand.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fp8jax import _shims
from fp8jax._observe import (
    first_lane,
    has_lanes,
    merge_over_axis,
    share_over_branches,
    tap,
)
from fp8jax._site_exponents import SiteExponents
from fp8jax._transform.ahead import (
    Aheads,
    cast_before,
    observe_before,
    own_ahead,
    with_seen_before,
)
from fp8jax._transform.analysis import Entered, Plan
from fp8jax._transform.common import Casts
from fp8jax._transform.control_flow import Kind, flow_of
from fp8jax._transform.follow import check_none_coded, follow, has_coded, values_of
from fp8jax._transform.loops import names_stacked_over, scales_of_scan
from fp8jax._transform.mode import Mode
from fp8jax._transform.names import PRODUCT, context_of, site_scope
from fp8jax._transform.products import product_of, read_rows
from fp8jax._transform.repeats import Repeat
from fp8jax._transform.sharing import merge_observed_over_devices, share_scales_over_devices
from fp8jax._transform.sites import Site
from fp8jax.ops._coded import run_coded
from fp8jax.ops._operands import Ahead, observe_ahead, observe_operands
from fp8jax.ops._ready import Ready, own_scales
from fp8jax.ops._run import run
from fp8jax.ops._unquantized import observed_alone

GivenScales = Mapping[str, SiteExponents | Ready]


def evaluate(
    jaxpr: Any,
    plan: Plan,
    scales: GivenScales,
    arguments: Sequence[Any],
    mode: Mode,
    ahead: Aheads | None = None,
) -> tuple[list[Any], dict[str, SiteExponents]]:
    """The outputs of a jaxpr, closed or open, and what its sites observed (nothing unless
    `mode.observing`).

    Args:
      jaxpr: the jaxpr that `plan` was made for.
      plan: its selected sites.
      scales: by site name, those of all sites inside that have any; without the axes of the scans
        entered so far.
      arguments: a value for each input.
      mode: how sites run.
      ahead: by site name, weights that were cast before.
    """
    ahead = dict(ahead or {})
    opened, consts = _shims.open_jaxpr(jaxpr)
    in_common = Casts([step for step in plan.equations.values() if isinstance(step, Site)])
    values = dict(zip((*opened.constvars, *opened.invars), (*consts, *arguments), strict=True))
    observations: dict[str, SiteExponents] = {}

    def read(atoms):
        return [values[atom] if _shims.is_variable(atom) else atom.val for atom in atoms]

    in_order = range(len(opened.eqns))
    for index in in_order if plan.schedule is None or mode.unrolled else plan.schedule:
        if isinstance(index, Repeat):
            found, observed = _run_repeat(index, scales, values, mode, ahead)
            values.update(found)
            observations.update(observed)
            continue
        equation = opened.eqns[index]
        operands = read(equation.invars)
        step = plan.equations.get(index)
        with context_of(equation):
            if step is None:
                outputs = (
                    _follow(equation, operands, mode)
                    if has_coded(operands)
                    else _shims.bind(equation, operands)
                )
            elif isinstance(step, Entered):
                enter = _ENTER[step.flow.kind]
                outputs, observed = enter(step, scales, operands, mode, ahead)
                observations.update(observed)
            else:
                run_site = _run_site if mode.watch is None else mode.watch(_run_site)
                before = _cast_before(equation, step, scales, operands, mode, ahead, in_common)
                outputs, observed = run_site(equation, step, scales, operands, mode, before)
                observations.update(observed)
        values.update(zip(equation.outvars, outputs, strict=True))
    return read(opened.outvars), observations


def _follow(equation, operands, mode: Mode):
    """The outputs of an equation that reads weights held as codes, and has no selected product."""

    def run():
        flow = flow_of(equation)
        if flow is None:
            return follow(equation, operands)
        if flow.kind == Kind.CLOSED:
            return flow.again(check_none_coded(operands, f"read by {flow.why}"))
        step = Entered(flow, tuple(Plan({}) for _ in flow.bodies))
        return _ENTER[flow.kind](step, {}, operands, mode, {})[0]

    return mode.attempt(run, operands, functools.partial(_shims.bind, equation))


def _cast_before(
    equation, site: Site, scales: GivenScales, operands, mode: Mode, ahead: Aheads, in_common: Casts
) -> dict[str, Ahead]:
    """The operands of a site that were cast or observed before, or are cast for others too."""
    if not mode.quantized or has_coded(operands):
        return {}
    own = {site.weight_operand: ahead[site.name]} if site.name in ahead else {}
    return in_common.of(equation, site, operands, scales.get(site.name), own)


def _run_site(
    equation, site: Site, scales: GivenScales, operands, mode: Mode, before: dict[str, Ahead]
):
    operands, of_result = read_rows(equation, operands)
    lhs, rhs, *extra = operands
    given = scales.get(site.name)
    own = own_scales(given)
    if has_coded(operands):
        product = product_of(equation, site, lhs, rhs)
        with jax.named_scope(PRODUCT), jax.named_scope(site_scope(site.name)):
            out, seen = run_coded(
                product, lhs, rhs, tuple(extra), given, mode.quantized, mode.observing
            )
        return [of_result(out)], {} if seen is None else {site.name: seen}
    observed = (
        {site.name: observe_operands(lhs, rhs, own)} if mode.observing and own is not None else {}
    )
    if not mode.quantized:
        with jax.named_scope(PRODUCT):
            (out,) = _shims.bind(equation, operands)
            out = out if own is None else observed_alone(out, lhs, rhs, own)
        return [of_result(out)], observed
    product = product_of(equation, site, lhs, rhs)
    weight = site.weight
    if weight is not None and weight not in before and own is not None and has_lanes(own, 0):
        # Weights have no lanes: they may be whole on each device, and would be divided for the sake
        # of their amaxes alone.
        operand = operands[("lhs", "rhs").index(weight)]
        seen = observe_ahead(operand, first_lane(own), weight)
        before = before if seen is None else {**before, weight: seen}
    with jax.named_scope(PRODUCT), jax.named_scope(site_scope(site.name)):
        out: Any = run(product, lhs, rhs, tuple(extra), given, before)
    return [of_result(out)], observed


def _own(step: Entered, scales: GivenScales) -> dict[str, SiteExponents]:
    return {name: own_scales(node) for name, node in _given(step, scales).items()}


def _given(step: Entered, scales: GivenScales) -> GivenScales:
    """The same, with what products read of them: for what hands them on to sites that run as often
    as it does.
    """
    return {site.name: scales[site.name] for site in step.sites() if site.has_scales}


def _run_call(step: Entered, scales, operands, mode, ahead):
    flow, (plan,) = step.flow, step.plans

    def inner(given, *arguments):
        scales, ahead = given
        return evaluate(flow.bodies[0], plan, scales, arguments, mode, ahead)

    given = _given(step, scales), own_ahead(step, ahead)
    return flow.again(inner, **flow.options)(given, *operands)


def _run_loop(step: Entered, scales, operands, mode, ahead):
    flow, (plan,) = step.flow, step.plans
    _, consts, carry, scanned = flow.parts(operands)
    carry = mode.allow(carry, "carried through a scan")
    scanned = mode.layers_of(scanned)
    own = _own(step, scales)
    ahead = own_ahead(step, ahead)
    if mode.quantized:
        ahead = cast_before(step, own, operands, ahead)
        ahead = observe_before(step, own, operands, ahead)
        own, ahead = with_seen_before(step, own, ahead)
    own = {name: node.replace(whole=None) for name, node in own.items()}
    slices, scales_of = scales_of_scan(step, scales, own, flow.options["length"])
    stacked_names = names_stacked_over(step)
    sliced = {name: cast for name, cast in ahead.items() if name in stacked_names}
    whole = {name: cast for name, cast in ahead.items() if name not in stacked_names}

    def body(carry, slices):
        of_scales, sliced, scanned = slices
        inputs = [*consts, *carry, *scanned]
        outputs, observed = evaluate(
            flow.bodies[0], plan, scales_of(of_scales), inputs, mode, whole | sliced
        )
        outputs = mode.allow(outputs, "an output of a scan's iteration")
        return outputs[: flow.num_carry], (outputs[flow.num_carry :], observed)

    carry, (results, observed) = flow.again(body, carry, (slices, sliced, scanned), **flow.options)
    merged = {
        name: node if name in stacked_names else merge_over_axis(node)
        for name, node in observed.items()
    }
    return [*carry, *results], merged


def _run_repeat(repeat: Repeat, scales: GivenScales, values, mode: Mode, ahead: Aheads):
    """The values that blocks evaluated as one scan leave behind, and what their sites observed."""
    own, cast = repeat.scales(scales), repeat.ahead(ahead)
    outputs, observed = _run_loop(repeat.step, own, repeat.operands(values), mode, cast)
    return repeat.outputs(outputs), repeat.observed(observed)


def _run_branches(step: Entered, scales, operands, mode, ahead):
    index, *rest = operands
    own = _own(step, scales)

    def branch(jaxpr, plan):
        def run(scales, *arguments):
            outputs, observed = evaluate(jaxpr, plan, scales, arguments, mode, ahead)
            outputs = mode.allow(outputs, "an output of a conditional's branch")
            # A branch that is not taken observes nothing, which is 0.
            nothing = jax.tree.map(jnp.zeros_like, scales) if mode.observing else {}
            return outputs, nothing | observed

        return run

    branches = list(map(branch, step.flow.bodies, step.plans))
    return step.flow.again(index, branches, share_over_branches(own, index), *rest)


def _run_custom_jvp(step: Entered, scales, operands, mode, ahead):
    """The primal in FP8, the tangent by the user's own rule, which knows better than a product's
    derivative.

    That rule has no backward pass to carry amaxes out, so a `tap` on the outputs does. No gradient
    is cast.
    """
    flow, (plan,) = step.flow, step.plans
    observing = dataclasses.replace(mode, observing=True)

    @jax.custom_jvp
    def primal(scales, *arguments):
        return evaluate(flow.bodies[0], plan, scales, arguments, observing)

    @primal.defjvp
    def _(primals, tangents):
        (scales, *arguments), (_, *argument_tangents) = primals, tangents
        outputs, observed = primal(scales, *arguments)
        given = {n: a for n, a in enumerate(arguments) if not has_coded([a])}
        values = dict(enumerate(values_of(arguments)))  # The user's rule knows no codes.
        bind = lambda given: flow.again(list((values | given).values()))
        of_given = {n: argument_tangents[n] for n in given}
        _, output_tangents = jax.jvp(bind, (given,), (of_given,))
        return (outputs, observed), (output_tangents, jax.tree.map(jnp.zeros_like, observed))

    own = _own(step, scales)
    outputs, observed = primal(own, *operands)
    return tap(outputs, own, observed), observed if mode.observing else {}


def _run_while_loop(step: Entered, scales, operands, mode, ahead):
    flow, (plan,) = step.flow, step.plans
    of_condition, consts, carry, _ = flow.parts(operands)
    carry = mode.allow(carry, "carried through a while loop")
    # A while loop has no reverse mode, and none is asked for: its observations come by `observe`
    # alone.
    own = jax.lax.stop_gradient(_own(step, scales))
    nothing = jax.tree.map(jnp.zeros_like, own) if mode.observing else {}
    ahead = own_ahead(step, ahead)
    if mode.quantized:
        ahead = cast_before(step, own, operands, ahead)

    def condition(state):
        inputs = [*of_condition, *state[0]]
        return evaluate(flow.condition, Plan({}), {}, inputs, mode)[0][0]

    def body(state):
        carry, so_far = state
        outputs, observed = evaluate(flow.bodies[0], plan, own, [*consts, *carry], mode, ahead)
        outputs = mode.allow(outputs, "an output of a while loop's iteration")
        return outputs, jax.tree.map(jnp.maximum, so_far, observed)

    return flow.again(condition, body, (carry, nothing))


def _run_custom_vjp(step: Entered, scales, operands, mode, ahead):
    """The forward rule in FP8, the backward rule as the user wrote it; it carries the amaxes of the
    forward pass out.
    """
    rule, (plan,) = step.flow.rule, step.plans

    @jax.custom_vjp
    def function(scales, *operands):
        outputs, observed = evaluate(rule.jaxpr, plan, scales, operands, mode)
        return mode.allow(outputs[: rule.num_outputs], "returned by a custom_vjp"), observed

    def forward(scales, *operands):
        outputs, observed = evaluate(
            rule.jaxpr, plan, scales, operands, dataclasses.replace(mode, observing=True)
        )
        return (outputs[: rule.num_outputs], observed if mode.observing else {}), (
            outputs[rule.num_outputs :],
            observed,
        )

    def backward(residuals, cotangents):
        kept, observed = residuals
        of_operands = rule.backward(values_of(kept), cotangents[0])  # it knows no codes
        return observed, *(
            None if has_coded([operand]) else cotangent
            for operand, cotangent in zip(operands, of_operands, strict=True)
        )

    function.defvjp(forward, backward)
    return function(_own(step, scales), *operands)


def _run_over_devices(step: Entered, scales, operands, mode, ahead):
    flow, (plan,), sites = step.flow, step.plans, step.sites()
    axes, checked = flow.options["axis_names"], flow.options["check_vma"]

    def inner(scales, *operands):
        shared = share_scales_over_devices(sites, scales, axes, checked)
        outputs, observed = evaluate(flow.bodies[0], plan, shared, operands, mode)
        outputs = mode.allow(outputs, "an output of a shard_map")
        return outputs, merge_observed_over_devices(sites, observed, axes)

    operands, in_specs = mode.with_specs(operands, flow.options["in_specs"], flow.options["mesh"])
    specs = {
        "in_specs": (PartitionSpec(), *in_specs),
        "out_specs": (flow.options["out_specs"], PartitionSpec()),
    }
    return flow.again(inner, **{**flow.options, **specs})(_own(step, scales), *operands)


_ENTER: dict[Kind, Callable] = {
    Kind.CALL: _run_call,
    Kind.RECOMPUTED: _run_call,
    Kind.BRANCHES: _run_branches,
    Kind.LOOP: _run_loop,
    Kind.WHILE: _run_while_loop,
    Kind.DEVICES: _run_over_devices,
    Kind.CUSTOM_JVP: _run_custom_jvp,
    Kind.CUSTOM_VJP: _run_custom_vjp,
}
