"""Moments of gradients as FP8 codes of the parameter's own shape, with a scale for each block of up
to 128 elements.

A moment's scale has to be known before the moment is, if each element is to be computed once. So it
comes from a bound: the new moment, ``b * old + (1 - b) * g``, is nowhere larger than the same sum
of the blocks' amaxes, and the old one's amax is that of its codes.

Range expansion. Within a block, moments span fewer powers of two than a format does, or more. COAT
(arXiv 2410.19313, section 4) therefore stores ``x**k``, with ``k`` chosen for each block so that
its dynamic range fills the format's. Here ``k`` is a power of two, and the power is taken with
Mitchell's logarithm (IRE Trans. EC-11, 1962), ``log2(2**e * (1 + m)) ≈ e + m``, which is what the
bits of a float are: a shift of these, exact to undo and the same on every device. It moves bits
between exponent and mantissa: with ``k`` = 2, E4M3 has E3M4's steps, with 1/2, E5M2's. Between
neighboring normal values the power is linear, so that stochastic rounding of it is unbiased in the
moment itself.

Second moments: a block's range is from its largest to its smallest value that is not zero. Steps of
a twelfth are coarse for what changes by a thousandth at a time, and one that became zero would make
its element's update explode: none does.

First moments cross zero, so their own smallest value says little. Adam divides them by the root of
the second: what is lost of one matters where it is more than a part of that root. So a block's
range is from its largest first moment to the smallest root of a second moment, and one or two
powers of two below. With E4M3, ``k`` = 2 holds a ratio of 2^6 between both, 1 one of 2^16
(gradients that differ by 1e4 within a block), 1/2 one of 2^33 (1e9), and 1/4 one beyond 2^60, with
4, 3, 2 and 1 bits of mantissa. Lion has no second moment; there it is the smallest first one.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from fp8jax._codec import decode_bits, encode_bits
from fp8jax._formats import E4M3, Format, get_format
from fp8jax._scaling import (
    BlockWise,
    PerTensor,
    Scaling,
    group_amax,
    merge_groups,
    split_groups,
    spread_groups,
)
from fp8jax._state_dicts import register_state_dict

BLOCK = 128
POWERS = (2, 1, 0, -1, -2)  # as exponents of two
# Powers of two below the smallest root of a second moment that a first one's codes reach. With the
# power 2, the first code is farther from zero, in parts of a step.
MARGINS = {1: 2, 0: 1, -1: 1}
_ONE = np.int32(127 << 23)  # the bits of 1.0
_MANTISSA = np.int32((1 << 23) - 1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "power"],
    meta_fields=["format", "scaling"],
)
@dataclasses.dataclass(frozen=True)
class Fp8Moment:
    """A moment of gradients: ``decode(data)**(1 / 2**power) * scale``, the power of the magnitude,
    the sign kept.

    A pytree node. `data` has the parameter's shape, and `scale` its rank; the parameter's sharding
    fits `data`, and `scale` where each axis has enough blocks to divide.

    Attributes:
      data: float8 codes of the parameter's shape.
      scale: float32 powers of two, one per block.
      power: int8, one per block, from -2 to 2. The power is taken on Mitchell's logarithm, see
        `fp8jax.optim._moments`.
      format: the `Format` of `data` (static).
      scaling: the blocks (static).

    >>> moment = Fp8Moment.zeros(jnp.ones((4, 256)), E4M3)
    >>> moment.data.shape, moment.scale.shape, moment.nbytes, moment.dequantize().sum()
    ((4, 256), (4, 2), 1064, Array(0., dtype=float32))
    """

    data: jax.Array
    scale: jax.Array
    power: jax.Array
    format: Format
    scaling: Scaling

    @classmethod
    def zeros(cls, param: jax.Array, fmt: Format) -> "Fp8Moment":
        """Zeros for a parameter, sharded as it is."""
        scaling = blocks_of(param.shape)
        # Of the parameter, so that its sharding carries over; of the codes, so that nothing wide is
        # made.
        data = jnp.zeros_like(param, dtype=fmt.dtype)
        scale = group_amax(jnp.zeros_like(param, dtype=jnp.bfloat16), scaling) + np.float32(1)
        return cls(data, scale, scale.astype(jnp.int8) * np.int8(0), fmt, scaling)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the moment."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and powers."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def dequantize(self) -> jax.Array:
        """The moment, float32."""
        return merge_groups(self.values(self._blocks()), self.shape, self.scaling)

    def magnitudes(self) -> jax.Array:
        """uint8 codes without their signs, split into blocks; 0 for NaNs and infinities."""
        split, _ = split_groups(lax.bitcast_convert_type(self.data, np.uint8), self.scaling)
        codes = split & np.uint8(0x7F)
        return jnp.where(codes <= np.uint8(self.format.max_code), codes, np.uint8(0))

    def reversed_magnitudes(self) -> jax.Array:
        """The same, of what is not zero counted from the top down: their maxima belong to the
        smallest magnitudes.
        """
        codes = self.magnitudes()
        return jnp.where(
            codes > np.uint8(0), np.uint8(self.format.max_code + 1) - codes, np.uint8(0)
        )

    def smallest(self, maxima: jax.Array) -> jax.Array:
        """For each block its smallest magnitude that is not zero, or 0; float32, from the maxima of
        `reversed_magnitudes`.
        """
        top = np.uint8(self.format.max_code + 1)
        return self._of_codes(jnp.where(maxima > np.uint8(0), top - maxima, np.uint8(0)))

    def plan(
        self,
        maxima: jax.Array,
        decay: jax.Array,
        added: jax.Array,
        smallest: jax.Array,
        signed: bool,
    ) -> "tuple[_Blocks, _Blocks]":
        """How blocks are held now, and how the next moment's are to be: `decay` times this one and
        something more.

        Args:
          maxima: of each block, of `magnitudes`; of the shape of `scale`.
          decay: float32 scalar in [0, 1].
          added: float32, for each block the largest magnitude of what is added.
          smallest: float32, for each block the smallest magnitude that is to be held well, 0 where
            it isn't known.
          signed: whether it is a first moment.
        """
        old = self._blocks()
        # A little more, because what the bound is computed with has been rounded.
        bound = lax.bitcast_convert_type(
            (decay * self._of_codes(maxima) + added) * np.float32(1 + 2.0**-20), np.int32
        )
        choose = _power_of_first if signed else _power_of_second
        power = choose(old.power, bound, lax.bitcast_convert_type(smallest, np.int32), self.format)
        limit = _ONE + _shifted(_bits(self.format.max) - _ONE, -power)
        # The smallest power of two by which the bound fits: the patterns' difference, whole binades
        # rounded up.
        exponent = lax.shift_right_arithmetic(bound - limit + _MANTISSA, np.int32(23))
        return old, _Blocks(
            lax.clamp(np.int32(-126), exponent, np.int32(126)) + np.int32(127), power
        )

    def values(self, old: "_Blocks") -> jax.Array:
        """The moment, float32, split into blocks that are held as `plan` says."""
        split, _ = split_groups(lax.bitcast_convert_type(self.data, np.uint8), self.scaling)
        values = decode_bits(lax.bitcast_convert_type(split, self.format.dtype))
        values = _root(values, self._spread(old.power), self.format)
        return values * _scale(self._spread(old.exponent))

    def store(
        self, split: jax.Array, new: "_Blocks", bits: jax.Array | None, signed: bool
    ) -> "Fp8Moment":
        """The next moment from its values, split into blocks that are to be held as `plan` says.

        It is rounded stochastically by `bits`, uniform uint32 like `split`, or to nearest without.
        """
        scaled = split * _scale(np.int32(254) - self._spread(new.exponent))
        least, power = np.float32(self.format.min_subnormal), self._spread(new.power)
        magnitude = lax.abs(scaled) if signed else scaled
        expanded = _power(magnitude, power)
        if (
            signed
        ):  # Linear below the smallest code: what is rounded there stochastically is unbiased too.
            smallest = _root(least, new.power, self.format)
            linear = magnitude * self._spread(least / smallest)
            expanded = jnp.where(magnitude < self._spread(smallest), linear, expanded)
        else:  # A second moment that is not zero doesn't become it.
            expanded = lax.max(expanded, least)
        ordinary = (magnitude > 0) & (magnitude < np.float32(np.inf))
        if signed:
            expanded = _copy_sign(expanded, scaled)
        scaled = jnp.where(ordinary, expanded, scaled)
        rounding = "nearest" if bits is None else "stochastic"
        codes = encode_bits(scaled, self.format, rounding, overflow="ocp", noise=bits)
        data = merge_groups(lax.bitcast_convert_type(codes, np.uint8), self.shape, self.scaling)
        return dataclasses.replace(
            self,
            data=lax.bitcast_convert_type(data, self.format.dtype),
            scale=_scale(new.exponent),
            power=new.power.astype(np.int8),
        )

    def _blocks(self) -> "_Blocks":
        return _Blocks(
            lax.shift_right_logical(lax.bitcast_convert_type(self.scale, np.int32), np.int32(23)),
            self.power.astype(np.int32),
        )

    def _of_codes(self, codes: jax.Array) -> jax.Array:
        """The values of a code per block, uint8, of a magnitude."""
        values = decode_bits(lax.bitcast_convert_type(codes, self.format.dtype))
        return _root(values, self.power.astype(np.int32), self.format) * self.scale

    def _spread(self, groups: jax.Array) -> jax.Array:
        return spread_groups(groups, self.shape, self.scaling)


register_state_dict(Fp8Moment, "data", "scale", "power")


class _Blocks(NamedTuple):
    """How blocks are held: int32, the biased exponents of their scales, and their powers."""

    exponent: jax.Array
    power: jax.Array


def blocks_of(shape: tuple[int, ...]) -> Scaling:
    """Blocks of up to 128 elements: along the last axis, and where that is shorter, along those
    before it too.

    Along an axis they have an extent that divides it, if one within a factor of two of the largest
    does.

    >>> blocks_of((512, 1024)), blocks_of((64, 10))
    (BlockWise(block_shape=(128,)), BlockWise(block_shape=(8, 10)))
    >>> blocks_of((784, 200)), blocks_of(())
    (BlockWise(block_shape=(100,)), PerTensor())
    """
    if not shape:
        return PerTensor()
    extents, room = [], BLOCK
    for size in reversed(shape):
        divisors = (
            [size]
            if size <= room
            else [extent for extent in range(room, (room + 1) // 2 - 1, -1) if size % extent == 0]
        )
        extents.insert(0, max(1, divisors[0] if divisors else room))
        room //= extents[0]
        if room < 2:
            break
    return BlockWise(tuple(extents))


def moment_format(name: str, dtype) -> Format | np.dtype:
    """What a moment is held in, from the argument `name` of an optimizer: an FP8 format, E4M3 for
    None, or a wider dtype.
    """
    if dtype is None:
        return E4M3
    try:
        fmt = get_format(dtype)
        if fmt.signed:
            return fmt
    except ValueError:
        with contextlib.suppress(TypeError):
            wide = np.dtype(dtype)
            if wide in (np.float32, jnp.bfloat16, np.float16, np.float64):
                return wide
    raise ValueError(
        f"{name} must be an FP8 format of signed values, its name or its dtype, or a floating "
        "dtype to hold the moment "
        f"unquantized; got {dtype!r}. Leave it out for E4M3."
    )


def _bits(value: float) -> np.int32:
    return np.float32(value).view(np.int32)


def _shifted(pattern: Any, power: jax.Array) -> jax.Array:
    """An int32 times ``2**power``, rounded down; powers from -2 to 2."""
    # XLA has shifts by 32 and more give 0, in further instructions; masks show that there are none.
    up, down = (lax.max(amount, np.int32(0)) & np.int32(3) for amount in (power, -power))
    return (pattern << up) >> down


def _power(values: jax.Array, power: jax.Array) -> jax.Array:
    """``values**(2**power)`` on Mitchell's logarithm, of positive values; those below 2^-63 as
    that, not to overflow.
    """
    log = lax.max(lax.bitcast_convert_type(values, np.int32) - _ONE, np.int32(-63 << 23))
    return lax.bitcast_convert_type(_shifted(log, power) + _ONE, np.float32)


def _root(values: ArrayLike, power: jax.Array, fmt: Format) -> jax.Array:
    """What `_power` makes a format's values of, whatever their signs; zeros, infinities and NaNs
    stay.
    """
    magnitude = lax.abs(values)
    log = lax.bitcast_convert_type(magnitude, np.int32) - _ONE
    root = lax.bitcast_convert_type(_shifted(log, -power) + _ONE, np.float32)
    ordinary = magnitude > 0
    if fmt.has_inf:
        ordinary &= magnitude < np.float32(np.inf)
    return jnp.where(ordinary, _copy_sign(root, values), values)


def _copy_sign(magnitude: jax.Array, of: ArrayLike) -> jax.Array:
    """A magnitude with the sign of another float32; on the bits, where its compilers and all others
    agree.
    """
    sign = lax.bitcast_convert_type(of, np.int32) & np.int32(-(2**31))
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(magnitude, np.int32) | sign, np.float32
    )


def _scale(biased: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(biased << np.int32(23), np.float32)


def root_of(second: jax.Array) -> jax.Array:
    """The square root of second moments on Mitchell's logarithm, at most a seventeenth too large; 0
    of 0.
    """
    log = lax.bitcast_convert_type(second, np.int32) - _ONE
    root = lax.bitcast_convert_type(lax.shift_right_arithmetic(log, np.int32(1)) + _ONE, np.float32)
    return jnp.where(second > 0, root, np.float32(0))


def _binades(bound: jax.Array, smallest: jax.Array) -> jax.Array:
    """How many binades a block spans, of the bits of its ends."""
    return ((bound - smallest) >> np.int32(23)) + np.int32(1)


def _largest_power(binades: jax.Array, smallest: jax.Array, most: dict[int, int]) -> jax.Array:
    """The largest power that holds so many binades; the widest where the range isn't known."""
    power = jnp.full_like(binades, POWERS[-1])
    for candidate, limit in sorted(most.items()):
        power = jnp.where(binades <= np.int32(limit), np.int32(candidate), power)
    return jnp.where(smallest > np.int32(0), power, np.int32(POWERS[-1]))


