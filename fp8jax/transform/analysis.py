"""Finds the sites of a jaxpr, has it decided which run in FP8, and lays out the plan that the
interpreter follows.

One walk over the jaxpr carries a `Label` for each value: is it computed from constants, from
weights only, or from other arguments too; and over which scans does it differ from one iteration to
the next. A product is selected where exactly one operand is computed from weights only. Where that
operand differs between iterations (the layers of a stacked model), each iteration has scales of its
own; where it doesn't, the iterations share them.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from fp8jax import shims
from fp8jax.recipe import Recipe
from fp8jax.transform.forward_rule import ForwardRule, trace_forward_rule
from fp8jax.transform.labels import (
    CONSTANT,
    OTHER,
    WEIGHTS,
    Label,
    behind_loop,
    join,
    label_of,
    weight_read,
)
from fp8jax.transform.names import Namer, Weight, derivative_of, is_own, scope_of
from fp8jax.transform.products import engines_of
from fp8jax.transform.selection import Selection, flops_of
from fp8jax.transform.sites import Rule, Site

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
# Primitives that call one jaxpr on all of their operands, by the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}
# What to do about products that are out of reach.
_INSTEAD = {
    "pallas_call": ": use fp8jax.ops.dot_general in the place of the kernel, or cast in the kernel "
    "itself",
    "custom_linear_solve": ": solvers need the products in full precision",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the selected sites of a jaxpr are: by index of the equation, a `Site`, or an `Entered`
    equation.

    Args:
      equations: see there.
      schedule: in which order the equations are evaluated, by index, with a `Repeat` in the place
        of those that it evaluates; None for their own order, one by one.
    """

    equations: dict[int, "Site | Entered"]
    schedule: tuple[Any, ...] | None = None

    def sites(self) -> tuple[Site, ...]:
        """All selected sites, those of inner jaxprs included."""
        return tuple(
            itertools.chain.from_iterable(
                (step,) if isinstance(step, Site) else step.sites()
                for step in self.equations.values()
            )
        )


@dataclasses.dataclass(frozen=True)
class Entered:
    """An equation with selected sites inside: the plan of each of its jaxprs.

    Args:
      plans: in the order of the jaxprs.
      loop: the identity of a scan or while loop.
      rule: the forward rule of a `custom_vjp`; its jaxpr is the one that the plan is for.
    """

    plans: tuple[Plan, ...]
    loop: int | None = None
    rule: ForwardRule | None = None

    def sites(self) -> tuple[Site, ...]:
        """All selected sites inside."""
        return tuple(itertools.chain.from_iterable(plan.sites() for plan in self.plans))


