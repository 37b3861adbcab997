"""The configs that are written: what a dialect's readers need, or an error if they'd misread it."""

from typing import Any

from fp8jax.interop._safetensors_file import CheckpointError
from fp8jax.interop._scheme import MX_BLOCK, Scheme

_CONFIG, _QUANT_CONFIG = "config.json", "hf_quant_config.json"
_ACTIVATION_GROUP = 128  # Of activations beside block-wise weights.
_EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}
# Readers look for this very name before they take a file for ModelOpt's; the version is that of the
# layout.
_MODELOPT = {"name": "modelopt", "version": "0.47.0"}


def _refuse(method: str, wanted: str, scheme: Scheme, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"method {method!r} must have {wanted}; got weights {scheme}"
        f"{' with scales of ue8m0' if scheme.exponents and not scheme.is_mx else ''} and "
        f"activations {scheme.activations!r}. {remedy}"
    )


def compressed_tensors(scheme: Scheme, ignored: list[str], keys_values: bool) -> dict[str, Any]:
    """For compressed-tensors: one group of all linear layers."""
    if scheme.exponents and not scheme.is_mx:
        raise _refuse(
            "compressed-tensors",
            f"scales of float32 or bfloat16, or of ue8m0 for blocks of {list(MX_BLOCK)} (MXFP8)",
            scheme,
            "Its readers would take exponents for numbers: leave scale_dtype out, or use method "
            "'fp8'.",
        )
    group = {
        "targets": ["Linear"],
        "weights": _weights(scheme),
        "input_activations": _inputs(scheme),
        "output_activations": None,
    }
    fmt = "naive-quantized" if scheme.activations is None else "float-quantized"
    if scheme.is_mx:
        fmt = group["format"] = "mxfp8-quantized"
    one = _EIGHT_BITS | {"strategy": "tensor", "dynamic": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": one if keys_values else None,
    }
    return {_CONFIG: config}


def _weights(scheme: Scheme) -> dict[str, Any]:
    if scheme.is_mx:
        return _EIGHT_BITS | _MX_GROUP | {"dynamic": False}
    block = {"block_structure": list(scheme.block)} if scheme.block else {}
    return _EIGHT_BITS | {"strategy": scheme.weights, "dynamic": False} | block


_MX_GROUP = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activations is None:
        return None
    if scheme.activations == "static":
        return _EIGHT_BITS | {"strategy": "tensor", "dynamic": False}
    if scheme.is_mx:
        return _EIGHT_BITS | _MX_GROUP | {"dynamic": True}
    if scheme.weights == "block":
        group = {"strategy": "group", "group_size": _ACTIVATION_GROUP}
        return _EIGHT_BITS | group | {"dynamic": True}
    return _EIGHT_BITS | {"strategy": "token", "dynamic": True}


def fine_grained(scheme: Scheme, ignored: list[str], keys_values: bool) -> dict[str, Any]:
    """For transformers' fine-grained FP8: block-wise, or per tensor where the block is null."""
    if scheme.weights == "channel" or scheme.activations is None:
        raise _refuse(
            "fp8",
            "weights per tensor or block, and quantized activations",
            scheme,
            "Use method 'compressed-tensors'.",
        )
    if scheme.exponents and scheme.weights == "tensor":
        raise _refuse("fp8", "scales of float32 per tensor", scheme, "Leave scale_dtype out.")
    _no_keys_values("fp8", keys_values)
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": scheme.activations,
        "modules_to_not_convert": ignored,
        # Said even where it is null: left out, readers take 128 x 128.
        "weight_block_size": list(scheme.block) if scheme.block else None,
    }
    return {_CONFIG: config | ({"scale_fmt": "ue8m0"} if scheme.exponents else {})}


def mxfp8(scheme: Scheme, ignored: list[str], keys_values: bool) -> dict[str, Any]:
    """For MXFP8 as transformers and SGLang read it."""
    if not scheme.is_mx or scheme.activations != "dynamic":
        raise _refuse("mxfp8", _ONLY_MX, scheme, _REMEDY_MX)
    _no_keys_values("mxfp8", keys_values)
    config = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ignored,
        "weight_block_size": list(MX_BLOCK),
        "scale_fmt": "ue8m0",
    }
    return {_CONFIG: config}


_ONLY_MX = f"blocks of {list(MX_BLOCK)} with scales of ue8m0, and dynamic activations"
_REMEDY_MX = (
    "Quantize anew, in blocks of 32 along the inputs and with power_of_two=True: codes of other "
    "groups can't be kept. Or use method 'compressed-tensors'."
)


def modelopt(scheme: Scheme, ignored: list[str], keys_values: bool) -> dict[str, Any]:
    """For ModelOpt: FP8 with static scales of activations, or MXFP8; said in both of its files."""
    if scheme.is_mx and scheme.activations == "dynamic":
        algorithm = "MXFP8"
    elif scheme.weights == "tensor" and scheme.activations == "static" and not scheme.exponents:
        algorithm = "FP8"
    else:
        raise _refuse(
            "modelopt",
            "weights per tensor and static activations (FP8), or " + _ONLY_MX + " (MXFP8)",
            scheme,
            "Pass scales of activations, quantize anew, or use method 'compressed-tensors'.",
        )
    kv = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
    eight = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": eight, "weights": eight, "targets": ["Linear"]}
    config = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ignored}
    config |= {"producer": _MODELOPT} | (kv if keys_values else {})
    if algorithm == "FP8":
        config["config_groups"] = {"group_0": group}
    quantization = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8" if keys_values else None,
        "exclude_modules": ignored,
    } | ({"group_size": 32} if algorithm == "MXFP8" else {})
    return {
        _CONFIG: config,
        _QUANT_CONFIG: {"producer": _MODELOPT, "quantization": quantization},
    }


def _no_keys_values(method: str, keys_values: bool) -> None:
    if keys_values:
        raise CheckpointError(
            f"method {method!r} has no scales of keys and values; got kv_scales. Leave them out, "
            "or use method 'compressed-tensors' or 'modelopt'."
        )
