"""What `config.json` says of quantization, and how a weight's codes and scales lie in a file.

A matrix is stored outputs first, `[out, in]`. Values are `codes * weight_scale` everywhere; the block-wise format calls
the same factor `weight_scale_inv`.

Sources: the schemas of compressed-tensors (`QuantizationConfig`) and of Hugging Face's fine-grained FP8 (`FineGrainedFP8Config`).
"""

import dataclasses
import math
from typing import Any, Literal, Mapping, Sequence

import ml_dtypes
import numpy as np

from fp8jax.interop.safetensors_file import CheckpointError
from fp8jax.scaling import BlockWise, PerChannel, PerTensor, PerToken, Scaling

METHODS = ("compressed-tensors", "fp8")
SCALE_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "ue8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_FORMATS = ("float-quantized", "naive-quantized")
_ACTIVATION_GROUP = 128  # Of activations beside block-wise weights, in both formats.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a checkpoint's weights are quantized, and how its activations are to be.

    Args:
      weights: one scale per "tensor", per output "channel", or per "block".
      block: extents of a block, outputs first; with "block" alone.
      activations: scales from calibration ("static"), from each token ("dynamic"), or None for activations as they are.
      method: "compressed-tensors", or "fp8" as Hugging Face's fine-grained FP8 and its predecessors are called.

    Raises:
      CheckpointError: where the parts don't go together.
    """

    weights: Literal["tensor", "channel", "block"]
    block: tuple[int, int] | None = None
    activations: Literal["static", "dynamic"] | None = "dynamic"
    method: Literal["compressed-tensors", "fp8"] = "compressed-tensors"

    def __post_init__(self):
        if self.method not in METHODS:
            raise CheckpointError(f"method must be one of {METHODS}; got {self.method!r}.")
        if self.activations not in ("static", "dynamic", None):
            raise CheckpointError(
                f"activations must be 'static', 'dynamic' or None; got {self.activations!r}."
            )
        if self.method == "fp8" and (self.weights == "channel" or self.activations is None):
            raise CheckpointError(
                f"method 'fp8' must have weights per tensor or block, and quantized activations; got weights per "
                f"{self.weights} and activations {self.activations!r}. Use method 'compressed-tensors'."
            )
        if self.weights == "block" and self.activations == "static":
            raise CheckpointError(
                "weights per block must have dynamic activations; got static ones. Leave the scales out."
            )

    @property
    def scale_name(self) -> str:
        """What a weight's name is followed by in the name of its scales."""
        return "_scale_inv" if self.method == "fp8" and self.weights == "block" else "_scale"

    def to_config(self, ignore: Sequence[str] = (), scale_dtype: str = "float32") -> dict[str, Any]:
        """The object for `quantization_config` in `config.json`.

        Args:
          ignore: names of the matrices that are not quantized, without ".weight".
          scale_dtype: a key of `SCALE_DTYPES`.
        """
        if self.method == "fp8":
            config = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": self.activations,
                "modules_to_not_convert": list(ignore),
            }
            if self.block:
                config["weight_block_size"] = list(self.block)
            return config | ({"scale_fmt": "ue8m0"} if scale_dtype == "ue8m0" else {})
        common = {"num_bits": 8, "type": "float", "symmetric": True}
        inputs = None
        if self.activations == "static":
            inputs = common | {"strategy": "tensor", "dynamic": False}
        elif self.activations == "dynamic" and self.weights == "block":
            inputs = common | {
                "strategy": "group",
                "group_size": _ACTIVATION_GROUP,
                "dynamic": True,
            }
        elif self.activations == "dynamic":
            inputs = common | {"strategy": "token", "dynamic": True}
        weights = (
            common
            | {"strategy": self.weights, "dynamic": False}
            | ({"block_structure": list(self.block)} if self.block else {})
        )
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMATS[inputs is None],
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Scheme | None":
        """What `config.json` says; None where it says nothing of quantization.

        Raises:
          CheckpointError: where it is malformed, or says something else than one of these formats.
        """
        data = config.get("quantization_config")
        if data is None:
            return None
        if not isinstance(data, dict):
            raise _unreadable("quantization_config", "an object", data)
        method = data.get("quant_method")
        if method not in METHODS:
            raise _unreadable("quant_method", f"one of {METHODS}", method)
        return _from_fp8(data) if method == "fp8" else _from_compressed_tensors(data)


def _unreadable(field: str, wanted: str, got: Any) -> CheckpointError:
    return CheckpointError(
        f"config.json: {field} must be {wanted}; got {str(got)[:120]!r}. Other formats are not read."
    )


