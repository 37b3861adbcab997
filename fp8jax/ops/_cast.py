"""The operands of a product as FP8 codes: which elements share a scale, and where the scale comes
from.

To a product, an operand is a matrix: *kept* axes, which the result has too, and *contracted* ones,
which are summed over; the rest are batches. Granularities count in these, so one recipe fits
operands of all layouts:

    PerTensor()          one scale for the operand
    PerToken()           one for each vector along all contracted axes: "row-wise"
    BlockWise((a, b))    one for each box of `a` elements of the last kept and `b` of the last
                         contracted axis

An operand that several products contract over different axes is thus cast once for each, from its
original.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from fp8jax import _xla
from fp8jax._boxes import Boxes
from fp8jax._codec import decode_bits, encode_bits
from fp8jax._conversion import convert, is_convertible
from fp8jax._recipe import OPERANDS, PRODUCTS, CastSpec
from fp8jax._scaling import (
    BlockWise,
    PerTensor,
    PerToken,
    Scaling,
    fitting_scale,
    group_amax,
    multiply_groups,
    scale_from_amax,
    scale_from_exponent,
)
from fp8jax._tensor import Fp8Tensor
from fp8jax.devices import device_of


def boxes_of(
    scaling: Scaling, ndim: int, kept: tuple[int, ...], contracted: tuple[int, ...]
) -> Scaling:
    """`scaling` of an operand with these axes, in the operand's own layout.

    >>> from fp8jax import BlockWise
    >>> boxes_of(PerToken(), 3, kept=(0, 2), contracted=(1,))
    Boxes(extents=(1, None, 1))
    >>> boxes_of(BlockWise((128, 128)), 3, kept=(0, 1), contracted=(2,))
    Boxes(extents=(1, 128, 128))
    """
    if isinstance(scaling, PerTensor):
        return scaling
    extents: list[int | None] = [1] * ndim
    if isinstance(scaling, PerToken):
        for axis in contracted:
            extents[axis] = None
    elif isinstance(scaling, BlockWise):
        for axes, extent in zip((kept, contracted), scaling.extents, strict=True):
            if axes:
                extents[axes[-1]] = extent
    return Boxes(tuple(extents))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["row"], meta_fields=["operand"])
@dataclasses.dataclass(frozen=True)
class ReadyScale:
    """The scale of a site's operand, with what casts and products read of it made before.

    Attributes:
      row: float32 `[15]` of the site, see `row_of`.
      operand: lhs, rhs or grad (static).
    """

    row: jax.Array
    operand: str

    @property
    def scale(self) -> jax.Array:
        """Itself."""
        return self.row[OPERANDS.index(self.operand)]

    @property
    def inverse(self) -> jax.Array:
        """Of the scale."""
        return self.row[len(OPERANDS) + OPERANDS.index(self.operand)]

    @property
    def exponent(self) -> jax.Array:
        """Of the scale, as the state has it."""
        return self.row[OPERANDS.index(self.operand) - len(OPERANDS)]

    def halves(self, other: "ReadyScale") -> tuple[jax.Array, jax.Array]:
        """`halves` of this scale and the one of the other operand of a product."""
        operands = self.operand, other.operand
        at = 2 * len(OPERANDS) + list(PRODUCTS.values()).index(operands)
        # One of each row: on CPUs, either may wait for what is observed of its operand.
        return self.row[at], other.row[at + len(PRODUCTS)]


def row_of(exponents: jax.Array) -> jax.Array:
    """What a site's casts and products read of its scales.

    Args:
      exponents: float32 `[..., 3]`, of lhs, rhs and grad.

    Returns:
      float32 `[..., 15]`: the scales; their inverses; of both operands' scales, of the forward
      product, of dlhs and of drhs, the first of the `halves`, and the second ones; the exponents.

    >>> row = row_of(jnp.array([3.0, -1.0, 0.0]))
    >>> lhs, rhs = ReadyScale(row, "lhs"), ReadyScale(row, "rhs")
    >>> lhs.scale, lhs.inverse, lhs.halves(rhs)[0] * lhs.halves(rhs)[1]
    (Array(8., dtype=float32), Array(0.125, dtype=float32), Array(4., dtype=float32))
    >>> lhs.exponent
    Array(3., dtype=float32)
    """
    scales = scale_from_exponent(exponents)
    of_operand = [scales[..., index : index + 1] for index in range(len(OPERANDS))]
    pairs = (
        jnp.concatenate([of_operand[OPERANDS.index(name)] for name in names], axis=-1)
        for names in zip(*PRODUCTS.values(), strict=True)
    )
    return jnp.concatenate([scales, inverse_of(scales), *halves(*pairs), exponents], axis=-1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "ready"],
    meta_fields="format scaling dtype power_of_two is_state order name is_part outer".split(),
)
@dataclasses.dataclass(frozen=True)
class Codes(Fp8Tensor):
    """An `Fp8Tensor` inside a function: an operand of a product, or a weight on its way to one.

    Attributes:
      data, scale, format, scaling, dtype: as of an `Fp8Tensor`; groups are `Boxes`, or all.
      power_of_two: whether the scales are known to be (static). Then the values, scales multiplied
        in, are exact in bfloat16: codes always are, and powers of two change no bits.
      is_state: whether the scale is the site's, which is not kept with the codes (static).
      ready: the scale, where it was made before.
      order: of its axes while it is kept, see `as_kept`; None for their own (static).
      name: of a weight, for errors (static).
      is_part: whether it is a part of a weight that was looked up (static).
      outer: of a weight, the axis that was the first one before it was transposed, where parts of
        it lie in memory each in one piece (static).
    """

    power_of_two: bool = False
    is_state: bool = False
    ready: ReadyScale | None = None
    order: tuple[int, ...] | None = None
    name: str = ""
    is_part: bool = False
    outer: int = 0

    @classmethod
    def of(cls, data: Any, scale: Any, spec: CastSpec, scaling: Scaling, **fields: Any) -> Self:
        """What a cast makes; of abstract values, too."""
        own = {"power_of_two": spec.power_of_two, "is_state": spec.delayed is not None}
        return cls(data, scale, spec.format, scaling, **own, **fields)

    @classmethod
    def of_weight(cls, q: Fp8Tensor, name: str) -> Self:
        """A weight, stacked or not, as bytes. Whether its scales are powers of two isn't known."""
        q = q.as_bytes().as_boxes()
        return cls(q.data, q.scale, q.format, q.scaling, q.dtype, name=name)

    def is_separable(self, contracted: tuple[int, ...]) -> bool:
        """Whether all that is summed into one element of a result has one scale, so that it can be
        multiplied in after.
        """
        shape = self.scaling.group_shape(self.data.shape)
        return not shape or all(
            groups == 1 if axis in contracted else groups in (1, size)
            for axis, (groups, size) in enumerate(zip(shape, self.data.shape))
        )

    def values(
        self,
        dtype: DTypeLike,
        *,
        scaled: bool,
        decode: Callable[[jax.Array, DTypeLike], jax.Array] = decode_bits,
    ) -> jax.Array:
        """The decoded codes, with their scales multiplied in or without."""
        values = decode(self.data, dtype)
        return multiply_groups(values, self.scale.astype(dtype), self.scaling) if scaled else values

    def as_kept(self) -> Self:
        """As bytes to be stacked and sliced, their axes in `order`, in which they then lie in
        memory; float8 on TPUs, which read slices of it in the products.
        """
        # Elsewhere uint8, for XLA widens what a CPU slices.
        on_tpu = device_of(self.data).platform == "tpu"
        if on_tpu or self.data.dtype == jnp.uint8:
            return self
        kept = self.as_bytes()._moved(self.order)
        if self.order is None:
            return kept
        return dataclasses.replace(kept, data=_xla.row_major(kept.data))

    def as_codes(self) -> Self:
        """As codes again, their axes in the operand's order."""
        if self.data.dtype == self.format.dtype:
            return self
        inverse = None if self.order is None else tuple(np.argsort(self.order).tolist())
        return super().as_codes()._moved(inverse)

    def _moved(self, order: tuple[int, ...] | None) -> Self:
        """The codes alone, in another order."""
        if order is None:
            return self
        before = self.ndim - len(order)  # Axes of a stack come first.
        order = (*range(before), *(before + axis for axis in order))
        return dataclasses.replace(self, data=jnp.transpose(self.data, order))


