"""Products of FP8 operands as plain functions with explicit scales."""

from fp8jax.ops.dot import dot_general

__all__ = ["dot_general"]
