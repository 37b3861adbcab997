"""Products with a weight that is held as FP8 codes: for inference, forward only.

The codes are used as they are. Where a scale is constant along what is summed over, it multiplies
the result; where it is one per block of that, the sum goes block by block; and where the other
operand stays wide, an eighth of the weight at a time is widened. So accelerators never hold a wide
copy of a weight. CPUs widen one product's weight at a time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.boxes import Boxes
from fp8jax.ops.cast import Codes, boxes_of, cast
from fp8jax.ops.dot import Dot
from fp8jax.ops.execution import Operand, in_rows, multiply
from fp8jax.ops.operands import observation, observe
from fp8jax.ops.product import Product
from fp8jax.recipe import CastSpec
from fp8jax.scaling import multiply_groups, scale_from_exponent
from fp8jax.state import SiteScales
from fp8jax.tensor import Fp8Tensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale"],
    meta_fields=["format", "scaling", "dtype", "name"],
)
@dataclasses.dataclass(frozen=True)
class NamedTensor(Fp8Tensor):
    """A weight on its way through a function: an `Fp8Tensor` of bytes, in `Boxes`, and what errors
    call it.
    """

    name: str = ""

    @classmethod
    def of(cls, tensor: Fp8Tensor, name: str) -> "NamedTensor":
        """A tensor, stacked or not, with a name."""
        q = tensor.as_bytes().as_boxes()
        return cls(q.data, q.scale, q.format, q.scaling, q.dtype, name)

    def as_operand(self) -> Codes:
        """As an operand of a product. Whether the scales are powers of two is not known, so they
        are taken for any.
        """
        q = self.as_codes()
        boxes = Boxes(q.scaling.block(q.shape))
        return Codes(q.data, q.scale, CastSpec(q.format, power_of_two=False), boxes)


def run_coded(
    product: Product,
    lhs: Any,
    rhs: Any,
    extra: Any,
    scales: SiteScales | None,
    quantized: bool = True,
) -> jax.Array:
    """`fp8jax.ops.product.run` where one operand is a `NamedTensor`: the recipe's cast of it is not
    needed.

    The other operand is cast as the recipe says; or not, where it has no cast for it or `quantized`
    is False.

    Raises:
      TypeError: where both operands are `NamedTensor`s.
      ValueError: where the weight's scales differ along several of the axes that are summed over.
      NotImplementedError: from a derivative.
    """
    if isinstance(lhs, NamedTensor) and isinstance(rhs, NamedTensor):
        raise TypeError(
            f"one operand of a product must be dense; got FP8 codes for both, {lhs.name} and "
            f"{rhs.name}. Dequantize one."
        )
    is_lhs = isinstance(lhs, NamedTensor)
    dense, weight = (rhs, lhs) if is_lhs else (lhs, rhs)
    return _run(product, is_lhs, quantized, dense, weight, extra, scales)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _run(
    product: Product, is_lhs: bool, quantized: bool, dense, weight: NamedTensor, extra, scales
):
    name = "rhs" if is_lhs else "lhs"
    spec = getattr(product.recipe.forward, name) if quantized else None
    operand = dense
    if spec is not None:
        delayed = spec.delayed is not None and not product.seeding
        scale = scale_from_exponent(getattr(scales, name)) if delayed else None
        operand = cast(dense, spec, boxes_of(spec.scaling, *product.axes("forward", name)), scale)
    codes = weight.as_operand()
    with jax.named_scope("forward"):
        if isinstance(product, Dot):
            return _dot(product, is_lhs, operand, codes, weight.name)
        return product.forward(*((codes, operand) if is_lhs else (operand, codes)), extra)


@_run.defjvp
def _refuse(product, is_lhs, quantized, primals, tangents):
    raise NotImplementedError(
        f"a product with a weight held as FP8 codes, {primals[1].name} here, has no derivative: it "
        "is for inference. "
        "Differentiate with dense weights, as of fp8jax.dequantize_params(params)."
    )


def _one_scale_each(codes: Codes, axes: list[int]) -> Codes:
    """The same with a scale for each index along some axes, where there were blocks, so that
    results can be multiplied by them.
    """
    scale, extents = codes.scale, list(codes.extents)
    for axis in axes:
        extent = extents[axis]
        if scale.shape[axis] > 1 and extent is not None and extent != 1:
            scale = lax.slice_in_dim(
                jnp.repeat(scale, extent, axis), 0, codes.data.shape[axis], axis=axis
            )
            extents[axis] = 1
    return dataclasses.replace(codes, scale=scale, boxes=Boxes(tuple(extents)))


def _dot(dot: Dot, is_lhs: bool, operand: Operand, codes: Codes, name: str) -> jax.Array:
    """The product, block by block of the weight's scales where these differ along what is summed
    over.
    """
    contracting = dot.dimension_numbers[0][0 if is_lhs else 1]
    codes = _one_scale_each(codes, [axis for axis in range(codes.ndim) if axis not in contracting])

    def product(operand, codes, out_dtype):
        lhs, rhs = (codes, operand) if is_lhs else (operand, codes)
        execution = "auto"
        if isinstance(operand, Codes):
            execution = dot.recipe.execution
            lhs, rhs = (
                in_rows(one, contracted, execution)
                for one, contracted in zip((lhs, rhs), dot.dimension_numbers[0])
            )
        return multiply(
            lhs,
            rhs,
            dot.dimension_numbers,
            out_dtype=out_dtype,
            precision=jax.lax.Precision.DEFAULT,
            execution=execution,
            out_sharding=dot.out_sharding,
        )

    def in_parts(operand, codes, axis, length):
        """The sum over parts of a contracted axis of the weight, in float32."""
        theirs = dot.dimension_numbers[0][1 if is_lhs else 0][contracting.index(axis)]

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
        return (total + part(whole * length, rest) if whole and rest else total).astype(
            dot.out_dtype
        )

    varying = [axis for axis in contracting if codes.scale.shape[axis] > 1]
    if not varying and isinstance(operand, Codes):
        return product(operand, codes, dot.out_dtype)
    if not varying:
        # Codes are widened where the other operand is wide: a part of them at a time.
        axis = max(contracting, key=lambda axis: codes.data.shape[axis])
        length = max(128, -(-codes.data.shape[axis] // 1024) * 128)
        return lax.platform_dependent(
            operand,
            codes,
            cpu=lambda operand, codes: product(operand, codes, dot.out_dtype),
            default=lambda operand, codes: in_parts(operand, codes, axis, length),
        )
    if len(varying) > 1:
        raise ValueError(
            f"scales of weight {name} must differ along one of the axes that are summed over at "
            "most; got scales of shape "
            f"{list(codes.scale.shape)}, which differ along {varying}. Quantize it in other groups."
        )
    return in_parts(operand, codes, varying[0], codes.extents[varying[0]])


def _part_of(operand: Operand, axis: int, start, length: int) -> Operand:
    """The elements from `start` on along an axis, with their scales. Of codes, `start` is a
    multiple of `length` or the last.
    """
    if not isinstance(operand, Codes):
        return lax.dynamic_slice_in_dim(operand, start, length, axis)
    data = lax.bitcast_convert_type(
        lax.dynamic_slice_in_dim(
            lax.bitcast_convert_type(operand.data, jnp.uint8), start, length, axis
        ),
        operand.data.dtype,
    )
    extent = operand.extents[axis]
    if extent is None or operand.scale.shape[axis] == 1:
        return dataclasses.replace(operand, data=data)
    if length % extent and extent % length:
        # Groups that straddle the weight's blocks: the values as they are.
        values = multiply_groups(
            operand.values(jnp.float32, scaled=False), operand.scale, operand.boxes
        )
        return lax.dynamic_slice_in_dim(values, start, length, axis)
    scale = lax.dynamic_slice_in_dim(operand.scale, start // extent, -(-length // extent), axis)
    extents = list(operand.extents)
    extents[axis] = None if scale.shape[axis] == 1 else extent
    return Codes(data, scale, operand.spec, Boxes(tuple(extents)))


def observe_dense(lhs: Any, rhs: Any, scales: SiteScales) -> SiteScales:
    """What a forward pass sees of the operand that is not held as codes, as an `observation`."""
    seen = {
        name: None if isinstance(operand, NamedTensor) else observe(operand, scales, name)
        for name, operand in (("lhs", lhs), ("rhs", rhs))
    }
    return observation(scales, **seen, grad=None)
