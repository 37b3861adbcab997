"""Scales as they lie in a file, to float32 and back."""

import ml_dtypes
import numpy as np

from fp8jax._formats import E8M0
from fp8jax.interop._safetensors_file import CheckpointError

SCALE_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "ue8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_WIDE = (np.float32, np.float16, ml_dtypes.bfloat16)
BYTES = np.dtype(np.uint8)


def widen_scale(name: str, values: np.ndarray, *, bytes_are_exponents: bool) -> np.ndarray:
    """Scales as float32, each as it is.

    Raises:
      CheckpointError: where they are of another dtype, not finite, or negative.
    """
    if values.dtype == E8M0.dtype or bytes_are_exponents and values.dtype == BYTES:
        codes = values.view(np.uint8)
        exponents = codes.astype(np.int32) - E8M0.bias
        wide = np.where(codes == 0xFF, np.nan, np.ldexp(1.0, exponents)).astype(np.float32)
    elif values.dtype in _WIDE:
        wide = values.astype(np.float32)
    else:
        wanted = "float32, bfloat16, float16 or float8_e8m0fnu"
        raise CheckpointError(f"scales {name!r} must be {wanted}; got {values.dtype}.")
    valid = np.isfinite(wide) & (wide >= 0)
    if not valid.all():
        raise CheckpointError(
            f"scales {name!r} must be finite and not negative; got {wide[~valid][0]}."
        )
    return wide


def narrow_scale(path: str, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Scales in the dtype that they are stored in, where uint8 is E8M0's bytes.

    Raises:
      CheckpointError: where they are not exact in it.
    """
    if dtype in (E8M0.dtype, BYTES):
        mantissa, exponent = np.frexp(scale.astype(np.float64))
        exact = (mantissa == 0.5) & (exponent - 1 >= -E8M0.bias)
        narrow = (exponent - 1 + E8M0.bias).clip(0, 254).astype(np.uint8).view(dtype)
    else:
        narrow = scale.astype(dtype)
        exact = narrow.astype(np.float32) == scale
    if not exact.all():
        raise CheckpointError(
            f"scales of {path!r} must be exact in {'ue8m0' if dtype == BYTES else dtype}; got "
            f"{scale[~exact][0]}. Quantize with power_of_two=True, or write float32 scales."
        )
    return narrow
