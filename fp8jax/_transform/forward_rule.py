"""The forward rule of a `custom_vjp`, as a jaxpr that can be rewritten, with the user's own
backward rule kept.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import _shims


@dataclasses.dataclass(frozen=True)
class ForwardRule:
    """The forward rule of one equation.

    Args:
      jaxpr: closed, from the equation's operands to its outputs and, behind them, what the backward
        rule needs.
      num_outputs: of the equation itself.
      backward_tree: with what comes behind the outputs as leaves, the function that `jax.vjp`
        returns.
      differentiable: positions of the operands that have cotangents.
    """

    jaxpr: Any
    num_outputs: int
    backward_tree: Any
    differentiable: tuple[int, ...]

    def backward(self, kept: list, cotangents: list) -> list[Any]:
        """The cotangent of each operand by the user's rule; None for those that have none."""
        function: Callable = jax.tree.unflatten(self.backward_tree, kept)
        found = dict(zip(self.differentiable, function(cotangents), strict=True))
        return [
            found.get(position) for position in range(len(_shims.open_jaxpr(self.jaxpr)[0].invars))
        ]


def trace_forward_rule(equation: Any) -> tuple[ForwardRule | None, str]:
    """The forward rule of a `custom_vjp_call`, or None and why there is none.

    `jax.vjp` of the equation runs the user's forward rule, and returns the user's backward rule as
    a function that is a pytree: its leaves are the rule's residuals, so they can be outputs of a
    jaxpr, and the function be put together again.
    """
    if equation.params["num_consts"]:
        return None, "whose rules close over traced values; pass these as arguments"
    avals = [atom.aval for atom in equation.invars]
    differentiable = tuple(
        i for i, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.inexact)
    )
    found = {}

    def forward(*operands):
        def of_differentiable(*given):
            filled = dict(zip(differentiable, given, strict=True))
            return _shims.bind(
                equation, [filled.get(i, operand) for i, operand in enumerate(operands)]
            )

        outputs, backward = jax.vjp(of_differentiable, *(operands[i] for i in differentiable))
        kept, found["tree"] = jax.tree.flatten(backward)
        return outputs, kept

    try:
        jaxpr = jax.make_jaxpr(forward)(*avals)
    except jax.errors.UnexpectedTracerError:
        return None, "whose forward rule closes over traced values; pass these as arguments"
    return ForwardRule(jaxpr, len(equation.outvars), found["tree"], differentiable), ""