def _power_of_second(
    old: jax.Array, bound: jax.Array, smallest: jax.Array, fmt: Format
) -> jax.Array:
    """The largest power with which a block's range, given by the bits of its ends, fits into the
    format; int32.

    The old power stays while the range fits into the format with its subnormals, since each change
    rounds a whole block anew. A block without any values so far, of whose range nothing is known,
    gets the widest.
    """
    binades, (normal, whole) = _binades(bound, smallest), _spans(fmt)
    most = {power: _times(normal, -power) for power in POWERS[:-1]}
    power = _largest_power(binades, smallest, most)
    stays = (old > power) & (_shifted(binades, old) <= np.int32(whole))
    return jnp.where(stays & (smallest > np.int32(0)), old, power)


def _power_of_first(
    old: jax.Array, bound: jax.Array, smallest: jax.Array, fmt: Format
) -> jax.Array:
    """The largest power with which codes reach from the bound to some binades (`MARGINS`) below
    what is to be held well; int32.

    Each step rounds first moments anew, so no power is kept for its own sake.
    """
    del old
    whole = _spans(fmt)[1]
    most = {power: _times(whole, -power) - margin for power, margin in MARGINS.items()}
    return _largest_power(_binades(bound, smallest), smallest, most)


def _spans(fmt: Format) -> tuple[int, int]:
    """Whole binades from a format's largest value down to its smallest normal and its smallest
    value.
    """
    normal, whole = (
        math.floor(math.log2(fmt.max / low))
        for low in (fmt.min_normal, fmt.min_subnormal or fmt.min_normal)
    )
    return normal, whole


def _times(binades: int, power: int) -> int:
    return math.floor(binades * 2.0**power)
