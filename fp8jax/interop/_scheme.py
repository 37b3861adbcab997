"""How a checkpoint's weights are quantized, and how a weight's codes and scales lie in a file.

A matrix is stored outputs first, `[out, in]`. Values are `codes * scale` in every dialect, whatever
the scale is called.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fp8jax._scaling import BlockWise, PerChannel, PerTensor, PerToken, Scaling
from fp8jax.interop._module_patterns import ModulePattern, find_pattern
from fp8jax.interop._safetensors_file import CheckpointError

Kind = Literal["tensor", "channel", "block"]

MX_BLOCK = (1, 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are quantized, and the activations that they are multiplied by are to be.

    Args:
      weights: one scale per "tensor", per output "channel", or per "block".
      block: extents of a block, outputs first; with "block" alone.
      activations: scales from calibration ("static"), from each token ("dynamic"), or None for
        activations as they are.
      method: the dialect, a key of `DIALECTS`: "compressed-tensors", "fp8", "modelopt", ...
      exponents: whether scales are powers of two that files hold as E8M0. With blocks of [1, 32],
        that is MXFP8.

    Raises:
      CheckpointError: where the parts don't go together.
    """

    weights: Kind
    block: tuple[int, int] | None = None
    activations: Literal["static", "dynamic"] | None = "dynamic"
    method: str = "compressed-tensors"
    exponents: bool = False

    def __post_init__(self):
        if self.activations not in ("static", "dynamic", None):
            raise CheckpointError(
                f"activations must be 'static', 'dynamic' or None; got {self.activations!r}."
            )
        if self.weights == "block" and self.activations == "static":
            raise CheckpointError(
                "weights per block must have dynamic activations; got static ones. Leave the "
                "scales out."
            )

    @property
    def is_mx(self) -> bool:
        """Whether this is MXFP8."""
        return self.exponents and self.block == MX_BLOCK

    def __str__(self) -> str:
        kind = "MXFP8" if self.is_mx else f"per {self.weights}"
        return f"{kind} of {list(self.block)}" if self.block and not self.is_mx else kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a checkpoint says of all its weights.

    Args:
      method: the dialect.
      title: what the checkpoint is, and what told it: "ModelOpt FP8, from hf_quant_config.json".
      named: schemes of single modules; a text in the place of a scheme says why it can't be read.
      patterns: ordered: schemes of the modules that match.
      default: scheme of all other modules; None where these have none.
    """

    method: str
    title: str
    named: Mapping[str, Scheme | str] = dataclasses.field(default_factory=dict)
    patterns: Sequence[tuple[ModulePattern, Scheme | str]] = ()
    default: Scheme | str | None = None

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a module's weight; CheckpointError where there is none that is read."""
        found = self.named.get(module)
        if found is None:
            found = find_pattern(self.patterns, module)
        if found is None:
            found = self.default
        if isinstance(found, Scheme):
            return found
        reason = found or "it says nothing of this module, whose weight is FP8"
        raise CheckpointError(f"{self.title}: module {module!r} can't be read: {reason}.")


def weights_in_file(
    shape: Sequence[int], scaling: Scaling, inputs: int
) -> tuple[Kind, tuple[int, int] | None]:
    """What a file calls the scales of a weight: "tensor", "channel" or "block"; and the block.

    Args:
      shape: of the weight here, without axes of layers or experts.
      scaling: of the weight here.
      inputs: number of leading axes that are inputs; 0 where the matrix is stored as it is, outputs
        first.

    Raises:
      ValueError: where no format has such groups.

    >>> weights_in_file((64, 8, 16), PerChannel((-2, -1)), inputs=1)
    ('channel', None)
    >>> weights_in_file((256, 8, 64), BlockWise((128, 2, 64)), inputs=1)
    ('block', (128, 128))
    """
    block = scaling.block(tuple(shape))
    at = inputs or 1
    ins, outs = (block[:at], block[at:]) if inputs else (block[at:], block[:at])
    in_sizes, out_sizes = (shape[:at], shape[at:]) if inputs else (shape[at:], shape[:at])
    of_outs, of_ins = _flat_extent(outs, out_sizes), _flat_extent(ins, in_sizes)
    if of_outs is None and of_ins is None:
        return "tensor", None
    if of_outs == 1 and of_ins is None:
        return "channel", None
    if not of_outs or not of_ins:
        outputs = (
            tuple(range(at - len(shape), 0))
            if inputs
            else tuple(range(-len(shape), at - len(shape)))
        )
        channel = PerChannel(outputs[0] if len(outputs) == 1 else outputs)
        sums = (
            f", or, where it sums over more axes than the first {at}, name it so: Name(..., "
            f"inputs={at + 1}). A convolution's kernel must stay unquantized: put "
            "WeightRule(path, None) first"
            if inputs and len(shape) > at + 1
            else ""
        )
        raise ValueError(
            "scales must be one per tensor, per output channel, or per block of a matrix; got "
            f"{scaling} for {list(shape)}. Quantize anew, with WeightRule(path, {channel}), "
            f"PerTensor() or BlockWise((128, 128)){sums}."
        )
    return "block", (of_outs, of_ins)


