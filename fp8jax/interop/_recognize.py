"""Which dialect a checkpoint is in: where it may say so, and what it seems to be if it doesn't."""

from collections.abc import Iterator
from typing import Any

from fp8jax.interop._configs import unreadable
from fp8jax.interop._dialects import DIALECTS, expand, weight_of
from fp8jax.interop._folder import CheckpointFolder
from fp8jax.interop._marks import COMFY_METADATA, has_comfyui, has_torchao
from fp8jax.interop._safetensors_file import CheckpointError, TensorInfo
from fp8jax.interop._scheme import Plan

PLACES = (
    "quantization_config and compression_config of config.json, and of text_config and the like in "
    "it, hf_quant_config.json, and the metadata and marker tensors of the files"
)
FIELDS = ("quantization_config", "compression_config")
_ALIASES = {
    "compressed_tensors": "compressed-tensors",
    "modelopt_fp8": "modelopt",
    "modelopt_mxfp8": "modelopt",
    "modelopt_mixed": "modelopt",
}


def find_plan(source: CheckpointFolder) -> Plan | None:
    """What a checkpoint says of its weights, wherever it does; None where it is not quantized.

    Raises:
      CheckpointError: where what it says is malformed or not read.
    """
    for origin, data in _configs(source):
        method = _method_of(origin, data)
        try:
            return DIALECTS[method].plan(data, origin, source)
        except CheckpointError as error:
            raise CheckpointError(f"{origin}: {error} It says {DIALECTS[method].title}.") from None
    if has_torchao(source):
        return DIALECTS["torchao"].plan({}, "the header", source)
    if has_comfyui(source):
        marked = COMFY_METADATA in source.metadata
        return DIALECTS["comfyui"].plan({}, COMFY_METADATA if marked else "its tensors", source)
    if float8_weights(source) and not seems_to_be(source):
        return DIALECTS["cast"].plan({}, "", source)
    return None


def _configs(source: CheckpointFolder) -> Iterator[tuple[str, Any]]:
    """What the files say of quantization, by the place where they do; the first counts."""
    parts = {"config.json": source.config} | {
        f"{name} of config.json": part
        for name, part in source.config.items()
        if isinstance(part, dict) and name not in FIELDS
    }
    for place, part in parts.items():
        for field in FIELDS:
            if part.get(field) not in (None, {}):
                yield place, part[field]
    if source.quant_config:
        data = source.quant_config.get("quantization")
        if isinstance(data, dict) and data.get("quant_algo", "") is None:
            return
        named = data | {"quant_method": "modelopt"} if isinstance(data, dict) else data
        yield "hf_quant_config.json", named


def _method_of(origin: str, data: Any) -> str:
    if not isinstance(data, dict):
        raise unreadable(f"{origin}: quantization_config", "an object", data)
    method = data.get("quant_method")
    if method is None:
        method = (
            "modelopt"
            if "quant_algo" in data
            else "compressed-tensors"
            if "config_groups" in data
            else None
        )
    method = _ALIASES.get(method, method) if isinstance(method, str) else method
    known = tuple(name for name in DIALECTS if name not in ("comfyui", "cast"))
    if not isinstance(method, str) or method not in known:
        raise CheckpointError(
            f"{origin}: quant_method must be one of {known}; got {str(method)[:80]!r}. Other "
            "dialects are not read."
        )
    return method


def is_float8(info: TensorInfo) -> bool:
    """Whether a tensor holds float8 values, and not scales."""
    name = "" if info.dtype is None else info.dtype.name
    return name.startswith("float8_e") and name != "float8_e8m0fnu"


def float8_weights(source: CheckpointFolder) -> list[str]:
    """The names of the weights whose values or codes are float8."""
    return [weight_of(name) for name, info in source.tensors.items() if is_float8(info)]


def seems_to_be(source: CheckpointFolder) -> list[str]:
    """The dialects, by their titles, whose names the scales beside float8 weights have."""
    weights = float8_weights(source)
    return [
        dialect.title
        for dialect in DIALECTS.values()
        if any(
            expand(template, weight) in source.tensors
            for template in dialect.scales
            for weight in weights
        )
    ]


def not_said(source: CheckpointFolder, weight: str, dtype: Any) -> CheckpointError:
    """An error for FP8 codes that nothing says the meaning of."""
    return CheckpointError(
        f"config.json: quantization_config must say how {weight!r} is quantized, whose dtype is "
        f"{dtype}; got nothing in {PLACES}. By the names of its scales it seems to be of "
        f"{' or '.join(seems_to_be(source)) or 'no known dialect'}. Fetch its configs too."
    )
