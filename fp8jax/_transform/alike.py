"""Which equations of a program are alike: they do the same to operands of the same types.

Layers of one shape are traced one by one, so that what is the same in them are many objects. Each
equation gets a number here, and like ones the same. Names and places in the user's code are no part
of it; nor are the values of literals, where these can be made operands.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fp8jax import _shims
from fp8jax._transform.analysis import Entered
from fp8jax._transform.control_flow import has_own_tangents, is_extendable, primal_of
from fp8jax._transform.sites import Site

# Constants of more bytes than this are alike only where they are the same array.
_COMPARED_BYTES = 2**16


class Alike:
    """Numbers for equations: the same for those that are alike."""

    def __init__(self):
        self._numbers: dict[Hashable, int] = {}
        self._jaxprs: dict[tuple[int, bool, bool], int] = {}
        self._rules: dict[Hashable, int] = {}
        self._kept: list[Any] = []  # known by identity, and so kept alive
        self._in_rule = False

    def equation(self, equation: Any, step: Any, kinds: Sequence[Hashable] = ()) -> int:
        """The number of an equation whose literals may differ.

        Args:
          equation: of a jaxpr.
          step: what is planned for it: a `Site`, an `Entered`, or None.
          kinds: for each operand, how it is held where it is no plain array.
        """
        return self._number((self._equation(equation, True), _step_key(step), tuple(kinds)))

    def jaxpr(self, jaxpr: Any, slots: bool) -> int:
        """The number of a jaxpr; where `slots`, literals and constants in it may differ."""
        key = id(jaxpr), slots, self._in_rule
        if key not in self._jaxprs:
            self._kept.append(jaxpr)
            self._jaxprs[key] = self._number(self._jaxpr(jaxpr, slots))
        return self._jaxprs[key]

    def difference(self, one: tuple[Any, Any], other: tuple[Any, Any]) -> str:
        """What differs first between two equations that are not alike, in words.

        Args:
          one, other: an equation and what is planned for it.
        """
        (first, of_first), (second, of_second) = one, other
        if first.primitive is not second.primitive:
            return f"{_said(first)} there, and {_said(second)} here"
        for operands in ("invars", "outvars"):
            avals = [
                [atom.aval.str_short() for atom in getattr(equation, operands)]
                for equation in (first, second)
            ]
            if avals[0] != avals[1]:
                what = "operands" if operands == "invars" else "results"
                found = (", ".join(some) for some in avals)
                return f"{what} of {_said(second)}: {' there, and '.join(found)} here"
        if first.effects or second.effects:
            return f"{_said(second)} has effects, which happen in an order of their own"
        if self._equation(first, True) == self._equation(second, True):
            if _step_key(of_first) == _step_key(of_second):
                return f"how a weight that {_said(second)} reads is held"
            return _difference_of_steps(of_first, of_second)
        return self._difference_of_params(first, second, of_first, of_second)

    def _difference_of_params(self, first, second, of_first, of_second) -> str:
        if primal_of(first) is not None:
            return f"a rule of {_said(second)}, or what it closes over"
        slots = is_extendable(first)
        for name, value in first.params.items():
            against = second.params.get(name)
            if self._value(value, slots) == self._value(against, slots):
                continue
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                pairs = _equations_of(value, of_first), _equations_of(against, of_second)
                for one, other in zip(*pairs):
                    if self.equation(*one) != self.equation(*other):
                        return self.difference(one, other)
                sizes = [len(pair) for pair in pairs]
                if sizes[0] == sizes[1]:
                    return f"a number inside {_said(second)}, or what is read there"
                return f"{_said(second)} of {' equations there, and of '.join(map(str, sizes))}"
            return f"{name} of {_said(second)}"
        return f"{_said(second)}, in its context"

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _equation(self, equation, slots: bool) -> Hashable:
        return (
            equation.primitive,
            tuple(
                (atom.aval, _shims.is_variable(atom)) if slots else self._atom(atom)
                for atom in equation.invars
            ),
            tuple(variable.aval for variable in equation.outvars),
            self._params(equation, slots),
            frozenset(equation.effects),
            equation.ctx,
        )

    def _atom(self, atom) -> Hashable:
        return atom.aval, None if _shims.is_variable(atom) else self._value(atom.val, False)

    def _params(self, equation, slots: bool) -> Hashable:
        if primal_of(equation) is not None:
            return self._rule(equation)
        slots = slots and is_extendable(equation)
        return tuple((key, self._value(value, slots)) for key, value in equation.params.items())

    def _value(self, value, slots: bool) -> Hashable:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            return "jaxpr", self.jaxpr(value, slots)
        if isinstance(value, (tuple, list)):
            return type(value), tuple(self._value(item, slots) for item in value)
        if isinstance(value, dict):
            return tuple((key, self._value(item, slots)) for key, item in value.items())
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            return self._array(value)
        if isinstance(value, (float, complex)):
            return type(value), repr(value)  # NaN is not itself, and 0.0 is -0.0.
        try:
            hash(value)
        except TypeError:
            self._kept.append(value)
            return type(value), id(value)
        return type(value), value

    def _array(self, array) -> Hashable:
        is_plain = isinstance(array.dtype, np.dtype) and array.nbytes <= _COMPARED_BYTES
        if is_plain and not isinstance(array, Tracer):
            return str(array.dtype), array.shape, np.asarray(array).tobytes()
        self._kept.append(array)
        return "array", id(array)

    def _jaxpr(self, jaxpr, slots: bool) -> Hashable:
        opened, consts = _shims.open_jaxpr(jaxpr)
        numbers: dict[Any, int] = {}

        def number(variable):
            return numbers.setdefault(variable, len(numbers))

        def reads(atoms):
            return tuple(number(atom) if _shims.is_variable(atom) else None for atom in atoms)

        inputs = tuple((number(one), one.aval) for one in (*opened.constvars, *opened.invars))
        values = tuple(None if slots else self._value(const, False) for const in consts)
        equations = tuple(
            (
                self._number(self._equation(equation, slots)),
                reads(equation.invars),
                tuple(number(variable) for variable in equation.outvars),
            )
            for equation in opened.eqns
        )
        outputs = tuple(
            number(atom) if _shims.is_variable(atom) else self._atom(atom)
            for atom in opened.outvars
        )
        return inputs, values, equations, outputs

    def _rule(self, equation) -> int:
        """The number of a function with a derivative of its own, by what it and that compute.

        The rules themselves are made anew for each call, and may close over anything. A rule often
        calls its function again: within a derivative that is known by what it computes alone.
        """
        primal = self._value(primal_of(equation), False)
        if self._in_rule:
            return self._number((equation.primitive, primal))
        key = tuple((name, id(value)) for name, value in equation.params.items())
        if key not in self._rules:
            self._kept.append(equation)
            self._in_rule = True
            try:
                function, avals = _derivative(equation)
                derivative: Hashable = self._jaxpr(jax.make_jaxpr(function)(*avals), False)
            except Exception:  # Whatever a user's rule raises outside of its place.
                derivative = key
            finally:
                self._in_rule = False
            self._rules[key] = self._number((equation.primitive, primal, derivative))
        return self._rules[key]


def _derivative(equation) -> tuple[Callable, list[Any]]:
    """The derivative of a function by its own rule, and the types of its arguments."""
    avals = [atom.aval for atom in equation.invars]
    floats = [i for i, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.inexact)]

    def of_floats(operands):
        def run(*given):
            filled = dict(zip(floats, given, strict=True))
            return _shims.bind(equation, [filled.get(i, one) for i, one in enumerate(operands)])

        return run, [operands[i] for i in floats]

    def forward(operands, tangents):
        run, given = of_floats(operands)
        return jax.jvp(run, given, tangents)

    def backward(operands, cotangents):
        run, given = of_floats(operands)
        return jax.vjp(run, *given)[1](cotangents)

    if has_own_tangents(equation):
        return forward, [avals, [avals[i] for i in floats]]
    return backward, [avals, [variable.aval for variable in equation.outvars]]


def _step_key(step: Any) -> Hashable:
    """What is planned for an equation, without names and identities."""
    if step is None:
        return None
    if isinstance(step, Entered):
        return tuple(
            tuple((index, _step_key(inner)) for index, inner in plan.equations.items())
            for plan in step.plans
        )
    loops = tuple((length, loop in step.stacked_over) for loop, length in step.loops)
    return step.recipe, step.weight, step.device_axes, loops


def _difference_of_steps(first: Any, second: Any) -> str:
    if isinstance(first, Entered) and isinstance(second, Entered):
        for plan, against in zip(first.plans, second.plans, strict=True):
            for index in sorted({*plan.equations, *against.equations}):
                pair = plan.equations.get(index), against.equations.get(index)
                if _step_key(pair[0]) != _step_key(pair[1]):
                    return _difference_of_steps(*pair)
    names, recipes = [], []
    for step in (first, second):
        sites = () if step is None else (step,) if isinstance(step, Site) else step.sites()
        names.append(sites[0].name if sites else "a product that is left out")
        recipes.append(sites[0].recipe if sites else None)
    if recipes[0] != recipes[1]:
        shown = [str(recipe if recipe is None else recipe.name).lower() for recipe in recipes]
        field = ""
        if None not in recipes and shown[0] == shown[1]:
            field = next(
                f": {part.name} differs"
                for part in dataclasses.fields(recipes[0])
                if getattr(recipes[0], part.name) != getattr(recipes[1], part.name)
            )
        return f"the recipes of {names[0]} ({shown[0]}) and of {names[1]} ({shown[1]}){field}"
    return f"which operands of {names[0]} and of {names[1]} are weights"


def _equations_of(jaxpr: Any, step: Any) -> list[tuple[Any, Any]]:
    planned = step.plans[0].equations if isinstance(step, Entered) else {}
    return [(one, planned.get(i)) for i, one in enumerate(_shims.open_jaxpr(jaxpr)[0].eqns)]


def _said(equation: Any) -> str:
    """An equation in words."""
    source = _shims.source_of(equation)
    return equation.primitive.name + (f" ({source})" if source else "")


@dataclasses.dataclass(frozen=True)
class Block:
    """An open jaxpr, made of the equations of another one."""

    constvars: tuple[Any, ...]
    consts: tuple[Any, ...]
    invars: tuple[Any, ...]
    eqns: tuple[Any, ...]
    outvars: tuple[Any, ...]