def cast(
    operand: jax.Array,
    spec: CastSpec,
    boxes: Scaling,
    scale: jax.Array | ReadyScale | None = None,
    *,
    in_memory: bool = False,
) -> Codes:
    """An operand's codes.

    Args:
      operand: float array.
      spec: format, rounding, and the kind of scales.
      boxes: which elements share a scale, in the operand's layout.
      scale: float32 of `boxes.group_shape(operand.shape)`, or a number made ready; by default it
        fits the operand's own finite amaxes.
      in_memory: whether the operand is there, see `group_amax`.

    >>> codes = cast(jnp.array([[1.0, -3.0]]), CastSpec("E4M3"), PerTensor())
    >>> codes.data, codes.scale
    (Array([[128, -384]], dtype=float8_e4m3fn), Array(0.0078125, dtype=float32))
    """
    if scale is None:
        scale = fitting(operand, spec, boxes, in_memory=in_memory)
    ready = None
    if isinstance(scale, ReadyScale):
        ready, scale, inverse = scale, scale.scale, scale.inverse
    else:
        inverse = inverse_of(scale) if spec.power_of_two else 1 / scale
    data = _codes_of(operand, inverse, spec, boxes)
    return Codes.of(data, scale, spec, boxes, dtype=operand.dtype, ready=ready)


def fitting(
    operand: jax.Array, spec: CastSpec, boxes: Scaling, *, in_memory: bool = False
) -> jax.Array:
    """The scale that fits an operand's own finite amaxes; arguments as of `cast`."""
    margin = 1.0 if spec.delayed is None else spec.delayed.margin
    if spec.power_of_two and margin == 1:
        return fitting_scale(operand, boxes, spec.format, in_memory=in_memory)
    amax = group_amax(operand, boxes, in_memory=in_memory)
    return scale_from_amax(amax, spec.format, margin, spec.power_of_two)


