"""Weights held as FP8 codes, followed through what a function does to them on their way to a product.

Reshapes, transpositions, slices, casts and constraints of shardings move codes and scales alike, and make no wide array. Whatever else reads such a
weight raises, because it would need the values.
"""

import dataclasses
import math
from typing import Any, Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fp8jax import shims
from fp8jax.ops.coded import CodedWeight

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
    return any(isinstance(operand, CodedWeight) for operand in operands)


def follow(
    equation: Any,
    operands: Sequence[Any],
    evaluate_inner: Callable[[Any, Sequence[Any]], list[Any]],
) -> list[Any]:
    """The outputs of an equation that reads weights held as codes, and has no selected product inside.

    Args:
      equation: the equation.
      operands: its operands, some of them `CodedWeight`s.
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
    if name not in _RULES or not isinstance(weight, CodedWeight) or has_coded(rest):
        coded = next(operand for operand in operands if isinstance(operand, CodedWeight))
        raise _refusal(coded, f"it is read by {name}", equation)
    out = _RULES[name](weight, rest, equation)
    outs = out if isinstance(out, list) else [out]
    assert [own.shape for own in outs] == [variable.aval.shape for variable in equation.outvars]
    return outs


def layers_of(weight: CodedWeight) -> CodedWeight:
    """The weight for a scan over its leading axis, which takes codes and scales apart there."""
    first, *extents = weight.all_extents()
    scale = weight.scale
    if scale.shape[0] == 1:
        scale = jnp.broadcast_to(scale, (weight.shape[0], *scale.shape[1:]))
    elif first != 1:
        raise _refusal(weight, f"a scan takes it apart within blocks of {first}")
    return dataclasses.replace(weight, scale=scale, extents=tuple(extents))


def specs_of(weight: CodedWeight, spec: PartitionSpec, mesh: Any) -> CodedWeight:
    """The specs of codes and scales that go with a shard_map's spec of the weight, as a tree like it."""
    parts = tuple(spec) + (None,) * (weight.ndim - len(spec))
    of_scale = []
    for part, size, groups, extent in zip(
        parts, weight.shape, weight.scale.shape, weight.all_extents(), strict=True
    ):
        axes = part if isinstance(part, tuple) else () if part is None else (part,)
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if groups > 1 and (size // shards) % extent:
            raise _refusal(weight, f"a shard_map takes it apart within blocks of {extent}")
        of_scale.append(part if groups > 1 else None)
    return dataclasses.replace(weight, data=spec, scale=PartitionSpec(*of_scale))


def check_none_coded(values: Sequence[Any], what: str) -> None:
    """ValueError where a weight held as codes is among the values, which are `what`."""
    for value in values:
        if isinstance(value, CodedWeight):
            raise _refusal(value, f"it is {what}")


def _refusal(weight: CodedWeight, why: str, equation: Any = None) -> ValueError:
    out = (
        f" ({equation.outvars[0].aval.str_short()})"
        if equation is not None and equation.outvars
        else ""
    )
    return ValueError(
        f"weight {weight.name} is held as FP8 codes, which can only be reshaped, transposed, sliced, cast to other floats, and "
        f"multiplied by products that are selected; got another use: {why}{out}. Leave it out of quantize_params by a rule with "
        "scaling=None, dequantize it, or quantize it in groups that fit."
    )


def _cast(weight: CodedWeight, _, equation) -> CodedWeight:
    dtype = jnp.dtype(equation.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise _refusal(weight, f"it is cast to {dtype}", equation)
    return dataclasses.replace(weight, dtype=dtype)


def _transpose(weight: CodedWeight, _, equation) -> CodedWeight:
    order, extents = equation.params["permutation"], weight.all_extents()
    return dataclasses.replace(
        weight,
        data=jnp.transpose(weight.data, order),
        scale=jnp.transpose(weight.scale, order),
        extents=tuple(extents[axis] for axis in order),
    )


def _squeeze(weight: CodedWeight, _, equation) -> CodedWeight:
    gone = equation.params["dimensions"]
    extents = weight.all_extents()
    return dataclasses.replace(
        weight,
        data=lax.squeeze(weight.data, gone),
        scale=lax.squeeze(weight.scale, gone),
        extents=tuple(extent for axis, extent in enumerate(extents) if axis not in gone),
    )


def _broadcast(weight: CodedWeight, _, equation) -> CodedWeight:
    shape, kept = equation.params["shape"], equation.params["broadcast_dimensions"]
    if math.prod(shape) != math.prod(weight.shape) or any(
        shape[axis] != size for axis, size in zip(kept, weight.shape)
    ):
        raise _refusal(weight, f"it is broadcast to {list(shape)}", equation)
    groups, extents = [1] * len(shape), [None] * len(shape)
    for axis, size, extent in zip(kept, weight.scale.shape, weight.all_extents()):
        groups[axis], extents[axis] = size, extent
    return dataclasses.replace(
        weight,
        data=weight.data.reshape(shape),
        scale=weight.scale.reshape(groups),
        extents=tuple(extents),
    )


def _constrain(weight: CodedWeight, _, equation) -> CodedWeight:
    # The scales are left to the compiler, which puts them where the codes are.
    return dataclasses.replace(weight, data=shims.bind(equation, [weight.data])[0])


def _split(weight: CodedWeight, _, equation) -> list[CodedWeight]:
    axis, parts, start = equation.params["axis"], [], 0
    for size in equation.params["sizes"]:
        starts, limits = [0] * weight.ndim, list(weight.shape)
        starts[axis], limits[axis] = start, start + size
        parts.append(_part(weight, starts, limits, [1] * weight.ndim, equation))
        start += size
    return parts


def _slice(weight: CodedWeight, _, equation) -> CodedWeight:
    strides = equation.params["strides"] or (1,) * weight.ndim
    return _part(
        weight,
        equation.params["start_indices"],
        equation.params["limit_indices"],
        strides,
        equation,
    )


def _part(
    weight: CodedWeight,
    starts: Sequence[int],
    limits: Sequence[int],
    strides: Sequence[int],
    equation: Any,
) -> CodedWeight:
    bounds = []
    for axis, (start, limit, stride, extent) in enumerate(
        zip(starts, limits, strides, weight.all_extents())
    ):
        size = weight.shape[axis]
        if weight.scale.shape[axis] == 1:
            bounds.append((0, 1, 1))
        elif extent == 1:
            bounds.append((start, limit, stride))
        elif start % extent == 0 and stride == 1 and (limit % extent == 0 or limit == size):
            bounds.append((start // extent, -(-limit // extent), 1))
        else:
            raise _refusal(
                weight,
                f"it is sliced within a block of {extent}, from {start} to {limit}",
                equation,
            )
    scale = lax.slice(weight.scale, *zip(*bounds)) if bounds else weight.scale
    return dataclasses.replace(
        weight, data=lax.slice(weight.data, starts, limits, strides), scale=scale
    )


def _dynamic_slice(weight: CodedWeight, starts, equation) -> CodedWeight:
    sizes, of_scale, at = equation.params["slice_sizes"], [], []
    for axis, (start, size, extent) in enumerate(zip(starts, sizes, weight.all_extents())):
        groups = weight.scale.shape[axis]
        if groups == 1 or size == weight.shape[axis]:
            of_scale.append(groups)
            at.append(jnp.zeros_like(start))
        elif extent == 1:
            of_scale.append(size)
            at.append(start)
        else:
            raise _refusal(
                weight,
                f"it is sliced within a block of {extent}, at a place that is known when it runs",
                equation,
            )
    return dataclasses.replace(
        weight,
        data=lax.dynamic_slice(weight.data, starts, sizes),
        scale=lax.dynamic_slice(weight.scale, at, of_scale),
    )


def _reshape(weight: CodedWeight, _, equation) -> CodedWeight:
    shape, all_extents = equation.params["new_sizes"], weight.all_extents()
    if equation.params.get("dimensions") is not None or 0 in shape:
        raise _refusal(weight, "it is reshaped in another order of its axes, or is empty", equation)
    groups, extents = [1] * len(shape), [None] * len(shape)
    for before, after in _matching_axes(weight.shape, shape):
        old = [(weight.shape[axis], weight.scale.shape[axis], all_extents[axis]) for axis in before]
        own = _regrouped(old, [shape[axis] for axis in after])
        if own is None:
            why = f"it is reshaped to {list(shape)}, which tears the groups of scales {list(weight.scale.shape)} apart"
            raise _refusal(weight, why, equation)
        for axis, (count, extent) in zip(after, own):
            groups[axis], extents[axis] = count, extent
    return dataclasses.replace(
        weight,
        data=weight.data.reshape(shape),
        scale=weight.scale.reshape(groups),
        extents=tuple(extents),
    )


def _matching_axes(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of two shapes that hold the same elements, in order; axes of one element left out.

    >>> _matching_axes((6, 4, 1, 5), (2, 3, 20))
    [([0], [0, 1]), ([1, 3], [2])]
    """
    old, new = ([axis for axis, size in enumerate(shape) if size > 1] for shape in (before, after))
    runs = []
    while old:
        left, right = [old.pop(0)], [new.pop(0)]
        while (of_left := math.prod(before[axis] for axis in left)) != (
            of_right := math.prod(after[axis] for axis in right)
        ):
            if of_left < of_right:
                left.append(old.pop(0))
            else:
                right.append(new.pop(0))
        runs.append((left, right))
    return runs


def _regrouped(
    old: Sequence[tuple[int, int, int | None]], new: Sequence[int]
) -> list[tuple[int, int | None]] | None:
    """Number and extent of the groups along new axes that hold the elements of old ones, as (size, groups, extent).

    None where no boxes along the new axes are these groups.

    >>> _regrouped([(6, 3, 2), (4, 1, None)], [24]), _regrouped([(8, 2, 4)], [4, 2]), _regrouped([(8, 2, 4)], [8 // 2, 2])
    ([(3, 8)], [(2, 2), (1, None)], [(2, 2), (1, None)])
    >>> _regrouped([(4, 1, None), (6, 6, 1)], [24]) is None
    True
    """
    if [size for size, *_ in old] == list(new):
        return [(groups, extent) for _, groups, extent in old]
    # A group must be a run of elements: single along the first axes, a part of one axis, whole along those behind it.
    run, is_whole = 1, True
    for size, groups, extent in reversed(old):
        extent = size if groups == 1 else extent
        if size % extent or (not is_whole and extent != 1):
            return None
        run, is_whole = run * extent, is_whole and extent == size
    found = []
    for size in reversed(new):
        extent = min(size, run)
        if run % extent or size % extent:
            return None
        found.append((size // extent, None if extent == size else extent))
        run //= extent
    return found[::-1]


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
