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
from jax.extend import core
from jax.sharding import PartitionSpec

from fp8jax import shims
from fp8jax.observe import (
    first_lane,
    has_lanes,
    merge_over_axis,
    share_over_branches,
    tap,
)
from fp8jax.ops.coded import run_coded
from fp8jax.ops.operands import casts_of, is_cast, observe_ahead, observe_operands
from fp8jax.ops.ready import Ready, own_scales
from fp8jax.ops.run import run
from fp8jax.ops.unquantized import observed_alone
from fp8jax.state import SiteScales
from fp8jax.transform.ahead import (
    Aheads,
    cast_before,
    cast_weight,
    exponent_in_common,
    observe_before,
    own_ahead,
    with_seen_before,
)
from fp8jax.transform.analysis import Entered, Plan
from fp8jax.transform.follow import check_none_coded, follow, has_coded, values_of
from fp8jax.transform.forward_rule import trace_forward_rule
from fp8jax.transform.loops import names_stacked_over, scales_of_scan
from fp8jax.transform.mode import Mode
from fp8jax.transform.names import PRODUCT, context_of, site_scope
from fp8jax.transform.products import product_of, read_rows
from fp8jax.transform.repeats import Repeat
from fp8jax.transform.sharing import merge_observed_over_devices, share_scales_over_devices
from fp8jax.transform.sites import Site
from fp8jax.transform.weights import weights_in_common

Scales = Mapping[str, SiteScales | Ready]


def evaluate(
    jaxpr: Any,
    plan: Plan,
    scales: Scales,
    arguments: Sequence[Any],
    mode: Mode,
    ahead: Aheads | None = None,
) -> tuple[list[Any], dict[str, SiteScales]]:
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
    opened, consts = shims.open_jaxpr(jaxpr)
    in_common, casts = weights_in_common(opened, plan) if mode.quantized else {}, {}
    values = dict(zip((*opened.constvars, *opened.invars), (*consts, *arguments), strict=True))
    observations: dict[str, SiteScales] = {}
    in_order = range(len(opened.eqns))
    for index in in_order if plan.schedule is None or mode.unrolled else plan.schedule:
        if isinstance(index, Repeat):
            found, observed = _run_repeat(index, scales, values, mode, ahead)
            values.update(found)
            observations.update(observed)
            continue
        equation = opened.eqns[index]
        operands = [
            atom.val if isinstance(atom, core.Literal) else values[atom] for atom in equation.invars
        ]
        step = plan.equations.get(index)
        with context_of(equation):
            if (
                isinstance(step, Site)
                and index in in_common
                and not is_cast(step.name, ahead)
                and not has_coded(operands)
            ):
                lhs, rhs = operands[:2]
                product = product_of(equation, step, lhs, rhs)
                key, own = (
                    (in_common[index], casts_of(product, step.weight_operand)),
                    own_scales(scales.get(step.name)),
                )
                if key not in casts:
                    weight = {"lhs": lhs, "rhs": rhs}[step.weight_operand]
                    casts[key] = cast_weight(step, product, weight, own), own
                ahead[step.name], of_first = casts[key]
                scales = {**scales, **exponent_in_common(step, own, of_first)}
            if step is None:
                outputs = (
                    _follow(equation, operands, mode)
                    if has_coded(operands)
                    else shims.bind(equation, operands)
                )
            else:
                name = equation.primitive.name
                enter: Callable = _run_site if isinstance(step, Site) else _ENTER[name]
                if mode.watch is not None and isinstance(step, Site):
                    enter = mode.watch(enter)
                outputs, observed = enter(equation, step, scales, operands, mode, ahead)
                observations.update(observed)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [
        atom.val if isinstance(atom, core.Literal) else values[atom] for atom in opened.outvars
    ], observations


def _follow(equation, operands, mode: Mode):
    """The outputs of an equation that reads weights held as codes, and has no selected product."""

    def run():
        enter = _ENTER.get(equation.primitive.name)
        if enter is None:
            return follow(equation, operands)
        is_ruled = enter is _run_custom_vjp
        rule, problem = trace_forward_rule(equation) if is_ruled else (None, "")
        if problem:
            check_none_coded(operands, f"read by a custom_vjp {problem}")
        plans = tuple(Plan({}) for _ in shims.jaxprs_of(equation))
        return enter(equation, Entered(plans, rule=rule), {}, operands, mode, {})[0]

    return mode.attempt(run, operands, functools.partial(shims.bind, equation))


