"""Weights held as FP8 codes, followed through what a function does to them on their way to a
product.

Reshapes, transpositions, slices, casts, concatenations and constraints of shardings move codes and
scales alike, and make no wide array. Rows and parts that are looked up are decoded where something
needs their values, and nothing else is. Whatever else reads such a weight raises.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fp8jax import _shims
from fp8jax._boxes import Boxes, TornGroups
from fp8jax._transform.analysis import PRODUCTS
from fp8jax._transform.names import PRODUCT
from fp8jax._transform.products import read_rows, uncast_product_of
from fp8jax.ops._cast import Codes
from fp8jax.ops._coded import run_coded
from fp8jax.ops._ragged import is_over_rows


class NeedsValues(ValueError):
    """A weight held as codes is read by what needs its values.

    Args:
      weight: its path.
      why: what reads it, as the end of a sentence.
    """

    def __init__(self, weight: str, why: str):
        self.weight, self.why = weight, why
        super().__init__(in_words([(weight, why)]))


_REMEDY = (
    "reshaped, transposed, sliced, concatenated with its like, cast to other floats, looked up by "
    "rows, and multiplied"
)


def in_words(uses: Sequence[tuple[str, str]]) -> str:
    """What to say of uses of weights that need their values: pairs of a weight and why."""
    if len(uses) == 1:
        ((weight, why),) = uses
        got = (
            f"weight {weight} is held as FP8 codes, which can only be {_REMEDY}; got another use: "
            f"{why}"
        )
    else:
        listed = "".join(f"\n  weight {weight}: {why};" for weight, why in uses)
        got = (
            f"weights that are held as FP8 codes can only be {_REMEDY}; got {len(uses)} other "
            f"uses:{listed[:-1]}"
        )
    return (
        f"{got}. Leave it out of quantize_params by a rule with scaling=None, dequantize it, or "
        "quantize it in groups that fit."
    )


def has_coded(operands: Sequence[Any]) -> bool:
    """Whether a weight held as codes is among the operands."""
    return any(isinstance(operand, Codes) for operand in operands)


def values_of(operands: Sequence[Any]) -> list[Any]:
    """The operands, decoded where they are weights held as codes."""
    return [operand.dequantize() if isinstance(operand, Codes) else operand for operand in operands]


def follow(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of an equation that reads weights held as codes, and has no jaxpr inside.

    A product that is not selected uses the codes too, and leaves the other operand as it is.

    Args:
      equation: the equation.
      operands: its operands, some of them `Codes`s.

    Raises:
      NeedsValues: where it needs the values.
    """
    name = equation.primitive.name
    if name in _PASSED_ON:
        return list(operands)
    if name in _OVER_DEVICES:
        return [_on_arrays(operand, equation) for operand in operands]
    weight, *rest = operands
    if name in PRODUCTS and not has_coded(rest[1:]):
        return [_multiply(equation, operands)]
    is_followed = isinstance(weight, Codes) and (
        name == "concatenate" or name in _RULES and not has_coded(rest)
    )
    if not is_followed and all(operand.is_part for operand in operands if has_coded([operand])):
        return _shims.bind(equation, values_of(operands))
    if not is_followed:
        coded = next(operand for operand in operands if isinstance(operand, Codes))
        raise _refusal(coded, f"it is read by {name}", equation)
    try:
        out = _RULES[name](weight, rest, equation)
    except TornGroups as error:
        raise _refusal(weight, error.why, equation) from None
    outs = out if isinstance(out, list) else [out]
    assert [own.shape for own in outs] == [variable.aval.shape for variable in equation.outvars]
    return outs


def layers_of(weight: Codes) -> Codes:
    """The weight for a scan over its leading axis, which takes codes and scales apart there."""
    first, *extents = weight.scaling.block(weight.shape)
    scale = weight.scale
    if scale.shape[0] == 1:
        scale = jnp.broadcast_to(scale, (weight.shape[0], *scale.shape[1:]))
    elif first != 1:
        raise _refusal(weight, f"a scan takes it apart within blocks of {first}")
    return dataclasses.replace(weight, scale=scale, scaling=Boxes(tuple(extents)), outer=0)


def specs_of(weight: Codes, spec: PartitionSpec, mesh: Any) -> Codes:
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


def check_none_coded(values: Sequence[Any], what: str) -> list[Any]:
    """The values, which are `what`, with parts that were looked up decoded.

    Raises:
      NeedsValues: where a weight held as codes is among them.
    """
    for value in values:
        if isinstance(value, Codes) and not value.is_part:
            raise _refusal(value, f"it is {what}")
    return values_of(values)


def _refusal(weight: Codes, why: str, equation: Any = None) -> NeedsValues:
    out = (
        f" ({equation.outvars[0].aval.str_short()})"
        if equation is not None and equation.outvars
        else ""
    )
    return NeedsValues(weight.name, why + out)


