"""Ready recipes: formats, granularities, and where scales come from, as FP8 training uses them."""

import types
import warnings
from typing import Literal

import jax

from fp8jax._formats import E4M3, E5M2, Format
from fp8jax._recipe import CastSpec, DelayedScaling, ProductCasts, Recipe
from fp8jax._scaling import BlockWise, PerToken
from fp8jax.devices import figures_of


def delayed(
    *,
    interval: int = 1,
    margin: float = 1.0,
    history_window: int = 16,
    update_threshold: float = 0.95,
    reduce: Literal["max", "most_recent"] | float = "max",
    outlier_ratio: float | None = 1024.0,
    flushed: bool = False,
    forward: Format = E4M3,
    backward: Format = E5M2,
    execution: Literal["auto", "native", "emulated"] = "auto",
) -> Recipe:
    """One scale per tensor, from the amaxes of earlier steps: a cast never waits for a reduction of
    its own operand.

    Activations and weights are cast to `forward`, gradients to `backward` (the split of "FP8
    Formats for Deep Learning", Micikevicius et al., 2022, section 3). The other arguments are
    `DelayedScaling`'s and `Recipe`'s.

    >>> delayed(interval=4).forward.lhs.delayed.interval
    4
    """
    scaling = DelayedScaling(
        interval=interval,
        margin=margin,
        history_window=history_window,
        update_threshold=update_threshold,
        reduce=reduce,
        outlier_ratio=outlier_ratio,
        flushed=flushed,
    )
    return _per_tensor("delayed", forward, backward, scaling, execution)


def current(
    *,
    forward: Format = E4M3,
    backward: Format = E5M2,
    execution: Literal["auto", "native", "emulated"] = "auto",
) -> Recipe:
    """One scale per tensor, from the operand's own amax at each cast: no state, one more pass over
    each operand.

    >>> current().forward.lhs.delayed is None
    True
    """
    return _per_tensor("current", forward, backward, None, execution)


def rowwise(
    *,
    forward: Format = E4M3,
    backward: Format = E4M3,
    power_of_two: bool = True,
    execution: Literal["auto", "native", "emulated"] = "auto",
) -> Recipe:
    """One scale for each row: for every vector that is summed over, activations, weights and
    gradients alike.

    An outlier costs precision in its own row alone. Each of the three products sums over another
    axis, so each operand is cast anew, from its original, for each product that reads it.

    >>> rowwise().drhs.grad.scaling
    PerToken()
    """
    values, gradients = (
        CastSpec(fmt, PerToken(), power_of_two=power_of_two) for fmt in (forward, backward)
    )
    return _alike("rowwise", values, gradients, execution)


def rowwise_hp_wgrad(
    *,
    forward: Format = E4M3,
    backward: Format = E4M3,
    power_of_two: bool = True,
    execution: Literal["auto", "native", "emulated"] = "auto",
) -> Recipe:
    """`rowwise`, with the gradients of the rhs, in a model's layers the weights', in their own
    precision.

    These sums are the longest, over all tokens, and their errors stay in the optimizer's state. It
    keeps the lhs for the backward pass in its own precision, too.

    >>> rowwise_hp_wgrad().drhs.grad is None
    True
    """
    values, gradients = (
        CastSpec(fmt, PerToken(), power_of_two=power_of_two) for fmt in (forward, backward)
    )
    return Recipe(
        name="rowwise_hp_wgrad",
        forward=ProductCasts(lhs=values, rhs=values),
        dlhs=ProductCasts(grad=gradients, rhs=values),
        drhs=ProductCasts(),
        execution=execution,
    )


def blockwise(
    *,
    block: int = 128,
    format: Format = E4M3,
    power_of_two: bool = True,
    execution: Literal["auto", "native", "emulated"] = "auto",
) -> Recipe:
    """One scale for each 1 x 128 of an activation or gradient, and for each 128 x 128 of a weight
    (the rhs).

    The granularity of "DeepSeek-V3 Technical Report", 2024, section 3.3.2. A weight's blocks are
    the same in both products that read it, so it is cast once. What multiplies it, `explain` says.

    >>> blockwise().forward.rhs.scaling
    BlockWise(block_shape=(128, 128))
    """
    vector, square = (
        CastSpec(format, BlockWise(shape), power_of_two=power_of_two)
        for shape in ((1, block), (block, block))
    )
    return Recipe(
        name="blockwise",
        forward=ProductCasts(lhs=vector, rhs=square),
        dlhs=ProductCasts(grad=vector, rhs=square),
        drhs=ProductCasts(lhs=vector, grad=vector),
        execution=execution,
    )


def mxfp8(
    *, format: Format = E4M3, execution: Literal["auto", "native", "emulated"] = "auto"
) -> Recipe:
    """One power-of-two scale for each 32 elements that are summed over: the MX format of the OCP
    (MX 1.0, section 5.2).

    Scales are rounded up. The rule in the text rounds down, which saturates the largest values of
    every block whose amax lies above 448 times a power of two.

    >>> mxfp8().dlhs.rhs.scaling
    BlockWise(block_shape=(1, 32))
    """
    vector = CastSpec(format, BlockWise((1, 32)))
    return _alike("mxfp8", vector, vector, execution)


def weight_only(
    *, format: Format = E4M3, execution: Literal["auto", "emulated"] = "auto"
) -> Recipe:
    """Weights (the rhs) with one scale for each channel; activations and gradients as they are.

    For serving: weights that are held as codes, as by `fp8jax.quantize_params`, take a byte each.

    >>> weight_only().forward.lhs is None
    True
    """
    values = CastSpec(format, PerToken())
    return Recipe(
        name="weight_only",
        forward=ProductCasts(rhs=values),
        dlhs=ProductCasts(rhs=values),
        drhs=ProductCasts(),
        execution=execution,
    )


def _per_tensor(name, forward, backward, scaling, execution) -> Recipe:
    return _alike(
        name, CastSpec(forward, delayed=scaling), CastSpec(backward, delayed=scaling), execution
    )


def _alike(name, values: CastSpec, gradients: CastSpec, execution) -> Recipe:
    return Recipe(
        name=name,
        forward=ProductCasts(lhs=values, rhs=values),
        dlhs=ProductCasts(grad=gradients, rhs=values),
        drhs=ProductCasts(lhs=values, grad=gradients),
        execution=execution,
    )


# All of the above by name, each to be called.
PRESETS = types.MappingProxyType(
    {
        make.__name__: make
        for make in (delayed, current, rowwise, rowwise_hp_wgrad, blockwise, mxfp8, weight_only)
    }
)


def recommended(device_kind: str | None = None) -> Recipe:
    """The recipe that trains fastest on a kind of device, as far as that is known.

    What is known, `fp8jax.devices.figures_of` has. Where FP8 is not known to be faster than
    bfloat16, this warns, and gives the recipe that costs the least: the values are the same on all
    devices.

    Args:
      device_kind: as `jax.Device.device_kind`, "NVIDIA H200" or "TPU v6 lite" for instance; by
        default that of `jax.devices()[0]`.

    Raises:
      TypeError: where `device_kind` is no string.

    >>> recommended("NVIDIA H200").name
    'delayed'
    """
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    figures = figures_of(kind)
    if figures is None or not figures.pays:
        known = f"there are no figures of {kind!r}" if figures is None else f"{figures}"
        warnings.warn(
            f"FP8 is not known to be faster than bfloat16 on this device: {known}. Hold a step in "
            "FP8 against one without, or train in bfloat16.",
            stacklevel=2,
        )
    return PRESETS["delayed" if figures is None else figures.recipe]()
