"""Arrays held as FP8 codes and scales, and what they cost in accuracy."""

import dataclasses
import functools
import json
from typing import Any, Self

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax._boxes import Boxes, GroupedArray
from fp8jax._codec import OVERFLOWS, check_rounding, decode_bits, encode_bits, is_saturated, widened
from fp8jax._fitting import check_scale, scale_of_least_error
from fp8jax._formats import E4M3, Format, get_format
from fp8jax._scaling import (
    BlockWise,
    PerChannel,
    PerTensor,
    PerToken,
    Scaling,
    exponent_from_amax,
    group_amax,
    group_sum,
    multiply_groups,
    scale_from_amax,
    scale_from_exponent,
)
from fp8jax._state_dicts import register_state_dict


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale"],
    meta_fields=["format", "scaling", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Fp8Tensor(GroupedArray):
    """An array as float8 codes and float32 scales: ``x ≈ decode(data) * scale``.

    A pytree with two leaves, so it passes through `jit`, is sliced by `scan` and stacked by `vmap`.

    Attributes:
      data: float8 codes; their shape is the tensor's. Or their bytes, see `as_bytes`.
      scale: float32, one per group: of the rank of `data`, with ``ceil(n / block)`` entries along
        an axis, so that it broadcasts; `PerTensor` has one scalar. Leading axes that stacking adds
        are in both.
      format: the `Format` of `data` (static).
      scaling: the granularity, with negative axes (static).
      dtype: the floating dtype that it stands for (static): that of what was quantized. Values are
        computed in it where no other is asked for, and a function that gets the tensor for a weight
        sees an array of it.

    State dicts, bytes and checkpoints hold the two arrays; what is static comes from the tensor
    they are restored into.

    Reshapes, transpositions, slices and casts move codes and scales alike and make no wide array;
    they raise where elements that share a scale would get apart.

    Gradient: straight through, from `dequantize` to the argument of `quantize`, in the units of the
    values. Code that decodes `data` by hand gets gradients of the values, not of the codes.

    >>> q = quantize(jnp.array([1.0, -2.0, 3.0], jnp.bfloat16))
    >>> q.shape, q.format, q.dequantize()
    ((3,), E4M3, Array([1, -2, 3], dtype=bfloat16))
    """

    data: jax.Array
    scale: jax.Array
    format: Format
    scaling: Scaling
    dtype: Any = np.float32

    def __post_init__(self):
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.data.nbytes + self.scale.nbytes

    def dequantize(self, dtype=None) -> jax.Array:
        """The values; see `dequantize`."""
        return dequantize(self, dtype)

    def astype(self, dtype) -> Self:
        """The same codes and scales, standing for another floating dtype."""
        return dataclasses.replace(self, dtype=_checked(dtype))

    def as_bytes(self) -> Self:
        """The same with `data` as uint8: CPUs have no float8, and widen what they slice or carry
        through a loop.
        """
        return dataclasses.replace(self, data=lax.bitcast_convert_type(self.data, jnp.uint8))

    def as_codes(self) -> Self:
        """The same with `data` as float8."""
        if self.data.dtype == self.format.dtype:  # A bitcast would end its gradient.
            return self
        data = lax.bitcast_convert_type(self.data, self.format.dtype)
        return dataclasses.replace(self, data=data)


register_state_dict(Fp8Tensor, "data", "scale")


def _static_to_bytes(static: tuple) -> bytes:
    fmt, scaling, dtype = static
    fields = dataclasses.asdict(scaling)
    return json.dumps([fmt.name, type(scaling).__name__, fields, dtype.name]).encode()


def _static_from_bytes(data: bytes) -> tuple:
    fmt, name, fields, dtype = json.loads(bytes(data))
    kinds = {kind.__name__: kind for kind in (PerTensor, PerChannel, PerToken, BlockWise, Boxes)}
    fields = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return get_format(fmt), kinds[name](**fields), jnp.dtype(dtype)


# So that `jax.export` can write functions of weights that are held as codes, and read them.
jax.export.register_pytree_node_serialization(
    Fp8Tensor,
    serialized_name="fp8jax.Fp8Tensor",
    serialize_auxdata=_static_to_bytes,
    deserialize_auxdata=_static_from_bytes,
)


def quantize(
    x,
    fmt=E4M3,
    scaling: Scaling = PerTensor(),
    *,
    margin: float = 1.0,
    power_of_two: bool = True,
    rounding: str = "nearest",
    key=None,
    overflow: str = "saturate",
    scale: Any = "amax",
) -> Fp8Tensor:
    """Turn an array into FP8 codes with a scale for each group.

    A group's scale is ``2^ceil(log2(amax * margin / fmt.max))``: a power of two, rounded up, so
    that nothing saturates and scaling is exact. Infinities and NaNs don't count in the amax: they
    become what `overflow` says, and NaN, and leave their group's other elements unharmed. A group
    without finite values other than zero gets the scale 1.

    Args:
      x: floating array of any shape, also without elements.
      fmt: a `Format`, its name or its dtype; not E8M0.
      scaling: the granularity. Axes may be negative or not; the result holds them negative.
      margin: multiplicative headroom, positive; below 1, the largest elements saturate.
      power_of_two: with False, the scale is ``amax * margin / fmt.max`` itself: the whole range is
        used, but scaling rounds.
      rounding, key, overflow: as in `encode`.
      scale: "amax", as above. "mse": of 32 scales from that to twice that, the one of the group's
        least squared error; no power of two, see `fp8jax._fitting`. Or float32 scales to use
        instead, of `scaling.group_shape(x.shape)`, or a scalar for all groups; positive, finite,
        normal numbers up to 2^126, taken as constants. `margin` goes with "amax" alone,
        `power_of_two=False` with both words.

    Returns:
      An `Fp8Tensor` of the shape of `x`, which stands for its dtype.

    Gradient: straight through; zero where a value saturates.

    Raises:
      TypeError: where `x` is not floating or `scaling` is not a granularity.
      ValueError: where an option is unknown, without effect, or doesn't fit the shape.

    Sources: OCP MX 1.0, section 6.3 (scale; rounded up here rather than down, which saturates);
    arXiv 2209.05433.

    >>> from fp8jax import BlockWise
    >>> quantize(jnp.array([[500.0, 1.0, 7.0, -3.0]]), scaling=BlockWise(2)).scale
    Array([[2.      , 0.015625]], dtype=float32)
    """
    fmt, x = get_format(fmt), jnp.asarray(x)
    if not fmt.signed:
        raise ValueError(
            f"fmt must be a format of signed values; got {fmt}, which holds scales. Use E4M3 or "
            "E5M2."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise TypeError(
            f"x must be float32, bfloat16, float16 or float64; got {x.dtype}. Cast it: "
            "x.astype(jnp.float32)."
        )
    if not isinstance(scaling, Scaling):
        raise TypeError(
            "scaling must be PerTensor(), PerChannel(axis), PerToken() or BlockWise(shape); got "
            f"{scaling!r}."
        )
    if not isinstance(margin, (int, float, np.number)) or not 0 < margin < np.inf:
        raise ValueError(
            f"margin must be a positive number; got {margin!r}. Use 1.0 for no headroom."
        )
    check_rounding(fmt, rounding, key)
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {OVERFLOWS}; got {overflow!r}.")
    scaling = scaling.normalize(x.ndim)
    if scale is None or isinstance(scale, str):
        check_scale(scale, power_of_two, margin, rounding)
    else:
        if margin != 1.0 or not power_of_two:
            raise ValueError(
                "margin and power_of_two shape a computed scale; got them beside scale=. Leave "
                "them out."
            )
        scale, groups = jnp.asarray(scale, jnp.float32), scaling.group_shape(x.shape)
        if scale.shape not in ((), groups):
            raise ValueError(
                f"scale must be a scalar or of shape {groups} for {scaling} of {x.shape}; got "
                f"{scale.shape}."
            )
        scale = jnp.broadcast_to(scale, groups)
    word, scale = (scale, None) if isinstance(scale, str) else ("given", scale)
    options = _Options(fmt, scaling, word, float(margin), power_of_two, rounding, overflow)
    data, scale = _quantize(x, scale, key, options)
    return Fp8Tensor(data, scale, fmt, scaling, x.dtype)


@dataclasses.dataclass(frozen=True)
class _Options:
    """The static arguments of quantization."""

    format: Format
    scaling: Scaling
    scale: str
    margin: float
    power_of_two: bool
    rounding: str
    overflow: str


@functools.partial(jax.jit, static_argnums=(3,), inline=True)
def _quantize(x, scale, key, options: _Options):
    may_saturate = options.scale == "given" or options.margin < 1
    if options.scale == "mse":
        scale = scale_of_least_error(x, options.format, options.scaling)
    elif options.scale == "amax":
        amax = group_amax(x, options.scaling)
        scale = scale_from_amax(amax, options.format, options.margin, options.power_of_two)
    scale = lax.stop_gradient(scale)
    return _cast(x, scale, key, options, may_saturate), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cast(x, scale, key, options, may_saturate):
    return encode_bits(
        _scaled(x, scale, options),
        options.format,
        options.rounding,
        key,
        options.overflow,
        source=x,
    )


def _scaled(x, scale, options):
    wide = lax.convert_element_type(x, widened(x.dtype))
    # A product with the reciprocal, because XLA may or may not make one of a division by a scalar.
    inverse = lax.convert_element_type(np.float32(1) / scale, wide.dtype)
    return multiply_groups(wide, inverse, options.scaling)


def _cast_forward(x, scale, key, options, may_saturate):
    scaled = _scaled(x, scale, options)
    codes = encode_bits(scaled, options.format, options.rounding, key, options.overflow, source=x)
    return codes, (
        is_saturated(scaled, options.format) if may_saturate else None,
        jnp.zeros(0, x.dtype),
    )


def _cast_backward(options, may_saturate, residuals, cotangent):
    saturated, dtype_of_x = residuals
    if may_saturate:
        cotangent = jnp.where(saturated, 0, cotangent)
    return lax.convert_element_type(cotangent, dtype_of_x.dtype), None, None


_cast.defvjp(_cast_forward, _cast_backward)


def dequantize(q: Fp8Tensor, dtype=None) -> jax.Array:
    """The values of a quantized array: ``decode(data) * scale``, computed in float32.

    Args:
      q: an `Fp8Tensor`, stacked along new leading axes or not.
      dtype: a floating dtype of the result; by default the one that `q` stands for.

    Returns:
      Array of `dtype`, shape of `q`.

    Gradient: straight through to what was quantized; with respect to `q.scale`, the true one.

    Raises:
      TypeError: where `q` is not an `Fp8Tensor` or `dtype` is not floating.

    >>> dequantize(quantize(jnp.array([0.5, 448.0])))
    Array([  0.5, 448. ], dtype=float32)
    """
    if not isinstance(q, Fp8Tensor):
        raise TypeError(
            f"q must be an Fp8Tensor; got {type(q).__name__}. Make one with quantize(x)."
        )
    dtype = _checked(q.dtype if dtype is None else dtype)
    return _inline_dequantize(q.as_codes().data, q.scale, q.scaling, dtype)


def _checked(dtype: Any) -> np.dtype:
    """A floating dtype of values, as JAX has it; TypeError where it is none."""
    if not jnp.issubdtype(dtype, jnp.floating) or np.dtype(dtype).itemsize < 2:
        raise TypeError(
            f"dtype must be float32, bfloat16, float16 or float64; got {np.dtype(dtype)}."
        )
    return jax.dtypes.canonicalize_dtype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dequantize(data, scale, scaling, dtype):
    wide = widened(dtype)
    values = multiply_groups(
        decode_bits(data, wide), lax.convert_element_type(scale, wide), scaling
    )
    return lax.convert_element_type(values, dtype)


def _dequantize_forward(data, scale, scaling, dtype):
    return _inline_dequantize(data, scale, scaling, dtype), (data, scale)


def _dequantize_backward(scaling, dtype, residuals, cotangent):
    data, scale = residuals
    cotangent = lax.convert_element_type(cotangent, widened(dtype))
    _, scale_rule = jax.vjp(lambda s: multiply_groups(decode_bits(data), s, scaling), scale)
    # The codes' cotangent is wider than they are (see codec), and in the units of the values, not
    # of the codes: to multiply by the scale here and divide by it in `_cast_backward` would only
    # round twice.
    return cotangent, *scale_rule(lax.convert_element_type(cotangent, np.float32))


_dequantize.defvjp(_dequantize_forward, _dequantize_backward)
_inline_dequantize = jax.jit(_dequantize, static_argnums=(2, 3), inline=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """What quantization cost; float32 arrays, scalars or one entry per group.

    Attributes:
      mse: mean of the squared error.
      sqnr_db: signal to quantization noise, ``10 log10(mean(x^2) / mse)``; infinite where there is
        no error.
      max_abs: largest error.
      max_rel: largest error relative to its element, over elements that are not zero.
      cosine: of the angle between the values before and after; 1 where both are zero.
      overflow: share of elements that saturated.
      underflow: share of elements that are not zero and became zero.

    Infinities and NaNs count in the shares alone.
    """

    mse: jax.Array
    sqnr_db: jax.Array
    max_abs: jax.Array
    max_rel: jax.Array
    cosine: jax.Array
    overflow: jax.Array
    underflow: jax.Array


def quantization_error(x, q: Fp8Tensor, *, per_group: bool = False) -> QuantizationError:
    """Compare an array with its quantized form.

    Args:
      x: the floating array that was quantized.
      q: its quantized form, of the same shape.
      per_group: whether to give one figure for each group of `q` rather than one for the tensor.

    Returns:
      A `QuantizationError` of scalars, or of arrays of the shape of `q.scale`.

    Raises:
      TypeError: where `q` is not an `Fp8Tensor`.
      ValueError: where the shapes differ.

    >>> x = jnp.array([1.0, 1.05, 1e-4, 0.0])
    >>> error = quantization_error(x, quantize(x))
    >>> f"{error.max_abs:.3f} {error.sqnr_db:.1f} {error.underflow:.2f}"
    '0.050 29.2 0.00'
    """
    x = jnp.asarray(x)
    if not isinstance(q, Fp8Tensor):
        raise TypeError(
            f"q must be an Fp8Tensor; got {type(q).__name__}. Make one with quantize(x)."
        )
    if x.shape != q.shape:
        raise ValueError(
            f"x must have the shape of q, {q.shape}; got {x.shape}. Pass the array that was "
            "quantized."
        )
    return _quantization_error(x, q, q.scaling if per_group else PerTensor())


@functools.partial(jax.jit, static_argnums=(2,))
def _quantization_error(x, q, scaling):
    x, y = lax.convert_element_type(x, np.float32), q.dequantize(np.float32)
    overflowed = is_saturated(multiply_groups(x, np.float32(1) / q.scale, q.scaling), q.format)
    nonzero = lax.abs(x) >= np.float32(2.0**-126)  # subnormals are zeros on some hardware
    underflowed = nonzero & (y == 0)
    finite = jnp.isfinite(x) & jnp.isfinite(y)

    # Near 1, neither the squares nor their sums leave the range of float32.
    near_one = scale_from_exponent(-exponent_from_amax(group_amax(x, PerTensor()), E4M3))
    x, y = (jnp.where(finite, v, 0) * near_one for v in (x, y))
    error = y - x
    total = functools.partial(group_sum, scaling=scaling)
    count = lax.max(total(jnp.ones_like(x)), np.float32(1))
    used = lax.max(total(finite.astype(np.float32)), np.float32(1))
    xx, yy, xy, ee = total(x * x), total(y * y), total(x * y), total(error * error)
    product = jnp.sqrt(xx) * jnp.sqrt(yy)
    return QuantizationError(
        mse=ee / used / near_one / near_one,
        sqnr_db=jnp.where(
            ee > 0, 10 * jnp.log10(xx / jnp.where(ee > 0, ee, 1)), np.float32(np.inf)
        ),
        max_abs=group_amax(error, scaling) / near_one,
        max_rel=group_amax(
            jnp.where(nonzero & finite, error / jnp.where(x == 0, 1, x), 0), scaling
        ),
        cosine=jnp.where(
            product > 0, xy / jnp.where(product > 0, product, 1), jnp.where(xx == yy, 1.0, 0.0)
        ),
        overflow=total(overflowed.astype(np.float32)) / count,
        underflow=total(underflowed.astype(np.float32)) / count,
    )