def _from_fp8(data: Mapping[str, Any]) -> Scheme:
    if data.get("fmt", "e4m3") != "e4m3":
        raise _unreadable("fmt", "'e4m3'", data["fmt"])
    if data.get("activation_scheme") not in ("static", "dynamic"):
        raise _unreadable(
            "activation_scheme", "'static' or 'dynamic'", data.get("activation_scheme")
        )
    block = (
        None
        if data.get("weight_block_size") is None
        else _block("weight_block_size", data["weight_block_size"])
    )
    return Scheme(
        weights="block" if block else "tensor",
        block=block,
        activations=data["activation_scheme"],
        method="fp8",
    )


def _from_compressed_tensors(data: Mapping[str, Any]) -> Scheme:
    if data.get("format") not in _FORMATS:
        raise _unreadable("format", f"one of {_FORMATS}", data.get("format"))
    groups = data.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise _unreadable("config_groups", "an object with one group", groups)
    (group,) = groups.values()
    if not isinstance(group, dict):
        raise _unreadable("config_groups", "an object with one group", groups)
    weights, inputs = _args("weights", group.get("weights")), group.get("input_activations")
    if weights.get("dynamic") or weights.get("strategy") not in ("tensor", "channel", "block"):
        raise _unreadable("strategy of weights", "static, 'tensor', 'channel' or 'block'", weights)
    activations = None
    if inputs is not None:
        dynamic = _args("input_activations", inputs).get("dynamic")
        if not isinstance(dynamic, bool):
            raise _unreadable("dynamic of input_activations", "true or false", dynamic)
        if not dynamic and inputs.get("strategy") != "tensor":
            raise _unreadable(
                "strategy of static input_activations", "'tensor'", inputs.get("strategy")
            )
        activations = "dynamic" if dynamic else "static"
    block = (
        _block("block_structure", weights.get("block_structure"))
        if weights["strategy"] == "block"
        else None
    )
    return Scheme(weights=weights["strategy"], block=block, activations=activations)


def _args(field: str, data: Any) -> Mapping[str, Any]:
    wanted = {"num_bits": 8, "type": "float"}
    if (
        not isinstance(data, dict)
        or any(data.get(name) != value for name, value in wanted.items())
        or not data.get("symmetric", True)
    ):
        raise _unreadable(field, "symmetric, of type 'float' with 8 bits", data)
    return data


def _block(field: str, value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(n) is int and 0 < n < 1 << 31 for n in value)
    ):
        raise _unreadable(field, "two positive numbers", value)
    return tuple(value)


def weights_in_file(
    shape: Sequence[int], scaling: Scaling, inputs: int
) -> tuple[str, tuple[int, int] | None]:
    """How the scales of a weight are called in a file: "tensor", "channel" or "block", and the block, outputs first.

    Args:
      shape: of the weight here, without an axis of layers.
      scaling: of the weight here.
      inputs: number of leading axes that are inputs; 0 where the matrix is stored as it is, outputs first.

    Raises:
      ValueError: where no format has such groups.
    """
    block = scaling.block(tuple(shape))
    ins, outs = (block[:inputs], block[inputs:]) if inputs else (block[1:], block[:1])
    extents = []
    for part in (outs, ins):
        extents.append(
            part[0]
            if len(part) == 1
            else None
            if set(part) <= {None}
            else 1
            if set(part) == {1}
            else 0
        )
    if extents == [None, None]:
        return "tensor", None
    if extents == [1, None]:
        return "channel", None
    if None in extents or 0 in extents:
        raise ValueError(
            f"scales must be one per tensor, per output channel, or per block of a matrix; got {scaling} for {list(shape)}. "
            "Quantize anew: with PerTensor(), PerChannel over the outputs, or BlockWise((128, 128))."
        )
    return "block", tuple(extents)


def scaling_here(scheme: Scheme, ndim: int, inputs: int) -> Scaling:
    """The granularity of a weight of rank `ndim` with so many input axes; ValueError where the block fits no such weight."""
    if scheme.weights == "tensor":
        return PerTensor()
    if scheme.weights == "channel":
        return (
            PerChannel(tuple(range(inputs - ndim, 0)))
            if inputs
            else PerToken()
            if ndim == 2
            else PerChannel(-ndim)
        )
    if ndim != 2 or inputs > 1:
        raise ValueError(
            f"weights per block must be matrices; got one of rank {ndim} with {inputs} axes of inputs."
        )
    return BlockWise(scheme.block[::-1] if inputs else scheme.block)


def to_file_layout(values: np.ndarray, inputs: int) -> np.ndarray:
    """A weight, or scales of its rank, as the matrix in a file: outputs first. Without inputs, as it is."""
    if not inputs:
        return values
    return values.reshape(math.prod(values.shape[:inputs]), math.prod(values.shape[inputs:])).T


def from_file_layout(values: np.ndarray, shape: Sequence[int], inputs: int) -> np.ndarray:
    """The way back, to a weight of `shape`, or to scales of such a shape."""
    return (values.T if inputs else values).reshape(shape)
