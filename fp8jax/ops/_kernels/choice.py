"""Which engine multiplies two operands that have scales within their sums."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import _shims
from fp8jax.devices import Device
from fp8jax.ops._cast import Codes
from fp8jax.ops._kernels import block_scaled, decoding, two_level
from fp8jax.ops._kernels.blocks import extent_along, in_blocks

DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


@dataclasses.dataclass(frozen=True)
class Engine:
    """What multiplies codes with a scale for each block of the sum, on some devices.

    Args:
      name: as `explain` calls it.
      platform: as `jax.lax.platform_dependent` calls it.
      serves: the generation of devices that it is for, as `fp8jax.devices.FIGURES` calls it.
      divided: whether XLA divides it over the devices of a mesh.
      reserved: why `execution="auto"` leaves it to "native"; "" where it does not.
      refuses: why it can't multiply operands whose blocks have this common extent along the sum;
        "" where it can.
      unit: how many elements of the sum it wants a scale for, of this common extent.
      multiply: `(lhs, rhs, lhs_scale, rhs_scale, out_dtype)`, with codes `[batch, kept, sum]` and
        scales `[batch, kept, sum / unit]`, to `[batch, kept of lhs, kept of rhs]`.
    """

    name: str
    platform: str
    serves: str
    divided: bool
    reserved: str
    refuses: Callable[[Codes, Codes, int], str]
    unit: Callable[[int], int]
    multiply: Callable[..., jax.Array]


ENGINES = (
    Engine(
        "cuDNN block-scaled",
        "cuda",
        "Blackwell GPUs",
        True,
        "",
        block_scaled.refuses,
        block_scaled.unit,
        block_scaled.multiply,
    ),
    Engine(
        "Pallas, two-level FP8",
        "cuda",
        "Hopper GPUs",
        False,
        two_level.UNMEASURED,
        two_level.refuses,
        two_level.unit,
        two_level.multiply,
    ),
    Engine(
        "Pallas, decoding to bfloat16",
        "tpu",
        "TPU 7x",
        False,
        decoding.SLOWER,
        decoding.refuses,
        decoding.unit,
        decoding.multiply,
    ),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What multiplies two operands: an engine, or none and why."""

    engine: Engine | None
    unit: int
    reason: str

    def multiply(
        self, lhs: Codes, rhs: Codes, dimension_numbers: DimensionNumbers, out_dtype: jnp.dtype
    ) -> jax.Array:
        """The product by the engine, as `jax.lax.dot_general`'s, scales multiplied in; ValueError
        where there is none.
        """
        if self.engine is None:
            raise ValueError(f"the choice must have an engine; it has none: {self.reason}.")
        (of_lhs, of_rhs), (lhs_batch, rhs_batch) = dimension_numbers
        left, left_scale = in_blocks(lhs, lhs_batch, of_lhs, self.unit)
        right, right_scale = in_blocks(rhs, rhs_batch, of_rhs, self.unit)
        operands = _varying_alike(left, right, left_scale, right_scale)
        product = self.engine.multiply(*operands, out_dtype)
        product, _ = _varying_alike(product, operands[0])
        batch = tuple(lhs.shape[axis] for axis in lhs_batch)
        kept = (
            operand.shape[axis]
            for operand, used in ((lhs, lhs_batch + of_lhs), (rhs, rhs_batch + of_rhs))
            for axis in range(operand.ndim)
            if axis not in used
        )
        return product.reshape(*batch, *kept)


def _varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays typed as varying over the same manual axes of a mesh, as JAX has it of operations that
    it knows.
    """
    axes = frozenset().union(*map(_shims.varying_axes, arrays))
    return [
        lax.pcast(array, missing, to="varying")
        if (missing := tuple(sorted(axes - _shims.varying_axes(array))))
        else array
        for array in arrays
    ]


def _engine_for(device: Device) -> Engine | None:
    generation = device.figures and device.figures.name
    return next((engine for engine in ENGINES if engine.serves == generation), None)


def has_engine(device: Device, execution: str) -> bool:
    """Whether a device has any engine for scales within the sum that this execution takes."""
    engine = _engine_for(device)
    return engine is not None and (execution == "native" or not engine.reserved)


def choose(
    lhs: Any,
    rhs: Any,
    dimension_numbers: DimensionNumbers,
    device: Device,
    division: str = "",
    execution: str = "native",
) -> Choice:
    """What multiplies two operands of which one at least has scales within the sum.

    Args:
      lhs, rhs: operands. Only shapes, dtypes and how they were cast are read; `data` may be
        `ShapeDtypeStruct`s.
      dimension_numbers: as `jax.lax.dot_general`'s.
      device: that the product is for.
      division: of the operands, as `division_of` says it.
      execution: "native", or "auto", which takes no kernel that is slower than decoded values, or
        that no device has run.

    >>> from fp8jax._boxes import Boxes
    >>> from fp8jax import CastSpec
    >>> data = jax.ShapeDtypeStruct((8, 64), jnp.float8_e4m3fn)
    >>> codes = Codes.of(data, None, CastSpec("E4M3"), Boxes((1, 32)))
    >>> numbers = (((1,), (1,)), ((), ()))
    >>> choose(codes, codes, numbers, Device("gpu", "NVIDIA B200")).engine.name
    'cuDNN block-scaled'
    >>> choose(codes, codes, numbers, Device("cpu", "cpu")).reason
    'there is no kernel for cpu'
    """
    engine = _engine_for(device)
    if engine is None:
        return Choice(None, 0, f"there is no kernel for {device.kind}")
    reason, common = _common_extent(lhs, rhs, dimension_numbers)
    reason = reason or _refuses_division(engine, division) or engine.refuses(lhs, rhs, common)
    if reason:
        return Choice(None, 0, f"{engine.name} does not take it: {reason}")
    if execution == "auto" and engine.reserved:
        return Choice(None, 0, f"{engine.name} is for execution='native' alone: {engine.reserved}")
    return Choice(engine, engine.unit(common), "")


def _common_extent(lhs, rhs, dimension_numbers) -> tuple[str, int]:
    """Why no kernel takes two operands; and the number of elements of the sum that divides the
    extents of all their blocks.
    """
    if not isinstance(lhs, Codes) or not isinstance(rhs, Codes):
        return "one of its operands is not cast", 0
    if 0 in (*lhs.shape, *rhs.shape):
        return "it is empty", 0
    (of_lhs, of_rhs), _ = dimension_numbers
    extents = [
        extent
        for operand, axes in ((lhs, of_lhs), (rhs, of_rhs))
        if (extent := extent_along(operand, axes[-1])) is not None
    ]
    # Scales for each index of another axis alone: blocks of any extent fit.
    return "", math.gcd(*extents) if extents else lhs.shape[of_lhs[-1]]


def _refuses_division(engine: Engine, division: str) -> str:
    if not division or (engine.divided and division != "explicit"):
        return ""
    return {
        "explicit": "axes of its mesh are explicit",
        "automatic": "XLA can't divide it over the automatic axes of its mesh; inside of "
        "jax.shard_map it need not",
        "unknown": "there are several devices, and no mesh says which of them it is for; "
        "jax.set_mesh would",
    }[division]
