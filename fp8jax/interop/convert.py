"""A checkpoint of wide weights to one of FP8 weights, file to file, one tensor in memory at a time."""

import pathlib
from typing import Sequence

import jax
import numpy as np

from fp8jax.formats import E4M3
from fp8jax.interop.folder import CheckpointFolder, write_folder
from fp8jax.interop.safetensors_file import CheckpointError, TensorInfo
from fp8jax.interop.scheme import SCALE_DTYPES, Scheme
from fp8jax.interop.write import SHARD_BYTES, narrow_scale, scheme_of_weights
from fp8jax.params import WeightRule
from fp8jax.tensor import quantize


def convert_checkpoint(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    rules: Sequence[WeightRule],
    *,
    method: str | None = None,
    activations: str | None = "dynamic",
    scale_dtype: str = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Scheme:
    """Quantize the weights of a checkpoint, without a model or its parameter tree.

    Args:
      source: folder of a checkpoint in float32, bfloat16 or float16, as read by `read_checkpoint`.
      target: folder to write; must not hold a checkpoint yet.
      rules: ordered; the first whose pattern matches a tensor's whole name says how it is held, in the file's own layout,
        outputs first: `PerTensor()`, `PerToken()` (per output channel) or `BlockWise((128, 128))`. The others stay.
      method, activations, scale_dtype, max_shard_bytes, progress: as of `write_checkpoint`.

    Returns:
      The scheme that `config.json` tells.

    Raises:
      CheckpointError: where the source is damaged or quantized, or the formats can't hold the weights.
      ValueError: where a rule matches no tensor.
      FileExistsError: where the target holds a checkpoint.
    """
    folder = CheckpointFolder(source)
    if folder.config.get("quantization_config") is not None:
        raise CheckpointError(
            f"source must not be quantized; got a quantization_config in {folder.folder}. Read it with read_checkpoint."
        )
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {tuple(SCALE_DTYPES)}; got {scale_dtype!r}.")
    for rule in rules:
        if not any(rule.matches(name) for name in folder.tensors):
            raise ValueError(
                f"pattern of a rule must match the name of a tensor; got {rule.pattern!r}. The names are "
                f"{', '.join(list(folder.tensors)[:8])} and so on."
            )
    chosen = {}
    for name, info in folder.tensors.items():
        rule = next((rule for rule in rules if rule.matches(name)), None)
        if rule is not None and rule.scaling is not None:
            if (
                rule.stacked
                or rule.format != E4M3
                or len(info.shape) != 2
                or info.dtype.kind in "iub"
                or info.dtype.itemsize < 2
            ):
                raise CheckpointError(
                    f"tensor {name!r} must be a floating matrix and its rule of E4M3 without stacked layers; got "
                    f"{info.dtype}{list(info.shape)} and {rule}. Narrow the pattern."
                )
            chosen[name] = rule
    scheme = scheme_of_weights(
        [(name, folder.tensors[name].shape, rule.scaling, 0) for name, rule in chosen.items()],
        method,
        activations,
    )
    if scheme is None:
        raise ValueError("rules must choose a weight; got none that does. Give one a scaling.")
    tensors: dict[str, TensorInfo] = {}
    for name, info in folder.tensors.items():
        if name in chosen:
            groups = chosen[name].scaling.group_shape(info.shape)
            tensors[name] = TensorInfo(E4M3.dtype, info.shape)
            tensors[name + scheme.scale_name] = TensorInfo(
                SCALE_DTYPES[scale_dtype], groups or (1,)
            )
        else:
            tensors[name] = info
    scales: dict[str, np.ndarray] = {}

    def value_of(name: str) -> np.ndarray:
        if name in scales:
            return scales.pop(name)
        values = folder.read(name)
        if name not in chosen:
            return values
        rule = chosen[name]
        q = jax.device_get(quantize(values, E4M3, rule.scaling, power_of_two=rule.power_of_two))
        scales[name + scheme.scale_name] = narrow_scale(
            name, np.atleast_1d(q.scale), SCALE_DTYPES[scale_dtype]
        )
        return q.data

    ignored = [
        name.removesuffix(".weight")
        for name, info in folder.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in chosen
    ]
    config = folder.config | {"quantization_config": scheme.to_config(ignored, scale_dtype)}
    write_folder(
        target, tensors, value_of, config, max_shard_bytes=max_shard_bytes, progress=progress
    )
    return scheme
