"""What files say of weights in themselves, in metadata or tensors: torchao, ComfyUI, casts."""

import json
from collections.abc import Mapping
from typing import Any

from fp8jax.interop._folder import CheckpointFolder
from fp8jax.interop._safetensors_file import CheckpointError
from fp8jax.interop._scheme import Plan, Scheme

COMFY_METADATA = "_quantization_metadata"
_LONGEST_MARK = 4096


def _object(name: str, text: str | bytes) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name}: its JSON must be well-formed; got {str(error)[:120]}."
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{name}: its JSON must be an object; got {str(data)[:120]!r}.")
    return data


def has_torchao(source: CheckpointFolder) -> bool:
    """Whether a header's metadata describes tensors of torchao's."""
    return any('"_type": "Float8Tensor"' in text for text in source.metadata.values())


def torchao(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of torchao: each tensor's granularity is in the header's metadata, and not in the config."""
    named: dict[str, Scheme | str] = {}
    for name, text in source.metadata.items():
        module, _, last = name.rpartition(".")
        codes = source.tensors.get(f"{module}._{last}_qdata".removeprefix("."))
        if codes is not None and text.startswith("{"):
            named[module] = _torchao_scheme(_object(f"metadata of {name!r}", text), codes.shape)
    return Plan(method="torchao", title=f"torchao FP8, from {origin} and metadata", named=named)


def _torchao_scheme(data: Mapping[str, Any], shape: tuple[int, ...]) -> Scheme | str:
    fields = data.get("_data")
    if data.get("_type") != "Float8Tensor" or not isinstance(fields, dict):
        return f"its metadata must be of a Float8Tensor; got {str(data.get('_type'))[:80]!r}"
    block = fields.get("block_size")
    if (
        not isinstance(block, list)
        or len(block) != len(shape)
        or len(shape) != 2
        or not all(type(n) is int and 0 < n for n in block)
    ):
        return f"block_size in its metadata must be two positive numbers; got {str(block)[:80]!r}"
    activations = None if fields.get("act_quant_kwargs") is None else "dynamic"
    kind = "tensor" if block == list(shape) else "channel" if block == [1, shape[1]] else "block"
    extents = tuple(block) if kind == "block" else None
    return Scheme(weights=kind, block=extents, activations=activations, method="torchao")


def is_comfy_marker(name: str) -> bool:
    """Whether a tensor of this name says of the whole file that it is ComfyUI's."""
    return name == "scaled_fp8" or name.endswith(".scaled_fp8")


def has_comfyui(source: CheckpointFolder) -> bool:
    """Whether a file is one of ComfyUI's."""
    return COMFY_METADATA in source.metadata or any(
        is_comfy_marker(name) or name.endswith((".comfy_quant", ".scale_weight"))
        for name in source.tensors
    )


def comfyui(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of ComfyUI: a marker for the file or, in newer ones, each module; scales are per tensor."""
    layers = _object(COMFY_METADATA, source.metadata.get(COMFY_METADATA, "{}")).get("layers", {})
    if not isinstance(layers, dict):
        raise CheckpointError(f"{COMFY_METADATA}: layers must be an object; got {str(layers)[:80]}")
    marks = dict(layers)
    for name, info in source.tensors.items():
        if name.endswith(".comfy_quant"):
            if info.nbytes > _LONGEST_MARK:
                raise CheckpointError(
                    f"tensor {name!r} must have at most {_LONGEST_MARK} bytes; got {info.nbytes}."
                )
            marks[name.removesuffix(".comfy_quant")] = _object(name, source.read(name).tobytes())
    named = {module: _comfy_scheme(module, mark, source) for module, mark in marks.items()}
    # Two elements, in the place of none, say that products stay wide.
    wide = any(
        is_comfy_marker(name) and info.shape == (2,) for name, info in source.tensors.items()
    )
    static = any(name.endswith(".scale_input") for name in source.tensors)
    activations = None if wide else "static" if static else "dynamic"
    default = Scheme(weights="tensor", activations=activations, method="comfyui")
    return Plan(method="comfyui", title=f"ComfyUI FP8, from {origin}", named=named, default=default)


def _comfy_scheme(module: str, mark: Any, source: CheckpointFolder) -> Scheme | str:
    fmt = mark.get("format") if isinstance(mark, dict) else None
    if fmt not in ("float8_e4m3fn", "float8_e5m2"):
        return f"its format must be 'float8_e4m3fn' or 'float8_e5m2'; got {str(fmt)[:80]!r}"
    activations = "static" if f"{module}.input_scale" in source.tensors else "dynamic"
    if mark.get("full_precision_matrix_mult"):
        activations = None
    return Scheme(weights="tensor", activations=activations, method="comfyui")


def cast(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of files whose weights were cast to float8 and have no scales: these are 1."""
    scheme = Scheme(weights="tensor", activations=None, method="cast")
    return Plan(method="cast", title="a plain cast to float8, without scales", default=scheme)
