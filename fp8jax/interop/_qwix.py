"""`Fp8Tensor` to and from Qwix's `QArray`: the same codes, the same scales."""

import importlib
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer

from fp8jax._formats import get_format
from fp8jax._scaling import BlockWise, PerChannel, PerTensor
from fp8jax._tensor import Fp8Tensor


def to_qarray(q: Fp8Tensor) -> Any:
    """A `qwix.QArray` of the same codes and scales, which stands for the same dtype; needs
    `pip install qwix`.

    A `QArray` stands for the dtype of its scales, so those of a bfloat16 tensor become bfloat16.
    Powers of two keep their value there.

    Args:
      q: of any granularity; block-wise only with blocks that divide the shape, for a `QArray` has
        no others.

    Raises:
      TypeError: where `q` is no `Fp8Tensor`.
      ValueError: where its blocks leave a tail; or where its scales are not exact in its dtype, or
        can't be looked at, for they are traced.
      ImportError: where Qwix is missing.
    """
    if not isinstance(q, Fp8Tensor):
        raise TypeError(
            f"q must be an Fp8Tensor; got {type(q).__name__}. Make one with quantize(x)."
        )
    scale = q.scale.reshape(q.scale.shape + (1,) * (q.ndim - q.scale.ndim))
    block = [
        size if extent is None else extent
        for size, extent in zip(q.shape, q.scaling.block(q.shape), strict=True)
    ]
    if any(
        groups != 1 and size != groups * extent
        for size, groups, extent in zip(q.shape, scale.shape, block, strict=True)
    ):
        raise ValueError(
            f"blocks must divide the shape, for a QArray takes theirs from it; got {q.scaling} for "
            f"{list(q.shape)}. Quantize "
            "with blocks that divide it."
        )
    narrow = scale.astype(q.dtype)
    if jnp.finfo(q.dtype).bits < 32:
        is_traced = isinstance(scale, Tracer)
        if is_traced or not jnp.array_equal(narrow.astype(jnp.float32), scale):
            got = "traced ones" if is_traced else "others"
            raise ValueError(
                f"scales must be exact in {q.dtype}, for a QArray stands for the dtype of its "
                f"scales; got {got}. Quantize with power_of_two=True, or let it stand for float32: "
                "to_qarray(q.astype(jnp.float32))."
            )
    qwix = importlib.import_module("qwix")
    return qwix.QArray(qvalue=q.data, scale=narrow, qtype=q.data.dtype)


def from_qarray(q: Any) -> Fp8Tensor:
    """An `Fp8Tensor` of the same codes and scales as a `qwix.QArray`, standing for the dtype of its
    scales, as that does.

    Args:
      q: with a float8 `qvalue` and without `zero_point`. Its tiles, `shape // scale.shape`, say the
        granularity.

    Raises:
      TypeError: where `q` has no such attributes, or its codes are no float8.
      ValueError: where it has zero points, or its scales don't divide its shape.
    """
    if not all(hasattr(q, name) for name in ("qvalue", "scale", "zero_point")):
        raise TypeError(f"q must be a qwix.QArray; got {type(q).__name__}.")
    if q.zero_point is not None:
        raise ValueError(
            "q must be symmetric; got a zero_point. Quantize it with absmax calibration."
        )
    try:
        fmt = get_format(q.qvalue.dtype)
    except ValueError as error:
        raise TypeError(f"q must hold float8 codes; got {q.qvalue.dtype} ({error}).") from None
    shape, groups = q.qvalue.shape, q.scale.shape
    if len(shape) != len(groups) or any(g == 0 or n % g for n, g in zip(shape, groups)):
        raise ValueError(
            f"scale of q must be of its rank and divide its shape; got {list(groups)} for "
            f"{list(shape)}."
        )
    scale, dtype = q.scale.astype(jnp.float32), q.scale.dtype
    tiles = [n // g for n, g in zip(shape, groups)]
    if all(g == 1 for g in groups):
        return Fp8Tensor(q.qvalue, scale.reshape(()), fmt, PerTensor(), dtype)
    if all(tile == 1 or g == 1 for tile, g in zip(tiles, groups)):
        channels = tuple(axis - len(shape) for axis, g in enumerate(groups) if g > 1)
        return Fp8Tensor(q.qvalue, scale, fmt, PerChannel(channels), dtype)
    return Fp8Tensor(q.qvalue, scale, fmt, BlockWise(tuple(tiles)), dtype)