def _run_site(equation, site: Site, scales: Scales, operands, mode: Mode, ahead: Aheads):
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
            (out,) = shims.bind(equation, operands)
            out = out if own is None else observed_alone(out, lhs, rhs, own)
        return [of_result(out)], observed
    product = product_of(equation, site, lhs, rhs)
    cast = {site.weight: ahead[site.name]} if site.name in ahead else {}
    if not cast and site.weight is not None and own is not None and has_lanes(own, 0):
        # Weights have no lanes: they may be whole on each device, and would be divided for the sake
        # of their amaxes alone.
        weight = operands[("lhs", "rhs").index(site.weight)]
        observed_before = observe_ahead(weight, first_lane(own), site.weight)
        cast = {} if observed_before is None else {site.weight: observed_before}
    with jax.named_scope(PRODUCT), jax.named_scope(site_scope(site.name)):
        out: Any = run(product, lhs, rhs, tuple(extra), given, cast)
    return [of_result(out)], observed


def _own(step: Entered, scales: Scales) -> dict[str, SiteScales]:
    return {name: own_scales(node) for name, node in _given(step, scales).items()}


def _given(step: Entered, scales: Scales) -> Scales:
    """The same, with what products read of them: for what hands them on to sites that run as often
    as it does.
    """
    return {site.name: scales[site.name] for site in step.sites() if site.has_scales}


def _run_jit(equation, step: Entered, scales, operands, mode, ahead):
    jaxpr, (plan,) = equation.params["jaxpr"], step.plans

    def inner(given, *arguments):
        scales, ahead = given
        return evaluate(jaxpr, plan, scales, arguments, mode, ahead)

    inner.__name__ = inner.__qualname__ = equation.params["name"]
    options = shims.jit_options(equation.params)
    if "in_shardings" in options and has_coded(
        operands
    ):  # Those of codes and scales are what they are.
        options["in_shardings"] = tuple(
            None if has_coded([operand]) else sharding
            for operand, sharding in zip((None, *operands), options["in_shardings"], strict=True)
        )
    return jax.jit(inner, **options)((_given(step, scales), own_ahead(step, ahead)), *operands)


def _run_call(equation, step: Entered, scales, operands, mode, ahead):
    return evaluate(equation.params["call_jaxpr"], step.plans[0], scales, operands, mode, ahead)


def _run_remat(equation, step: Entered, scales, operands, mode, ahead):
    jaxpr, (plan,) = equation.params["jaxpr"], step.plans

    @functools.partial(
        jax.checkpoint, prevent_cse=equation.params["prevent_cse"], policy=equation.params["policy"]
    )
    def inner(given, *arguments):
        scales, ahead = given
        return evaluate(jaxpr, plan, scales, arguments, mode, ahead)

    return inner((_given(step, scales), own_ahead(step, ahead)), *operands)


def _run_scan(equation, step: Entered, scales, operands, mode, ahead):
    parameters = equation.params
    num_consts, num_carry = shims.scan_counts(parameters)
    consts, carry, scanned = (
        operands[:num_consts],
        operands[num_consts : num_consts + num_carry],
        operands[num_consts + num_carry :],
    )
    carry = mode.allow(carry, "carried through a scan")
    scanned = mode.layers_of(scanned)
    own = _own(step, scales)
    ahead = own_ahead(step, ahead)
    if mode.quantized:
        ahead = cast_before(equation, step, own, operands, ahead)
        ahead = observe_before(equation, step, own, operands, ahead)
        own, ahead = with_seen_before(equation, step, own, ahead)
    slices, scales_of = scales_of_scan(step, scales, own, parameters["length"])
    stacked_names = names_stacked_over(step)
    sliced = {name: cast for name, cast in ahead.items() if name in stacked_names}
    whole = {name: cast for name, cast in ahead.items() if name not in stacked_names}

    def body(carry, slices):
        of_scales, sliced, scanned = slices
        outputs, observed = evaluate(
            parameters["jaxpr"],
            step.plans[0],
            scales_of(of_scales),
            [*consts, *carry, *scanned],
            mode,
            whole | sliced,
        )
        outputs = mode.allow(outputs, "an output of a scan's iteration")
        return outputs[:num_carry], (outputs[num_carry:], observed)

    carry, (results, observed) = jax.lax.scan(
        body,
        list(carry),
        (slices, sliced, list(scanned)),
        length=parameters["length"],
        reverse=parameters["reverse"],
        unroll=parameters["unroll"],
    )
    merged = {
        name: node if name in stacked_names else merge_over_axis(node)
        for name, node in observed.items()
    }
    return [*carry, *results], merged


def _run_repeat(repeat: Repeat, scales: Scales, values, mode: Mode, ahead: Aheads):
    """The values that blocks evaluated as one scan leave behind, and what their sites observed."""
    own, cast = repeat.scales(scales), repeat.ahead(ahead)
    operands = repeat.operands(values)
    outputs, observed = _run_scan(repeat.loop, repeat.step, own, operands, mode, cast)
    return repeat.outputs(outputs), repeat.observed(observed)


