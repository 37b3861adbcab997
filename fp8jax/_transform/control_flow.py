"""The primitives that run jaxprs of their own: all that this library knows of each, in one place.

`flow_of` reads an equation as a `Flow` of some `Kind`: where its jaxprs are, how its operands map
to their inputs, and which public function of JAX makes it again. Analysis, weights that are cast
ahead, codes that are followed and evaluation know the kinds, and no primitive. To have one more
primitive entered, add it to `FLOWS`.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fp8jax import _shims
from fp8jax._transform.forward_rule import trace_forward_rule


class Kind(enum.Enum):
    """What an equation does with its bodies, and how `Flow.again` is called for it."""

    CALL = "runs its body once: again(function, **options)(given, *inputs)"
    RECOMPUTED = "the same, and again in the backward pass"
    BRANCHES = "runs one of its bodies: again(index, functions, given, *inputs)"
    LOOP = "runs its body once an iteration, on slices: again(function, carry, slices, **options)"
    WHILE = "runs its body while its condition holds: again(condition, function, carry)"
    DEVICES = "runs its body on each device's part: again(function, **options)(given, *inputs)"
    CUSTOM_JVP = "has tangents by the user's rule: again(operands), as it is"
    CUSTOM_VJP = "has a backward pass by the user's rule; its body is the forward rule"
    CLOSED = "can't be entered, since `why`: again(operands), as it is"


@dataclasses.dataclass(frozen=True)
class Flow:
    """An equation that runs jaxprs on its operands.

    Args:
      kind: how.
      bodies: these jaxprs, closed or open.
      again: the public function of JAX that makes such an equation.
      options: its keyword arguments.
      num_own: how many operands in front no body reads: the index of a conditional, what the
        condition of a while loop reads beside the carry.
      num_consts, num_carry: how many inputs of a loop's body are constants, and then carried; it
        runs on slices of the others.
      condition: the jaxpr of a while loop's.
      rule: the `ForwardRule` of a `custom_vjp`.
      why: what a closed one is.
    """

    kind: Kind
    bodies: Sequence[Any]
    again: Callable
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_own: int = 0
    num_consts: int = 0
    num_carry: int = 0
    condition: Any = None
    rule: Any = None
    why: str = ""

    @property
    def is_loop(self) -> bool:
        """Whether its body runs more than once."""
        return self.kind in (Kind.LOOP, Kind.WHILE)

    @property
    def takes_casts(self) -> bool:
        """Whether weights can be cast in front of it, and handed in."""
        return self.kind not in (Kind.DEVICES, Kind.CUSTOM_JVP, Kind.CUSTOM_VJP)

    @property
    def is_differentiated(self) -> bool:
        """Whether JAX takes derivatives of what is inside."""
        return self.kind not in (Kind.WHILE, Kind.CUSTOM_VJP)

    def parts(self, operands: Sequence[Any]) -> list[list[Any]]:
        """The operands, or what stands for them: its own, constants, carry, and the others."""
        ends = (0, *itertools.accumulate((self.num_own, self.num_consts, self.num_carry)), None)
        return [list(operands[start:end]) for start, end in itertools.pairwise(ends)]


def flow_of(equation: Any, differentiated: bool = True) -> Flow | None:
    """How an equation runs the jaxprs inside, or None where there are none, or none known.

    Args:
      equation: the equation.
      differentiated: False where no derivative is taken of it.
    """
    read = FLOWS.get(equation.primitive.name)
    if read is _custom_vjp and not differentiated:
        read = _inlined
    return read and read(equation)


def _jit(equation) -> Flow:
    def again(function, name):
        function.__name__ = function.__qualname__ = name
        return lambda given, *operands: jax.jit(
            function, **_shims.jit_options(equation.params, operands)
        )(given, *operands)

    return Flow(Kind.CALL, [equation.params["jaxpr"]], again, {"name": equation.params["name"]})


def _inlined(equation) -> Flow:
    """What JAX's own rules make, or what is as good as its body."""
    return Flow(Kind.CALL, [equation.params["call_jaxpr"]], lambda function: function)


def _remat(equation) -> Flow:
    options = _some(equation, "prevent_cse", "policy")
    return Flow(Kind.RECOMPUTED, [equation.params["jaxpr"]], jax.checkpoint, options)


def _scan(equation) -> Flow:
    options = _some(equation, "length", "reverse", "unroll")
    consts, carry = _shims.scan_counts(equation.params)
    body = equation.params["jaxpr"]
    return Flow(Kind.LOOP, [body], jax.lax.scan, options, num_consts=consts, num_carry=carry)


def _while(equation) -> Flow:
    params = equation.params
    return Flow(
        Kind.WHILE,
        [params["body_jaxpr"]],
        jax.lax.while_loop,
        num_own=params["cond_nconsts"],
        num_consts=params["body_nconsts"],
        num_carry=len(equation.outvars),
        condition=params["cond_jaxpr"],
    )


def _cond(equation) -> Flow:
    platforms = equation.params.get("branches_platforms")

    def of_platforms(_, branches, *inputs):
        named = {
            name: branch
            for names, branch in zip(platforms, branches, strict=True)
            for name in names or ("default",)
        }
        return jax.lax.platform_dependent(*inputs, **named)

    again = jax.lax.switch if platforms is None else of_platforms
    return Flow(Kind.BRANCHES, equation.params["branches"], again, num_own=1)


def _custom_jvp(equation) -> Flow:
    bind = functools.partial(_shims.bind, equation)
    return Flow(Kind.CUSTOM_JVP, [equation.params["call_jaxpr"]], bind)


def _custom_vjp(equation) -> Flow:
    rule, problem = trace_forward_rule(equation)
    bind = functools.partial(_shims.bind, equation)
    if rule is None:
        return Flow(Kind.CLOSED, [], bind, why=f"a custom_vjp {problem}")
    return Flow(Kind.CUSTOM_VJP, [rule.jaxpr], bind, rule=rule)


def _shard_map(equation) -> Flow:
    options = _some(equation, "mesh", "in_specs", "check_vma")
    options["axis_names"] = _shims.manual_axes(equation.params)
    options["out_specs"] = list(equation.params["out_specs"])
    return Flow(Kind.DEVICES, [equation.params["jaxpr"]], jax.shard_map, options)


def _some(equation, *names: str) -> dict[str, Any]:
    return {name: equation.params[name] for name in names}


FLOWS: dict[str, Callable[[Any], Flow]] = {
    "jit": _jit,
    "closed_call": _inlined,
    "eval_jaxpr": _inlined,  # what newer JAX calls it
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
}
# What to do about products in primitives that can't be entered.
INSTEAD = {
    "pallas_call": ": use fp8jax.ops.dot_general in the place of the kernel, or cast in the kernel "
    "itself",
    "custom_linear_solve": ": solvers need the products in full precision",
}


def is_extendable(equation: Any) -> bool:
    """Whether its parameter "jaxpr" can be given one more input, for a literal inside."""
    return FLOWS.get(equation.primitive.name) in (_jit, _remat)


def primal_of(equation: Any) -> Any:
    """The jaxpr of a function with a derivative of its own; None of other equations."""
    ruled = FLOWS.get(equation.primitive.name) in (_custom_jvp, _custom_vjp)
    return equation.params["call_jaxpr"] if ruled else None


def has_own_tangents(equation: Any) -> bool:
    """Whether that derivative is one of tangents."""
    return FLOWS.get(equation.primitive.name) is _custom_jvp
