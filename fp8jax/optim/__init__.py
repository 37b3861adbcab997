"""Delayed scaling for optax: scales move as the amaxes of earlier steps say."""

from fp8jax.optim.accumulate import accumulate
from fp8jax.optim.delayed_scaling import ScalingState, delayed_scaling
from fp8jax.optim.partition import WithDelayedScalingState, with_delayed_scaling
from fp8jax.optim.rule import OperandState

__all__ = ["OperandState", "ScalingState", "WithDelayedScalingState", "accumulate", "delayed_scaling", "with_delayed_scaling"]