def _run_cond(equation, step: Entered, scales, operands, mode, ahead):
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

    branches = [branch(jaxpr, plan) for jaxpr, plan in zip(equation.params["branches"], step.plans)]
    shared, platforms = share_over_branches(own, index), equation.params.get("branches_platforms")
    if platforms is None:
        return jax.lax.switch(index, branches, shared, *rest)
    of_platforms = {
        name: branch
        for names, branch in zip(platforms, branches, strict=True)
        for name in names or ("default",)
    }
    return jax.lax.platform_dependent(shared, *rest, **of_platforms)


def _run_custom_jvp(equation, step: Entered, scales, operands, mode, ahead):
    """The primal in FP8, the tangent by the user's own rule, which knows better than a product's
    derivative.

    That rule has no backward pass to carry amaxes out, so a `tap` on the outputs does. No gradient
    is cast.
    """
    (plan,) = step.plans
    observing = dataclasses.replace(mode, observing=True)

    @jax.custom_jvp
    def primal(scales, *arguments):
        return evaluate(equation.params["call_jaxpr"], plan, scales, arguments, observing)

    @primal.defjvp
    def _(primals, tangents):
        (scales, *arguments), (_, *argument_tangents) = primals, tangents
        outputs, observed = primal(scales, *arguments)
        given = {n: a for n, a in enumerate(arguments) if not has_coded([a])}
        values = dict(enumerate(values_of(arguments)))  # The user's rule knows no codes.
        bind = lambda given: shims.bind(equation, list((values | given).values()))
        of_given = {n: argument_tangents[n] for n in given}
        _, output_tangents = jax.jvp(bind, (given,), (of_given,))
        return (outputs, observed), (output_tangents, jax.tree.map(jnp.zeros_like, observed))

    own = _own(step, scales)
    outputs, observed = primal(own, *operands)
    return tap(outputs, own, observed), observed if mode.observing else {}


def _run_while(equation, step: Entered, scales, operands, mode, ahead):
    parameters = equation.params
    num_cond, num_body = parameters["cond_nconsts"], parameters["body_nconsts"]
    cond_consts, body_consts, carry = (
        operands[:num_cond],
        operands[num_cond : num_cond + num_body],
        operands[num_cond + num_body :],
    )
    carry = mode.allow(carry, "carried through a while loop")
    # A while loop has no reverse mode, and none is asked for: its observations come by `observe`
    # alone.
    own = jax.lax.stop_gradient(_own(step, scales))
    nothing = jax.tree.map(jnp.zeros_like, own) if mode.observing else {}
    ahead = own_ahead(step, ahead)
    if mode.quantized:
        ahead = cast_before(equation, step, own, operands, ahead)

    def condition(state):
        return evaluate(parameters["cond_jaxpr"], Plan({}), {}, [*cond_consts, *state[0]], mode)[0][
            0
        ]

    def body(state):
        carry, so_far = state
        outputs, observed = evaluate(
            parameters["body_jaxpr"], step.plans[0], own, [*body_consts, *carry], mode, ahead
        )
        outputs = mode.allow(outputs, "an output of a while loop's iteration")
        return outputs, jax.tree.map(jnp.maximum, so_far, observed)

    return jax.lax.while_loop(condition, body, (list(carry), nothing))


def _run_custom_vjp(equation, step: Entered, scales, operands, mode, ahead):
    """The forward rule in FP8, the backward rule as the user wrote it; it carries the amaxes of the
    forward pass out.
    """
    rule, (plan,) = step.rule, step.plans
    if rule is None:
        return _run_call(equation, step, scales, operands, mode, ahead)

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


def _run_shard_map(equation, step: Entered, scales, operands, mode, ahead):
    parameters = equation.params
    checked, manual = parameters["check_vma"], shims.manual_axes(parameters)

    def inner(scales, *operands):
        shared = share_scales_over_devices(step.sites(), scales, manual, checked)
        outputs, observed = evaluate(parameters["jaxpr"], step.plans[0], shared, operands, mode)
        outputs = mode.allow(outputs, "an output of a shard_map")
        return outputs, merge_observed_over_devices(step.sites(), observed, manual)

    operands, in_specs = mode.with_specs(operands, parameters["in_specs"], parameters["mesh"])
    return jax.shard_map(
        inner,
        mesh=parameters["mesh"],
        in_specs=(PartitionSpec(), *in_specs),
        out_specs=(list(parameters["out_specs"]), PartitionSpec()),
        axis_names=manual,
        check_vma=checked,
    )(_own(step, scales), *operands)


_ENTER = {
    "jit": _run_jit,
    "closed_call": _run_call,
    "core_call": _run_call,
    "remat2": _run_remat,
    "checkpoint": _run_remat,
    "scan": _run_scan,
    "shard_map": _run_shard_map,
    "while": _run_while,
    "cond": _run_cond,
    "custom_jvp_call": _run_custom_jvp,
    "custom_vjp_call": _run_custom_vjp,
}
