"""Ready recipes: what Hopper-class hardware multiplies, per-tensor scales, from earlier steps or from the operand."""

from typing import Literal

from fp8jax.formats import E4M3, E5M2, Format
from fp8jax.recipe import CastSpec, DelayedScaling, ProductCasts, Recipe


def delayed(
    *,
    interval: int = 1,
    margin: float = 1.0,
    history_window: int = 16,
    update_threshold: float = 0.95,
    reduce: str | float = "max",
    forward: Format = E4M3,
    backward: Format = E5M2,
    execution: Literal["auto", "native", "emulated"] = "auto",
) -> Recipe:
    """One scale per tensor, from the amaxes of earlier steps: a cast never waits for a reduction of its own operand.

    Activations and weights are cast to `forward`, gradients to `backward` (the split of "FP8 Formats for Deep
    Learning", Micikevicius et al., 2022, section 3). The other arguments are `DelayedScaling`'s and `Recipe`'s.

    >>> delayed(interval=4).forward.lhs.delayed.interval
    4
    """
    scaling = DelayedScaling(interval=interval, margin=margin, history_window=history_window,
                             update_threshold=update_threshold, reduce=reduce)
    return _per_tensor("delayed", forward, backward, scaling, execution)


def current(
    *,
    forward: Format = E4M3,
    backward: Format = E5M2,
    execution: Literal["auto", "native", "emulated"] = "auto",
) -> Recipe:
    """One scale per tensor, from the operand's own amax at each cast: no state, one more pass over each operand.

    >>> current().forward.lhs.delayed is None
    True
    """
    return _per_tensor("current", forward, backward, None, execution)


def _per_tensor(name, forward, backward, scaling, execution) -> Recipe:
    values = CastSpec(forward, delayed=scaling)
    gradients = CastSpec(backward, delayed=scaling)
    return Recipe(
        name=name,
        forward=ProductCasts(lhs=values, rhs=values),
        dlhs=ProductCasts(grad=gradients, rhs=values),
        drhs=ProductCasts(lhs=values, grad=gradients),
        execution=execution,
    )
