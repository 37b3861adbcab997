"""optax-style: delayed scaling, optimizers with FP8 moments, and what trains bfloat16 weights."""

from fp8jax.optim._accumulate import accumulate
from fp8jax.optim._adam import ScaleByAdamState, adam, adamw, scale_by_adam
from fp8jax.optim._apply import apply_updates
from fp8jax.optim._delayed_scaling import ScalingState, delayed_scaling
from fp8jax.optim._exchange import ExchangeState, exchange_gradients
from fp8jax.optim._lion import ScaleByLionState, lion, scale_by_lion
from fp8jax.optim._moments import Fp8Moment
from fp8jax.optim._partition import WithDelayedScalingState, with_delayed_scaling
from fp8jax.optim._rule import OperandState

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