def _flat_extent(block: Sequence[int | None], sizes: Sequence[int]) -> int | None:
    """A block's extent along axes that a file has as one: None for all, 0 where there is none."""
    if len(block) == 1:
        return block[0]
    extents = [extent for extent in block if extent is not None]
    if not extents:
        return None
    if len(extents) < len(block):
        return 0
    if set(extents[:-1]) == {1} and (sizes[-1] % extents[-1] == 0 or extents[-1] == 1):
        return extents[-1]
    return extents[0] * extents[1] if len(extents) == 2 and extents[1] == sizes[1] else 0


def _extents_here(extent: int, sizes: Sequence[int]) -> tuple[int, ...] | None:
    """A block along an axis of a file as one along the axes here; None where there is no such."""
    if len(sizes) == 1:
        return (extent,)
    if extent == 1 or sizes[-1] and sizes[-1] % extent == 0:
        return (1,) * (len(sizes) - 1) + (extent,)
    if len(sizes) == 2 and sizes[-1] and extent % sizes[-1] == 0:
        return extent // sizes[-1], sizes[-1]
    return None


def scaling_here(scheme: Scheme, shape: Sequence[int], inputs: int) -> Scaling:
    """The granularity of a weight with so many input axes; ValueError where the block doesn't fit.

    >>> scaling_here(Scheme(weights="block", block=(128, 128)), (256, 8, 64), inputs=1)
    BlockWise(block_shape=(128, 2, 64))
    """
    ndim = len(shape)
    if scheme.weights == "tensor":
        return PerTensor()
    if scheme.weights == "channel":
        if inputs:
            return PerChannel(tuple(range(inputs - ndim, 0)))
        return PerToken() if ndim == 2 else PerChannel(-ndim)
    ins, outs = (shape[:inputs], shape[inputs:]) if inputs else (shape[1:], shape[:1])
    of_outs, of_ins = (
        _extents_here(extent, sizes) if sizes and (inputs or ndim == 2) else None
        for extent, sizes in zip(scheme.block or (), (outs, ins), strict=True)
    )
    if of_outs is None or of_ins is None:
        raise ValueError(
            f"blocks of {list(scheme.block or ())} must fit the axes of a matrix; got "
            f"{list(shape)} with {inputs} axes of inputs."
        )
    return BlockWise(of_ins + of_outs if inputs else of_outs + of_ins)


def to_file_layout(values: np.ndarray, inputs: int) -> np.ndarray:
    """A weight, or its scales, as a file's matrix, outputs first; without inputs as it is."""
    if not inputs:
        return values
    return values.reshape(math.prod(values.shape[:inputs]), math.prod(values.shape[inputs:])).T


def shape_in_file(shape: Sequence[int], inputs: int) -> tuple[int, ...]:
    """The shape that `to_file_layout` gives."""
    return to_file_layout(np.broadcast_to(np.uint8(0), tuple(shape)), inputs).shape


def from_file_layout(values: np.ndarray, shape: Sequence[int], inputs: int) -> np.ndarray:
    """The way back, to a weight of `shape`, or to scales of such a shape."""
    return (values.T if inputs else values).reshape(shape)
