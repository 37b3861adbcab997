"""Weights held as FP8 codes, followed through what a function does to them on their way to a
product.

Reshapes, transpositions, slices, casts and constraints of shardings move codes and scales alike,
and make no wide array. Whatever else reads such a weight raises, because it would need the values.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fp8jax import shims
from fp8jax.boxes import Boxes, TornGroups
from fp8jax.ops.coded import NamedTensor

# Primitives that pass one jaxpr's operands on to it, by the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def has_coded(operands: Sequence[Any]) -> bool:
    """Whether a weight held as codes is among the operands."""
    return any(isinstance(operand, NamedTensor) for operand in operands)


def follow(
    equation: Any,
    operands: Sequence[Any],
    evaluate_inner: Callable[[Any, Sequence[Any]], list[Any]],
) -> list[Any]:
    """The outputs of an equation that reads weights held as codes, and has no selected product
    inside.

    Args:
      equation: the equation.
      operands: its operands, some of them `NamedTensor`s.
      evaluate_inner: the outputs of a jaxpr for operands.

    Raises:
      ValueError: where it needs the values.
    """
    name = equation.primitive.name
    if name in _CALLS:
        return evaluate_inner(equation.params[_CALLS[name]], operands)
    if name in _PASSED_ON:
        return list(operands)
    weight, *rest = operands
    if name not in _RULES or not isinstance(weight, NamedTensor) or has_coded(rest):
        coded = next(operand for operand in operands if isinstance(operand, NamedTensor))
        raise _refusal(coded, f"it is read by {name}", equation)
    try:
        out = _RULES[name](weight, rest, equation)
    except TornGroups as error:
        raise _refusal(weight, str(error), equation) from None
    outs = out if isinstance(out, list) else [out]
    assert [own.shape for own in outs] == [variable.aval.shape for variable in equation.outvars]
    return outs


def layers_of(weight: NamedTensor) -> NamedTensor:
    """The weight for a scan over its leading axis, which takes codes and scales apart there."""
    first, *extents = weight.scaling.block(weight.shape)
    scale = weight.scale
    if scale.shape[0] == 1:
        scale = jnp.broadcast_to(scale, (weight.shape[0], *scale.shape[1:]))
    elif first != 1:
        raise _refusal(weight, f"a scan takes it apart within blocks of {first}")
    return dataclasses.replace(weight, scale=scale, scaling=Boxes(tuple(extents)))


def specs_of(weight: NamedTensor, spec: PartitionSpec, mesh: Any) -> NamedTensor:
    """The specs of codes and scales that go with a shard_map's spec of the weight, as a tree like
    it.
    """
    parts = tuple(spec) + (None,) * (weight.ndim - len(spec))
    of_scale = []
    for part, size, groups, extent in zip(
        parts, weight.shape, weight.scale.shape, weight.scaling.block(weight.shape), strict=True
    ):
        axes = part if isinstance(part, tuple) else () if part is None else (part,)
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if groups > 1 and extent is not None and (size // shards) % extent:
            raise _refusal(weight, f"a shard_map takes it apart within blocks of {extent}")
        of_scale.append(part if groups > 1 else None)
    return dataclasses.replace(weight, data=spec, scale=PartitionSpec(*of_scale))


def check_none_coded(values: Sequence[Any], what: str) -> None:
    """ValueError where a weight held as codes is among the values, which are `what`."""
    for value in values:
        if isinstance(value, NamedTensor):
            raise _refusal(value, f"it is {what}")


def _refusal(weight: NamedTensor, why: str, equation: Any = None) -> ValueError:
    out = (
        f" ({equation.outvars[0].aval.str_short()})"
        if equation is not None and equation.outvars
        else ""
    )
    return ValueError(
        f"weight {weight.name} is held as FP8 codes, which can only be reshaped, transposed, "
        "sliced, cast to other floats, and "
        f"multiplied by products that are selected; got another use: {why}{out}. Leave it out of "
        "quantize_params by a rule with "
        "scaling=None, dequantize it, or quantize it in groups that fit."
    )


def _cast(weight: NamedTensor, _, equation) -> NamedTensor:
    dtype = jnp.dtype(equation.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise _refusal(weight, f"it is cast to {dtype}", equation)
    return weight.astype(dtype)


def _squeeze(weight: NamedTensor, _, equation) -> NamedTensor:
    return weight.reshape(equation.outvars[0].aval.shape)


def _broadcast(weight: NamedTensor, _, equation) -> NamedTensor:
    shape = equation.params["shape"]
    if math.prod(shape) != math.prod(weight.shape):
        raise _refusal(weight, f"it is broadcast to {list(shape)}", equation)
    return weight.reshape(shape)


def _reshape(weight: NamedTensor, _, equation) -> NamedTensor:
    if equation.params.get("dimensions") is not None:
        raise _refusal(weight, "it is reshaped in another order of its axes", equation)
    return weight.reshape(equation.params["new_sizes"])


def _constrain(weight: NamedTensor, _, equation) -> NamedTensor:
    # The scales are left to the compiler, which puts them where the codes are.
    return dataclasses.replace(weight, data=shims.bind(equation, [weight.data])[0])


def _transpose(weight: NamedTensor, _, equation) -> NamedTensor:
    return weight.transpose(equation.params["permutation"])


def _slice(weight: NamedTensor, _, equation) -> NamedTensor:
    bounds = (equation.params[name] for name in ("start_indices", "limit_indices", "strides"))
    return weight.slice(*bounds)


def _dynamic_slice(weight: NamedTensor, starts, equation) -> NamedTensor:
    return weight.dynamic_slice(starts, equation.params["slice_sizes"])


def _split(weight: NamedTensor, _, equation) -> list[NamedTensor]:
    return weight.split(equation.params["sizes"], equation.params["axis"])


_RULES = {
    "convert_element_type": _cast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "reshape": _reshape,
    "sharding_constraint": _constrain,
    "split": _split,
}
_PASSED_ON = ("copy", "copy_p", "optimization_barrier", "name")
