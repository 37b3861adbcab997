"""`dot_general` of an operand and a weight that is held as FP8 codes, which are used as they are.

Where a scale is constant along what is summed over, it multiplies the result. Where it is not, but
is constant along the weight's other axes, it multiplies the other operand, before that is cast.
Where it is one per block of what is summed over, the sum goes block by block. In all other cases,
and where the other operand stays wide, a part of the weight at a time is widened. So no device
holds a wide copy of a weight.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import _xla
from fp8jax._boxes import Boxes
from fp8jax.devices import division_of
from fp8jax.ops._cast import Codes
from fp8jax.ops._dot import Dot
from fp8jax.ops._execution import DimensionNumbers, Operand, in_rows, multiply
from fp8jax.ops._shardings import divided_like

# Blocks of fewer elements than this along what is summed over are multiplied in with the codes:
# one product for each would be too small.
_SMALLEST_BLOCK = 32
# Values of a weight that a CPU widens at a time, and about what their number along an axis is a
# multiple of.
_IN_CACHE, _UNIT = 1 << 20, 64

# A part of an operand along an axis: which one, how long all but the last are, and this one.
PartOf = Callable[[Any, int, int], Operand]


@dataclasses.dataclass(frozen=True)
class CodedDot(Dot):
    """A `dot_general` whose lhs or rhs is the codes of a weight, in the forward product and in the
    other operand's gradient.

    Args:
      is_lhs: whether the weight is the lhs.
    """

    is_lhs: bool

    @classmethod
    def of(cls, dot: Dot, is_lhs: bool) -> "CodedDot":
        """The same product."""
        fields = {field.name: getattr(dot, field.name) for field in dataclasses.fields(dot)}
        return cls(**fields, is_lhs=is_lhs)

    reads_values = False  # Beside codes, codes are multiplied natively.

    def _multiply(self, which, lhs, rhs, out_dtype, precision, out_sharding):
        dimension_numbers = self._numbers(which)
        operand, codes = (rhs, lhs) if self.is_lhs else (lhs, rhs)
        theirs, contracting = self._contracting(dimension_numbers)
        batch = dimension_numbers[1][not self.is_lhs]
        varying = [axis for axis in contracting if codes.scale.shape[axis] > 1]
        is_by_block = len(varying) == 1 and codes.extents[varying[0]] >= _SMALLEST_BLOCK
        if not varying or is_by_block:
            others = [axis for axis in range(codes.ndim) if axis not in contracting]
            codes = codes.separated(others)
        options = {"out_sharding": out_sharding, "precision": precision}

        def product(operand, codes, out_dtype):
            lhs, rhs = (codes, operand) if self.is_lhs else (operand, codes)
            execution = "auto"
            if isinstance(operand, Codes):
                execution = self.recipe.execution
                lhs, rhs = (
                    in_rows(one, contracted, execution)
                    for one, contracted in zip((lhs, rhs), dimension_numbers[0])
                )
            return multiply(
                lhs, rhs, dimension_numbers, out_dtype=out_dtype, execution=execution, **options
            )

        def whole(operand, codes):
            return product(operand, codes, out_dtype)

        def in_parts(operand, part_of, axis, length):
            their_axis, size = theirs[contracting.index(axis)], codes.data.shape[axis]
            return _sum_of_parts(product, operand, part_of, their_axis, size, length).astype(
                out_dtype
            )

        def on_cpu(operand, codes):
            axis, length = _part_in_cache(codes, batch)
            # Where devices may have a part each, those would go around.
            if axis is None or division_of(codes.data):
                return whole(operand, codes)
            size = codes.data.shape[axis]
            part_of = _parts_in_place(codes, axis)
            if axis in contracting:
                return in_parts(operand, part_of, axis, length)
            kept = [one for one in range(codes.ndim) if one not in (*batch, *contracting)]
            theirs = 0 if self.is_lhs else operand.ndim - len(contracting) - len(batch)
            at = len(batch) + theirs + kept.index(axis)
            return _joined_parts(whole, operand, part_of, at, size, length)

        def on_others(operand, codes):
            if not contracting or not varying and isinstance(operand, Codes):
                return whole(operand, codes)
            # The values of the codes are multiplied: of a part of them at a time.
            axis = max(contracting, key=lambda axis: codes.data.shape[axis])
            unit = math.lcm(128, (codes.extents[axis] or 1) if axis in varying else 1)
            length = max(unit, -(-codes.data.shape[axis] // (8 * unit)) * unit)
            return in_parts(operand, _parts(codes, axis), axis, length)

        def by_block(parts_of, operand, codes):
            axis = varying[0]
            return in_parts(operand, parts_of(codes, axis), axis, codes.extents[axis])

        if is_by_block:
            on_cpu, on_others = (
                functools.partial(by_block, parts_of) for parts_of in (_parts_in_place, _parts)
            )
        return lax.platform_dependent(operand, codes, cpu=on_cpu, default=on_others)

    def _contracting(self, dimension_numbers: DimensionNumbers):
        """What is summed over: the other operand's axes, and the weight's."""
        return dimension_numbers[0][:: -1 if self.is_lhs else 1]

    def folded(self, product: str, operand: jax.Array, codes: Codes) -> tuple[jax.Array, Codes]:
        """The operands of one of the products, with the weight's scales in the other operand where
        they differ along what is summed over, and along no other axis than batches.

        Relative to the largest one, so that the other operand grows nowhere; powers of two leave
        its bits as they are.
        """
        numbers = self._numbers(product)
        theirs, contracting = self._contracting(numbers)
        their_batch, batch = numbers[1][:: -1 if self.is_lhs else 1]
        varying = [axis for axis, groups in enumerate(codes.scale.shape) if groups > 1]
        if not set(varying) & set(contracting) or set(varying) - {*contracting, *batch}:
            return operand, codes
        codes = codes.separated(varying)
        largest = jnp.max(codes.scale, axis=contracting, keepdims=True)
        factor = codes.scale / jnp.where(largest > 0, largest, 1)
        places = dict(zip((*their_batch, *theirs), (*batch, *contracting), strict=True))
        order = [places[axis] for axis in sorted(places)]
        factor = jnp.transpose(factor, order + [a for a in range(codes.ndim) if a not in order])
        factor = factor.reshape(
            [codes.scale.shape[places[a]] if a in places else 1 for a in range(operand.ndim)]
        )
        factor = divided_like(lax.stop_gradient(factor), operand)
        wide = operand.astype(jnp.float32) * factor
        boxes = Boxes(
            tuple(
                None if axis in contracting else extent for axis, extent in enumerate(codes.extents)
            )
        )
        return (
            wide.astype(operand.dtype) if operand.dtype == jnp.bfloat16 else wide,
            dataclasses.replace(codes, scale=largest, scaling=boxes),
        )


def _sum_of_parts(product, operand: Operand, part_of: PartOf, theirs: int, size: int, length: int):
    """The sum over parts of a contracted axis of the weight, of `size` elements, which is `theirs`
    in the other operand, in float32.
    """
    part_of_operand = _parts(operand, theirs)

    def part(index, size):
        both = part_of_operand(index, length, size), part_of(index, length, size)
        return product(*both, jnp.float32)

    whole, rest = divmod(size, length)
    total = part(0, length) if whole else part(0, rest)
    if whole > 1:
        indices = jnp.arange(1, whole, dtype=jnp.int32)
        total, _ = lax.scan(
            lambda total, index: (total + part(index, length), None), total, indices
        )
    return total + part(whole, rest) if whole and rest else total


def _joined_parts(product, operand: Operand, part_of: PartOf, at: int, size: int, length: int):
    """The products of parts of the weight along one of its kept axes, of `size` elements, which is
    the axis `at` of the result.
    """
    like = jax.eval_shape(lambda: product(operand, part_of(0, length, length)))

    def with_part(out, index, size):
        part = product(operand, part_of(index, length, size))
        return lax.dynamic_update_slice_in_dim(out, part, index * length, at)

    whole, rest = divmod(size, length)
    out, _ = lax.scan(
        lambda out, index: (with_part(out, index, length), None),
        jnp.zeros((*like.shape[:at], size, *like.shape[at + 1 :]), like.dtype),
        jnp.arange(whole, dtype=jnp.int32),
    )
    return with_part(out, whole, rest) if rest else out


def _part_in_cache(codes: Codes, batch: tuple[int, ...]) -> tuple[int | None, int]:
    """An axis of a weight, and how much of it a CPU should widen at a time: along the one whose
    parts lie in one piece; None of a weight that is small enough, or all batch.
    """
    axes = sorted(range(codes.ndim), key=lambda axis: axis != codes.outer)
    axes = [axis for axis in axes if axis not in batch and codes.data.shape[axis] > 1]
    if codes.data.size <= _IN_CACHE or not axes:
        return None, codes.data.size
    axis = axes[0]
    extent = codes.extents[axis] if codes.scale.shape[axis] > 1 else None
    unit = max(extent or 1, _UNIT // (extent or 1) * (extent or 1))
    rest = codes.data.size // codes.data.shape[axis]
    length = max(1, _IN_CACHE // (unit * rest)) * unit
    return (axis if length < codes.data.shape[axis] else None), length


def _parts(operand: Operand, axis: int) -> PartOf:
    """Parts of an operand along an axis, codes with their scales."""

    def part_of(index, length, size):
        start = index * length
        if not isinstance(operand, Codes):
            return lax.dynamic_slice_in_dim(operand, start, size, axis)
        data = lax.dynamic_slice_in_dim(operand.as_bytes().data, start, size, axis)
        part = dataclasses.replace(operand, data=data).as_codes()
        extent = operand.extents[axis]
        if extent is None or operand.scale.shape[axis] == 1:
            return part
        if length % extent and extent % length:
            # Groups that straddle the parts: the values as they are.
            values = operand.values(jnp.float32, scaled=True)
            return lax.dynamic_slice_in_dim(values, start, size, axis)
        scale = lax.dynamic_slice_in_dim(operand.scale, start // extent, -(-size // extent), axis)
        extents = list(operand.extents)
        extents[axis] = None if scale.shape[axis] == 1 else extent
        return dataclasses.replace(part, scale=scale, scaling=Boxes(tuple(extents)))

    return part_of


def _parts_in_place(codes: Codes, axis: int) -> PartOf:
    """Parts of a weight along an axis, taken where it lies."""
    # A loop would have a transposed weight copied in front of it: so the parts are transposed.
    order = (axis, *(other for other in range(codes.ndim) if other != axis))
    back = tuple(map(order.index, range(codes.ndim)))
    is_moved = axis == codes.outer
    lying, first = (codes.transpose(order), 0) if is_moved else (codes, axis)

    def part_of(index, length, size):
        data, index = _xla.in_place(lying.data, index)
        part = _parts(dataclasses.replace(lying, data=data), first)(index, length, size)
        return part.transpose(back) if is_moved else part

    return part_of