def _multiply(equation: Any, operands: Sequence[Any]) -> jax.Array:
    if equation.primitive.name == "ragged_dot_general" and not is_over_rows(equation.params):
        coded = next(operand for operand in operands if isinstance(operand, Codes))
        raise _refusal(coded, "it is read by a product over groups of what is summed", equation)
    operands, of_result = read_rows(equation, list(operands))
    lhs, rhs, *extra = operands
    product = uncast_product_of(equation, lhs, rhs, mirrored=isinstance(lhs, Codes))
    with jax.named_scope(PRODUCT):
        out, _ = run_coded(product, lhs, rhs, tuple(extra), None, quantized=False)
    return of_result(out)


def _cast(weight: Codes, _, equation) -> Codes:
    dtype = jnp.dtype(equation.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise _refusal(weight, f"it is cast to {dtype}", equation)
    return weight.astype(dtype)


def _transpose(weight: Codes, _, equation) -> Codes:
    order = equation.params["permutation"]
    return dataclasses.replace(weight.transpose(order), outer=order.index(weight.outer))


def _broadcast(weight: Codes, _, equation) -> Codes:
    shape = equation.params["shape"]
    if math.prod(shape) != math.prod(weight.shape):
        raise _refusal(weight, f"it is broadcast to {list(shape)}", equation)
    return _reshaped(weight, shape)


def _reshape(weight: Codes, _, equation) -> Codes:
    if equation.params.get("dimensions") is not None:
        raise _refusal(weight, "it is reshaped in another order of its axes", equation)
    return _reshaped(weight, equation.params["new_sizes"])


def _reshaped(weight: Codes, shape: Sequence[int]) -> Codes:
    return dataclasses.replace(weight.reshape(shape), outer=0)


def _some(equation, *names: str) -> list[Any]:
    return [equation.params[name] for name in names]


def _constrain(weight: Codes, _, equation) -> Codes:
    # The scales are left to the compiler, which puts them where the codes are.
    return dataclasses.replace(weight, data=_shims.bind(equation, [weight.data])[0])


def _dynamic_slice(weight: Codes, starts, equation) -> Codes:
    part = weight.dynamic_slice(starts, equation.params["slice_sizes"])
    return dataclasses.replace(part, is_part=True)


def _on_arrays(operand: Any, equation) -> Any:
    """What an equation does to an array, done to codes and scales."""
    return jax.tree.map(lambda array: _shims.bind(equation, [array])[0], operand)


def _concatenate(weight: Codes, others, equation) -> Codes:
    parts = [weight, *others]
    if not all(isinstance(part, Codes) for part in parts):
        raise _refusal(weight, "it is concatenated with what is held in another way", equation)
    if len({part.format for part in parts}) > 1:
        formats = ", ".join(part.format.name for part in parts)
        raise _refusal(weight, f"it is concatenated with codes of other formats, {formats}")
    joined = weight.concatenate(others, equation.params["dimension"])
    return dataclasses.replace(joined, name=" and ".join(dict.fromkeys(p.name for p in parts)))


def _gather(weight: Codes, operands, equation) -> jax.Array:
    """The slices that are looked up, decoded."""
    (indices,), params = operands, equation.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    values = weight.gather(indices, numbers, sizes).as_codes().dequantize()
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return values
    # Clipped so far: what is out of bounds is what is out of bounds of an array of ones.
    looked_up = [axis in numbers.start_index_map for axis in range(weight.ndim)]
    batched = [axis in numbers.operand_batching_dims for axis in range(weight.ndim)]
    ones = jnp.ones(
        [n if i or b else 1 for n, i, b in zip(weight.shape, looked_up, batched)], jnp.uint8
    )
    inside = lax.gather(
        ones,
        indices,
        numbers,
        tuple(size if i else 1 for size, i in zip(sizes, looked_up)),
        mode=lax.GatherScatterMode.FILL_OR_DROP,
        fill_value=0,
    )
    fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
    return jnp.where(inside > 0, values, jnp.asarray(fill, values.dtype))


_RULES = {
    "convert_element_type": _cast,
    "transpose": _transpose,
    "squeeze": lambda weight, _, equation: _reshaped(weight, equation.outvars[0].aval.shape),
    "broadcast_in_dim": _broadcast,
    "slice": lambda weight, _, equation: weight.slice(
        *_some(equation, "start_indices", "limit_indices", "strides")
    ),
    "dynamic_slice": _dynamic_slice,
    "reshape": _reshape,
    "sharding_constraint": _constrain,
    "split": lambda weight, _, equation: weight.split(*_some(equation, "sizes", "axis")),
    "concatenate": _concatenate,
    "gather": _gather,
}
_OVER_DEVICES = ("pvary", "pcast")
_PASSED_ON = ("copy", "copy_p", "optimization_barrier", "name")
