"""Which format fits an array or a role."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fp8jax._formats import E4M3, E5M2, Format
from fp8jax._scaling import PerTensor, Scaling
from fp8jax._tensor import quantize

_ROLES = {
    "forward": E4M3,
    "weights": E4M3,
    "activations": E4M3,
    "backward": E5M2,
    "gradients": E5M2,
}


def select_format(x_or_role, *, scaling: Scaling = PerTensor()) -> Format:
    """Choose between E4M3 (precision) and E5M2 (range).

    An array is quantized in both, and the one with the smaller *mean relative error* wins. That
    error weighs the two against each other as they differ: E4M3's steps are half as wide, and E5M2
    keeps elements that E4M3 turns into zeros (a relative error of 1) or subnormals. The mean
    squared error would not do: the largest elements decide it alone.

    Args:
      x_or_role: ``"forward"``, ``"weights"`` or ``"activations"`` (E4M3), ``"backward"`` or
        ``"gradients"`` (E5M2); or a floating array with concrete values.
      scaling: the granularity with which the array is to be quantized; finer ones leave less range
        to cover.

    Returns:
      `E4M3` or `E5M2`. E4M3 where both are equally good, as for zeros.

    Raises:
      ValueError: where the role is unknown.
      TypeError: where the array is traced, for a format is static; or not floating.

    Source of the roles: "FP8 Formats for Deep Learning", arXiv 2209.05433.

    >>> select_format("gradients")
    E5M2
    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (64, 64))
    >>> select_format(x), select_format(jnp.exp(8 * x))
    (E4M3, E5M2)
    """
    if isinstance(x_or_role, str):
        if x_or_role not in _ROLES:
            raise ValueError(
                f"x_or_role must be an array or one of {tuple(_ROLES)}; got {x_or_role!r}."
            )
        return _ROLES[x_or_role]
    if isinstance(x_or_role, Tracer):
        raise TypeError(
            "x_or_role must have concrete values, for a format is static; got a traced array. "
            "Call select_format outside of jit."
        )
    return min((E4M3, E5M2), key=lambda fmt: float(_mean_relative_error(x_or_role, fmt, scaling)))


def _mean_relative_error(x, fmt, scaling):
    q = quantize(x, fmt, scaling)
    x = jnp.asarray(x, np.float32)
    magnitude = jnp.abs(x)
    counted = (magnitude >= np.float32(2.0**-126)) & jnp.isfinite(x)
    error = jnp.where(
        counted, jnp.abs(q.dequantize(x.dtype) - x) / jnp.where(counted, magnitude, 1), 0
    )
    return error.sum() / jnp.maximum(counted.sum(), 1).astype(np.float32)
