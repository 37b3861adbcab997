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

from fp8jax import _shims
from fp8jax._recipe import Recipe
from fp8jax._transform.common import Readers
from fp8jax._transform.control_flow import INSTEAD, Flow, Kind, flow_of
from fp8jax._transform.labels import (
    CONSTANT,
    OTHER,
    WEIGHTS,
    Label,
    behind_loop,
    join,
    label_of,
    weight_read,
)
from fp8jax._transform.names import Namer, Weight, derivative_of, is_own, scope_of
from fp8jax._transform.products import engines_of
from fp8jax._transform.selection import Selection, flops_of
from fp8jax._transform.sites import Rule, Site

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


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
        return tuple(itertools.chain.from_iterable(map(sites_of, self.equations.values())))

    def leading_to(self, name: str) -> int:
        """The index of the equation that a site is, or is in."""
        return next(index for index, step in self.equations.items() if leads_to(step, name))


@dataclasses.dataclass(frozen=True)
class Entered:
    """An equation with selected sites inside.

    Args:
      flow: how it runs the jaxprs inside.
      plans: one for each of these.
      loop: the identity of a loop.
    """

    flow: Flow
    plans: tuple[Plan, ...]
    loop: int | None = None

    def sites(self) -> tuple[Site, ...]:
        """All selected sites inside."""
        return tuple(itertools.chain.from_iterable(plan.sites() for plan in self.plans))

    def leading_to(self, name: str) -> tuple[Any, Plan]:
        """The body that a site is in, and its plan."""
        pairs = zip(self.flow.bodies, self.plans, strict=True)
        return next((body, plan) for body, plan in pairs if leads_to(plan, name))


def sites_of(step: Site | Entered | Plan) -> tuple[Site, ...]:
    """The selected site that a step is, or those inside."""
    return (step,) if isinstance(step, Site) else step.sites()


def leads_to(step: Site | Entered | Plan, name: str) -> bool:
    """Whether a step is the site of a name, or has it inside."""
    return any(site.name == name for site in sites_of(step))


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
        labels = [Label(WEIGHTS, weight=weight) if weight else Label(OTHER) for weight in weights]
        _, plan = analysis.walk(jaxpr, labels, _Place())
        return plan, tuple(analysis.sites)

    if any(rule.first or rule.last for rule in rules):
        _, sites = walk(())  # Which those are, only the whole program tells.
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

    def walk(self, jaxpr, in_labels, place: _Place) -> tuple[list[Label], Plan]:
        """Labels of the outputs of a jaxpr, closed or open, and its plan."""
        jaxpr, _ = _shims.open_jaxpr(jaxpr)
        labels = dict(zip(jaxpr.invars, in_labels, strict=True))
        labels.update((variable, Label(CONSTANT)) for variable in jaxpr.constvars)
        plan, readers = {}, Readers()
        for index, equation in enumerate(jaxpr.eqns):
            operands = [label_of(atom, labels) for atom in equation.invars]
            outputs, step = self._equation(equation, operands, place)
            labels.update(zip(equation.outvars, outputs, strict=True))
            if isinstance(step, Site):
                step = dataclasses.replace(step, cast_with=readers.leaders(equation, step))
                self.sites[-1] = step
            if step is not None:
                plan[index] = step
            readers.pass_by(equation)
        return [label_of(atom, labels) for atom in jaxpr.outvars], Plan(plan)

    def _equation(self, equation, operands, place):
        name = equation.primitive.name
        if name in PRODUCTS:
            site = self._site(equation, operands, place) if self._recording else None
            made = self._made(equation, operands)
            return made, site if site is not None and site.selected else None
        flow = flow_of(equation, place.is_differentiated) if place.barrier is None else None
        if flow is not None and flow.kind != Kind.CLOSED:
            return self._enter(flow, equation, operands, place)
        left = f"{name}, which is left as it is" + INSTEAD.get(name, "")
        barrier = place.barrier or f"inside {left if flow is None else flow.why}"
        for jaxpr in _shims.jaxprs_in(equation.params):
            self._report(jaxpr, dataclasses.replace(place.inside(equation), barrier=barrier))
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

    def _enter(self, flow: Flow, equation, operands, place):
        place = place.inside(equation)
        if not flow.is_differentiated:
            place = dataclasses.replace(place, is_differentiated=False)
        if flow.kind == Kind.DEVICES and not flow.options["check_vma"]:
            axes = place.unchecked_axes | flow.options["axis_names"]
            place = dataclasses.replace(place, unchecked_axes=axes)
        if flow.condition is not None:
            barrier = "in the condition of a while loop"
            self._report(flow.condition, dataclasses.replace(place, barrier=barrier))
        if flow.is_loop:
            return self._loop(flow, operands, place)
        own, inputs = operands[: flow.num_own], operands[flow.num_own :]
        walks = [self.walk(body, inputs, place) for body in flow.bodies]
        outputs = [labels[: len(equation.outvars)] for labels, _ in walks]
        labels = outputs[0]
        if flow.kind == Kind.BRANCHES:
            labels = [join((*own, *of_branches)) for of_branches in zip(*outputs)]
        return labels, _entered(flow, tuple(plan for _, plan in walks))

    def _loop(self, flow: Flow, operands, place):
        """The labels of a loop's outputs, which hold behind every iteration, and its plan."""
        loop = next(self._loops)
        (body,), (_, consts, carry, scanned) = flow.bodies, flow.parts(operands)
        scanned = [join((label,), frozenset((loop,))) for label in scanned]

        def step(carry):
            return self.walk(body, [*consts, *carry, *scanned], place)[0][: flow.num_carry]

        carry = self._settled(carry, step, loop)
        if "length" in flow.options:
            loops = (*place.loops, (loop, flow.options["length"]))
            place = dataclasses.replace(place, loops=loops)
        outputs, plan = self.walk(body, [*consts, *carry, *scanned], place)
        return behind_loop(outputs, loop), _entered(flow, (plan,), loop)

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

    def _report(self, jaxpr, place):
        """Records the sites inside a jaxpr that the transform does not enter."""
        if self._recording:
            self.walk(jaxpr, [Label(OTHER)] * len(_shims.open_jaxpr(jaxpr)[0].invars), place)

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
        iterations = _shims.least_size([length for _, length in place.loops])
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
            device_axes=_shims.varying_axes(lhs) | _shims.varying_axes(rhs) | place.unchecked_axes,
            weight=weight,
            source=_shims.source_of(equation),
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


def _entered(flow: Flow, plans: tuple[Plan, ...], loop: int | None = None) -> Entered | None:
    return Entered(flow, plans, loop) if any(plan.equations for plan in plans) else None
