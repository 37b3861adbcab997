"""Products of FP8 operands as plain functions with explicit scales."""

from fp8jax.ops._conv import conv_general_dilated
from fp8jax.ops._dot import dot_general
from fp8jax.ops._ragged import ragged_dot_general

__all__ = ["conv_general_dilated", "dot_general", "ragged_dot_general"]
