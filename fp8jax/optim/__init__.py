"""optax-style: delayed scaling, optimizers with FP8 moments, and what trains bfloat16 weights."""

from fp8jax.optim.accumulate import accumulate
from fp8jax.optim.adam import ScaleByAdamState, adam, adamw, scale_by_adam
from fp8jax.optim.apply import apply_updates
from fp8jax.optim.delayed_scaling import ScalingState, delayed_scaling
from fp8jax.optim.exchange import ExchangeState, exchange_gradients
from fp8jax.optim.lion import ScaleByLionState, lion, scale_by_lion
from fp8jax.optim.moments import Fp8Moment
from fp8jax.optim.partition import WithDelayedScalingState, with_delayed_scaling
from fp8jax.optim.rule import OperandState

__all__ = [
    "ExchangeState",
    "Fp8Moment",
    "OperandState",
    "ScaleByAdamState",
    "ScaleByLionState",
    "ScalingState",
    "WithDelayedScalingState",
    "accumulate",
    "adam",
    "adamw",
    "apply_updates",
    "delayed_scaling",
    "exchange_gradients",
    "lion",
    "scale_by_adam",
    "scale_by_lion",
    "with_delayed_scaling",
]