def analyze(
    jaxpr: Any,
    weights: Sequence[Weight | None],
    recipe: Recipe,
    rules: Sequence[Rule],
    weights_name: str,
    *,
    strip: str = "",
    prefix: str = "",
    min_flops: float = 0,
) -> tuple[Plan, tuple[Site, ...]]:
    """The plan of a closed jaxpr, and all its sites, the unselected ones included.

    Args:
      jaxpr: closed jaxpr of the function.
      weights: for each of its inputs, the weight that it is, if any.
      recipe: of the sites that no rule names.
      rules: ordered; the first that matches a site's name decides on it.
      weights_name: how messages call the weights.
      strip: a leading part of the equations' name stacks to leave out of the names.
      prefix: a path to put before all names.
      min_flops: the fewest operations of a product that is selected without a rule.
    """

    def walk(rules):
        analysis = _Analysis(
            Selection(recipe, rules, weights_name, min_flops), strip, prefix, Namer()
        )
        opened, consts = shims.open_jaxpr(jaxpr)
        labels = [Label(WEIGHTS, weight=weight) if weight else Label(OTHER) for weight in weights]
        _, plan = analysis.walk(opened, [Label(CONSTANT)] * len(consts), labels, _Place())
        return plan, tuple(analysis.sites)

    if any(
        rule.first or rule.last for rule in rules
    ):  # Which those are, only the whole program tells.
        _, sites = walk(())
        rules = [rule.among(sites) for rule in rules]
    return walk(tuple(rules))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the function a jaxpr is.

    Args:
      scope: its path.
      derivative: what it is of a derivative that the function takes; see `names.derivative_of`.
      loops: the scans around it, as (identity, length).
      barrier: what keeps the transform out of it, if anything.
      unchecked_axes: the axes of the shard_maps around it that do not track what varies over them.
      is_differentiated: False where no derivative is ever taken: in a while loop, and in a
        custom_vjp's forward rule.
    """

    scope: str = ""
    derivative: str = ""
    loops: tuple[tuple[int, int], ...] = ()
    barrier: str | None = None
    unchecked_axes: frozenset[str] = frozenset()
    is_differentiated: bool = True

    def inside(self, equation) -> "_Place":
        stack = equation.source_info.name_stack
        return dataclasses.replace(
            self,
            scope=scope_of(self.scope, stack),
            derivative=derivative_of(self.derivative, stack),
        )


class _Analysis:
    def __init__(self, selection, strip, prefix, namer):
        self._selection = selection
        self._strip, self._prefix = strip, prefix
        self.sites: list[Site] = []
        self._namer = namer
        # One for each size, since labels in loops are compared until they settle.
        self._products: dict[int, Weight] = {}
        self._loops = itertools.count()
        self._recording = True

    def walk(self, jaxpr, const_labels, in_labels, place: _Place) -> tuple[list[Label], Plan]:
        """Labels of a jaxpr's outputs, and its plan."""
        labels = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*const_labels, *in_labels), strict=True)
        )
        plan = {}
        for index, equation in enumerate(jaxpr.eqns):
            operands = [label_of(atom, labels) for atom in equation.invars]
            outputs, step = self._equation(equation, operands, place)
            labels.update(zip(equation.outvars, outputs, strict=True))
            if step is not None:
                plan[index] = step
        return [label_of(atom, labels) for atom in jaxpr.outvars], Plan(plan)

    def _equation(self, equation, operands, place):
        name = equation.primitive.name
        if name in PRODUCTS:
            site = self._site(equation, operands, place) if self._recording else None
            made = self._made(equation, operands)
            return made, site if site is not None and site.selected else None
        if place.barrier is None:
            if name == "scan":
                return self._scan(equation, operands, place)
            if name == "while":
                return self._while(equation, operands, place)
            if name == "custom_vjp_call":
                return self._custom_vjp(equation, operands, place)
            if name == "cond":
                return self._cond(equation, operands, place)
            if name in CALLS:
                return self._call(equation, operands, place)
        self._report(equation, place)
        return self._opaque(equation, operands), None

    def _made(self, equation, operands):
        """The labels of a product's results: one of weights is no weight any more."""
        size = equation.outvars[0].aval.size
        weight = self._products.setdefault(size, Weight.product(size))
        return [
            dataclasses.replace(label, weight=label.weight and weight)
            for label in self._opaque(equation, operands)
        ]

    def _opaque(self, equation, operands):
        return [join(operands) for _ in equation.outvars]

    def _scan(self, equation, operands, place):
        num_consts, num_carry = shims.scan_counts(equation.params)
        inner, consts = shims.open_jaxpr(equation.params["jaxpr"])
        const_labels = [Label(CONSTANT)] * len(consts)
        loop = next(self._loops)
        shared, carry, scanned = (
            operands[:num_consts],
            operands[num_consts : num_consts + num_carry],
            [join((label,), frozenset((loop,))) for label in operands[num_consts + num_carry :]],
        )

        def body(carry, place):
            return self.walk(inner, const_labels, [*shared, *carry, *scanned], place)

        carry = self._settled(carry, lambda carry: body(carry, place)[0][:num_carry], loop)
        place = dataclasses.replace(
            place.inside(equation), loops=(*place.loops, (loop, equation.params["length"]))
        )
        outputs, plan = body(carry, place)
        return behind_loop(outputs, loop), _entered((plan,), loop=loop)

    def _while(self, equation, operands, place):
        """A loop of unknown length: forward only, and its iterations share their scales."""
        num_cond, num_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        inner, consts = shims.open_jaxpr(equation.params["body_jaxpr"])
        const_labels = [Label(CONSTANT)] * len(consts)
        shared, carry = operands[num_cond : num_cond + num_body], operands[num_cond + num_body :]
        loop = next(self._loops)

        def body(carry, place):
            return self.walk(inner, const_labels, [*shared, *carry], place)

        carry = self._settled(carry, lambda carry: body(carry, place)[0], loop)
        place = dataclasses.replace(place.inside(equation), is_differentiated=False)
        condition, _ = shims.open_jaxpr(equation.params["cond_jaxpr"])
        self._report_inside(
            condition, dataclasses.replace(place, barrier="in the condition of a while loop")
        )
        outputs, plan = body(carry, place)
        return behind_loop(outputs, loop), _entered((plan,), loop=loop)

    def _settled(self, carry, step, loop):
        """The labels of a loop's carry that hold in every iteration: what changes varies over the
        loop.
        """
        recording, self._recording = self._recording, False
        while True:  # Labels only ever grow, and there are finitely many: a fixed point comes.
            grown = [
                before if after is before else join((before, after), frozenset((loop,)))
                for before, after in zip(carry, step(carry), strict=True)
            ]
            if all(old.is_like(new) for old, new in zip(carry, grown)):
                break
            carry = grown
        self._recording = recording
        return carry

    def _custom_vjp(self, equation, operands, place):
        if not place.is_differentiated:
            return self._call(equation, operands, place)
        rule, problem = trace_forward_rule(equation)
        if rule is None:
            self._report(
                equation, dataclasses.replace(place, barrier=f"inside a custom_vjp {problem}")
            )
            return self._opaque(equation, operands), None
        inner, consts = shims.open_jaxpr(rule.jaxpr)
        place = dataclasses.replace(place.inside(equation), is_differentiated=False)
        outputs, plan = self.walk(inner, [Label(CONSTANT)] * len(consts), operands, place)
        return outputs[: rule.num_outputs], _entered((plan,), rule=rule)

    def _call(self, equation, operands, place):
        inner, consts = shims.open_jaxpr(equation.params[CALLS[equation.primitive.name]])
        place = place.inside(equation)
        if not equation.params.get("check_vma", True):
            place = dataclasses.replace(
                place, unchecked_axes=place.unchecked_axes | shims.manual_axes(equation.params)
            )
        outputs, plan = self.walk(inner, [Label(CONSTANT)] * len(consts), operands, place)
        return outputs, _entered((plan,))

    def _cond(self, equation, operands, place):
        predicate, *rest = operands
        walks = []
        for branch in equation.params["branches"]:
            inner, consts = shims.open_jaxpr(branch)
            walks.append(
                self.walk(inner, [Label(CONSTANT)] * len(consts), rest, place.inside(equation))
            )
        outputs = [join((predicate, *labels)) for labels in zip(*(labels for labels, _ in walks))]
        return outputs, _entered(tuple(plan for _, plan in walks))

    def _report(self, equation, place):
        """Records the sites inside an equation that the transform does not enter."""
        name = equation.primitive.name
        barrier = place.barrier or f"inside {name}, which is left as it is" + _INSTEAD.get(name, "")
        place = dataclasses.replace(place.inside(equation), barrier=barrier)
        for jaxpr in shims.jaxprs_in(equation.params):
            self._report_inside(shims.open_jaxpr(jaxpr)[0], place)

    def _report_inside(self, jaxpr, place):
        if self._recording:
            self.walk(
                jaxpr,
                [Label(CONSTANT)] * len(jaxpr.constvars),
                [Label(OTHER)] * len(jaxpr.invars),
                place,
            )

    def _site(self, equation, operands, place) -> Site | None:
        lhs, rhs = (atom.aval for atom in equation.invars[:2])
        out = equation.outvars[0].aval
        if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (lhs, rhs)):
            return None
        product = equation.primitive.name
        here = place.inside(equation)
        if is_own(here.scope):
            return None
        scope = self._below_strip(here.scope)
        name = self._namer(scope, weight_read(operands[:2], scope), here.derivative, self._prefix)
        from_weights = [label.kind == WEIGHTS for label in operands[:2]]
        weight = None if from_weights[0] == from_weights[1] else "lhs" if from_weights[0] else "rhs"
        flops = flops_of(equation, lhs, rhs, out)
        recipe, reason = self._selection.choose(
            name, equation, flops, all(from_weights), weight, place.barrier
        )
        iterations = 1
        for _, length in place.loops:
            iterations *= length
        least = min(operands[:2], key=lambda label: label.kind)
        site = Site(
            name=name,
            product=product,
            lhs=lhs.str_short(),
            rhs=rhs.str_short(),
            out=out.str_short(),
            flops=iterations * flops,
            recipe=recipe if recipe is None or weight != "lhs" else recipe.mirrored(),
            reason=reason,
            loops=place.loops,
            stacked_over=least.varies_over if least.kind == WEIGHTS else frozenset(),
            device_axes=shims.varying_axes(lhs) | shims.varying_axes(rhs) | place.unchecked_axes,
            weight=weight,
            source=shims.source_of(equation),
        )
        site = dataclasses.replace(site, engines=engines_of(equation, site))
        self.sites.append(site)
        return site

    def _below_strip(self, scope: str) -> str:
        return (
            scope[len(self._strip) :].lstrip("/")
            if (scope + "/").startswith(self._strip + "/")
            else scope
        )


def _entered(plans: tuple[Plan, ...], **options) -> Entered | None:
    return Entered(plans, **options) if any(plan.equations for plan in plans) else None