def _codes_of(operand: jax.Array, inverse: jax.Array, spec: CastSpec, boxes: Scaling) -> jax.Array:
    """An operand multiplied by the inverse of its scale, as codes: by what is fast on the
    device.
    """
    static = {"spec": spec, "boxes": boxes}

    def on_cpu(operand, inverse):
        return _xla.called(_on_cpu, operand, inverse, **static)

    by_integers = functools.partial(_by_integers, **static)
    if not is_convertible(spec.format, spec.rounding):
        return lax.platform_dependent(operand, inverse, cpu=on_cpu, default=by_integers)
    converted = functools.partial(_by_conversion, **static)
    figures = device_of(operand).figures
    to_nearest = figures is not None and figures.converts_to_nearest
    return lax.platform_dependent(
        operand,
        inverse,
        cpu=on_cpu,
        cuda=functools.partial(converted, round_first=False) if to_nearest else by_integers,
        tpu=functools.partial(converted, round_first=True),
        default=by_integers,
    )


def _scaled(operand, inverse, boxes):
    """An operand by its scale, and what says which of it is finite."""
    # In float32 whatever the operand is: a float16 would overflow, and a power of two changes no
    # bits.
    wide = operand.astype(jnp.float32)
    scaled = multiply_groups(wide, inverse, boxes)
    # Groups have scales that fit, which leave finite values so; and an operand two casts, in groups
    # along either product's sum. By their own values they have nothing in common, which XLA for
    # GPUs would write. One scale may be state; and its one cast has the operand's in common with
    # the amax: by its own, unrolled layers under `current` take 1.08 times the launches.
    return scaled, wide if isinstance(boxes, PerTensor) else scaled


def _overflow(spec: CastSpec) -> str:
    return "clip" if spec.clip_infinities else "saturate"


def _by_integers(operand, inverse, spec, boxes):
    x, source = _scaled(operand, inverse, boxes)
    options = {"rounding": spec.rounding, "overflow": _overflow(spec)}
    return encode_bits(x, spec.format, source=source, **options)


def _on_cpu(operand, inverse, spec, boxes):
    return _by_integers(_xla.before_cast(operand), inverse, spec, boxes)


def _by_conversion(operand, inverse, spec, boxes, round_first):
    scaled = _scaled(operand, inverse, boxes)
    return convert(*scaled, spec.format, _overflow(spec), round_first=round_first)


def inverse_of(scale: jax.Array) -> jax.Array:
    """Of powers of two, exactly.

    >>> inverse_of(jnp.float32(8))
    Array(0.125, dtype=float32)
    """
    return lax.bitcast_convert_type(
        np.int32(254 << 23) - lax.bitcast_convert_type(scale, np.int32), np.float32
    )


def halves(*scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two factors of a scale, or of the product of two, each of about half its exponent: the first
    a power of two, the second what is left.

    A product multiplied by the first and then by the second neither overflows nor vanishes on the
    way where the result doesn't, as it might if multiplied by its operands' scales one after the
    other.

    >>> halves(jnp.float32(2.0**-7))
    (Array(0.0625, dtype=float32), Array(0.125, dtype=float32))
    >>> halves(jnp.float32(3 * 2.0**-100), jnp.float32(2.0**90))
    (Array(0.03125, dtype=float32), Array(0.09375, dtype=float32))
    """
    # With exponents d and e, the upper byte of the sum of two positive numbers' patterns is
    # floor((d + e) / 2) + 127, and a 1 for each mantissa that makes it so.
    one, other = (
        lax.bitcast_convert_type(scale, np.uint32) for scale in (*scales, np.float32(1))[:2]
    )
    first = lax.shift_right_logical(one + other, np.uint32(24)) << np.uint32(23)
    inverse = np.uint32(254 << 23) - first
    first, inverse = (lax.bitcast_convert_type(pattern, np.float32) for pattern in (first, inverse))
    return first, functools.reduce(jnp.multiply, scales[1:], scales[0] * inverse)


def halves_of_powers(*scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`halves` of powers of two, normal numbers, in fewer operations.

    >>> halves_of_powers(jnp.float32(2.0**-7))
    (Array(0.0625, dtype=float32), Array(0.125, dtype=float32))
    >>> halves_of_powers(jnp.float32(2.0**-100), jnp.float32(2.0**91))
    (Array(0.03125, dtype=float32), Array(0.0625, dtype=float32))
    """
    one, other = (
        lax.bitcast_convert_type(scale, np.uint32) for scale in (*scales, np.float32(1))[:2]
    )
    both = one + other
    first = lax.shift_right_logical(both, np.uint32(24)) << np.uint32(23)
    first, second = (
        lax.bitcast_convert_type(pattern, np.float32) for pattern in (first, both - first)
    )
    return first, second
