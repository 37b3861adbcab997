"""`dot_general` of an operand and a weight that is held as FP8 codes, which are used as they are.

Where a scale is constant along what is summed over, it multiplies the result. Where it is not, but
is constant along the weight's other axes, it multiplies the other operand, before that is cast.
Where it is one per block of what is summed over, the sum goes block by block. In all other cases,
and where the other operand stays wide, a part of the weight at a time is widened. So accelerators
never hold a wide copy of a weight. CPUs widen one product's weight at a time.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.boxes import Boxes
from fp8jax.ops.cast import Codes
from fp8jax.ops.dot import Dot
from fp8jax.ops.execution import DimensionNumbers, Operand, in_rows, multiply
from fp8jax.ops.shardings import divided_like

# Blocks of fewer elements than this along what is summed over are multiplied in with the codes:
# one product for each would be too small.
_SMALLEST_BLOCK = 32


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

    def _multiply(self, lhs, rhs, dimension_numbers, out_dtype, precision, out_sharding):
        operand, codes = (rhs, lhs) if self.is_lhs else (lhs, rhs)
        theirs, contracting = self._contracting(dimension_numbers)
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

        def in_parts(operand, codes, axis, length):
            return _sum_of_parts(
                product, operand, codes, theirs[contracting.index(axis)], axis, length
            ).astype(out_dtype)

        if is_by_block:
            return in_parts(operand, codes, varying[0], codes.extents[varying[0]])
        if not contracting or not varying and isinstance(operand, Codes):
            return whole(operand, codes)
        # The values of the codes are multiplied: of a part of them at a time.
        axis = max(contracting, key=lambda axis: codes.data.shape[axis])
        unit = math.lcm(128, (codes.extents[axis] or 1) if axis in varying else 1)
        length = max(unit, -(-codes.data.shape[axis] // (8 * unit)) * unit)
        return lax.platform_dependent(
            operand,
            codes,
            cpu=whole,
            default=lambda operand, codes: in_parts(operand, codes, axis, length),
        )

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


def _sum_of_parts(product, operand: Operand, codes: Codes, theirs: int, axis: int, length: int):
    """The sum over parts of a contracted axis of the weight, which is `theirs` in the other
    operand, in float32.
    """

    def part(start, length):
        return product(
            _part_of(operand, theirs, start, length),
            _part_of(codes, axis, start, length),
            jnp.float32,
        )

    whole, rest = divmod(codes.data.shape[axis], length)
    total = part(0, length) if whole else part(0, rest)
    if whole > 1:
        rows = jnp.arange(1, whole, dtype=jnp.int32)
        total, _ = lax.scan(
            lambda total, index: (total + part(index * length, length), None), total, rows
        )
    return total + part(whole * length, rest) if whole and rest else total


def _part_of(operand: Operand, axis: int, start, length: int) -> Operand:
    """The elements from `start` on along an axis, with their scales. Of codes, `start` is a
    multiple of `length` or the last.
    """
    if not isinstance(operand, Codes):
        return lax.dynamic_slice_in_dim(operand, start, length, axis)
    data = lax.dynamic_slice_in_dim(operand.as_bytes().data, start, length, axis)
    part = dataclasses.replace(operand, data=data).as_codes()
    extent = operand.extents[axis]
    if extent is None or operand.scale.shape[axis] == 1:
        return part
    if length % extent and extent % length:
        # Groups that straddle the weight's blocks: the values as they are.
        return lax.dynamic_slice_in_dim(
            operand.values(jnp.float32, scaled=True), start, length, axis
        )
    scale = lax.dynamic_slice_in_dim(operand.scale, start // extent, -(-length // extent), axis)
    extents = list(operand.extents)
    extents[axis] = None if scale.shape[axis] == 1 else extent
    return dataclasses.replace(part, scale=scale, scaling=Boxes(tuple(extents)))
