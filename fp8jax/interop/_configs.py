"""What the configs of each dialect say of weights: `quantization_config` and its like, to a `Plan`.

Sources: the schemas of compressed-tensors (`QuantizationConfig`), of transformers
(`FineGrainedFP8Config`, `FbgemmFp8Config`), of ModelOpt (its export of Hugging Face checkpoints),
and of Quark (`QConfig`); and files that they wrote.
"""

from collections.abc import Mapping
from typing import Any, Literal

from fp8jax._formats import E4M3
from fp8jax.interop._folder import CheckpointFolder
from fp8jax.interop._module_patterns import ModulePattern
from fp8jax.interop._safetensors_file import CheckpointError
from fp8jax.interop._scheme import MX_BLOCK, Kind, Plan, Scheme

_E4M3_NAMES = ("e4m3", "e4m3fn", "float8_e4m3", "float8_e4m3fn")
_FORMATS = ("float-quantized", "naive-quantized", "mxfp8-quantized", "mixed-precision")
_MOST_TARGETS = 100_000


def unreadable(field: str, wanted: str, got: Any) -> CheckpointError:
    """An error for a config that is malformed, or says what is not read."""
    return CheckpointError(f"{field} must be {wanted}; got {str(got)[:120]!r}.")


def compressed_tensors(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of compressed-tensors: groups of modules, each with a scheme."""
    if data.get("transform_config"):
        raise CheckpointError(
            "transform_config: weights are stored rotated, and the model would have to rotate what "
            "they are multiplied by; such checkpoints are not read. Undo the transforms with the "
            "library that wrote them, and save again."
        )
    sparsity = data.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise unreadable("sparsity_config", "empty, or of format 'dense'", sparsity)
    groups = data.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise unreadable("config_groups", "an object of groups", groups)
    named: dict[str, Scheme | str] = {}
    patterns: dict[str, Scheme | str] = {}
    classes: dict[str, Scheme | str] = {}
    for group in groups.values():
        if not isinstance(group, dict):
            raise unreadable("config_groups", "an object of groups", groups)
        scheme = _scheme_of_group(group, data.get("format"))
        for target in _texts("targets", group.get("targets", ["Linear"])):
            is_class = target[:1].isupper() and "." not in target
            kind = patterns if target.startswith("re:") else classes if is_class else named
            kind.setdefault(target, scheme)
    others = set(classes.values())
    default = next(iter(others)) if len(others) == 1 else None
    if len(others) > 1:
        default = "its config tells groups apart by classes of modules, which a file doesn't know"
    return Plan(
        method="compressed-tensors",
        title=f"compressed-tensors FP8, from {origin}",
        named=named,
        patterns=[(ModulePattern.regex(text), patterns[text]) for text in sorted(patterns)],
        default=classes.get("Linear", default),
    )


def _scheme_of_group(group: Mapping[str, Any], shared: Any) -> Scheme | str:
    """A group's scheme or, where it isn't read, why: other groups may be all that is asked for."""
    try:
        fmt = group.get("format") or shared
        if fmt not in _FORMATS:
            raise unreadable("format", f"one of {_FORMATS}", fmt)
        weights, inputs = _args("weights", group.get("weights")), group.get("input_activations")
        strategies = "tensor", "channel", "block", "group"
        if weights.get("dynamic") or weights.get("strategy") not in strategies:
            raise unreadable("strategy of weights", f"static, and one of {strategies}", weights)
        kind: Kind = "block"
        block = None
        if weights["strategy"] == "block":
            block = _block("block_structure", weights.get("block_structure"))
        elif weights["strategy"] == "group":
            block = 1, _size("group_size", weights.get("group_size"))
        else:
            kind = weights["strategy"]
        return Scheme(
            weights=kind,
            block=block,
            activations=None if inputs is None else _activations(inputs),
            exponents=fmt == "mxfp8-quantized" or weights.get("scale_dtype") == "torch.uint8",
        )
    except CheckpointError as error:
        return str(error).rstrip(".")


def _activations(inputs: Any) -> Literal["static", "dynamic"]:
    dynamic = _args("input_activations", inputs).get("dynamic")
    if not isinstance(dynamic, bool):
        raise unreadable("dynamic of input_activations", "true or false", dynamic)
    if not dynamic and inputs.get("strategy") != "tensor":
        raise unreadable("strategy of static input_activations", "'tensor'", inputs.get("strategy"))
    return "dynamic" if dynamic else "static"


def _args(field: str, data: Any) -> Mapping[str, Any]:
    wanted = {"num_bits": 8, "type": "float"}
    if (
        not isinstance(data, dict)
        or any(data.get(name) != value for name, value in wanted.items())
        or not data.get("symmetric", True)
    ):
        raise unreadable(field, "symmetric, of type 'float' with 8 bits", data)
    return data


def _block(field: str, value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(n) is int and 0 < n < 1 << 31 for n in value)
    ):
        raise unreadable(field, "two positive numbers", value)
    return tuple(value)


def _size(field: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise unreadable(field, "a positive number", value)
    return value


def _texts(field: str, value: Any) -> list[str]:
    if (
        not isinstance(value, list)
        or not all(isinstance(item, str) for item in value)
        or len(value) > _MOST_TARGETS
    ):
        raise unreadable(field, "a list of texts", value)
    return value


def fine_grained(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of transformers' fine-grained FP8, and of what vLLM and AutoFP8 give the same name to."""
    if data.get("fmt") not in (None, *_E4M3_NAMES):
        raise unreadable("fmt", "'e4m3'", data["fmt"])
    activations = data.get("activation_scheme", "dynamic")
    if activations not in ("static", "dynamic"):
        raise unreadable("activation_scheme", "'static' or 'dynamic'", activations)
    block = data.get("weight_block_size", "absent")
    title = "fine-grained FP8"
    if block == "absent":
        # transformers takes 128 x 128 then. AutoFP8's files, per tensor, never say it: they tell by
        # the names of scales.
        inverse = any(_is_inverse(name, source) for name in source.tensors)
        block = [128, 128] if inverse and activations == "dynamic" else None
        title = title if inverse else "AutoFP8 or vLLM FP8"
    block = None if block is None else _block("weight_block_size", block)
    scheme = Scheme(
        weights="block" if block else "tensor",
        block=block,
        activations=activations,
        method="fp8",
        exponents=data.get("scale_fmt") == "ue8m0",
    )
    return Plan(method="fp8", title=f"{title}, from {origin}", default=scheme)


def _is_inverse(name: str, source: CheckpointFolder) -> bool:
    """Whether a tensor has a name that transformers reads scales by, and AutoFP8 doesn't write."""
    weight = source.tensors.get(name.removesuffix("scale") + "weight")
    is_scale = name.endswith(".scale") and weight is not None and weight.dtype == E4M3.dtype
    return is_scale or name.endswith(("weight_scale_inv", ".qscale_weight"))


def mxfp8(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of MXFP8 as transformers and SGLang read it."""
    block = _block("weight_block_size", data.get("weight_block_size", list(MX_BLOCK)))
    if block != MX_BLOCK:
        raise unreadable("weight_block_size", f"{list(MX_BLOCK)}", list(block))
    scheme = Scheme(weights="block", block=block, method="mxfp8", exponents=True)
    return Plan(method="mxfp8", title=f"MXFP8, from {origin}", default=scheme)


_MODELOPT = {
    "FP8": {"weights": "tensor", "activations": "static"},
    "FP8_PER_CHANNEL_PER_TOKEN": {"weights": "channel"},
    "FP8_PB_WO": {"weights": "block", "block": (128, 128), "activations": None},
    "MXFP8": {"weights": "block", "block": MX_BLOCK, "exponents": True},
}


def modelopt(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of NVIDIA's ModelOpt: one algorithm for all, or one for each module."""
    algorithm = data.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        layers = data.get("quantized_layers")
        if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
            raise unreadable("quantized_layers", "an object of modules", layers)
        named = {name: _modelopt_scheme(layer) for name, layer in layers.items()}
        title = f"ModelOpt mixed precision, from {origin}"
        return Plan(method="modelopt", title=title, named=named)
    scheme = _modelopt_scheme(data)
    if not isinstance(scheme, Scheme):
        raise CheckpointError(scheme)
    title = f"ModelOpt {str(algorithm).upper()}, from {origin}"
    return Plan(method="modelopt", title=title, default=scheme)


def _modelopt_scheme(data: Mapping[str, Any]) -> Scheme | str:
    algorithm = data.get("quant_algo")
    name = algorithm.upper() if isinstance(algorithm, str) else ""
    fields: Any = _MODELOPT.get(name)
    if fields is None:
        return str(unreadable("quant_algo", f"one of {tuple(_MODELOPT)}", algorithm))
    size = data.get("group_size")
    if name == "MXFP8" and size not in (None, 32):
        return str(unreadable("group_size", "32", size))
    return Scheme(method="modelopt", **fields)


def quark(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of AMD's Quark: one config for all modules, and others for those that match wildcards."""
    layers = data.get("layer_quant_config") or {}
    if not isinstance(layers, dict):
        raise unreadable("layer_quant_config", "an object of modules", layers)
    return Plan(
        method="quark",
        title=f"Quark FP8, from {origin}",
        patterns=[(ModulePattern.wildcard(k), _quark_scheme(v)) for k, v in layers.items()],
        default=_quark_scheme(data.get("global_quant_config")),
    )


def _quark_scheme(data: Any) -> Scheme | str:
    weight = data.get("weight") if isinstance(data, dict) else None
    kinds: dict[str, Kind] = {"per_tensor": "tensor", "per_channel": "channel"}
    if (
        not isinstance(weight, dict)
        or weight.get("dtype") != "fp8_e4m3"
        or weight.get("qscheme") not in kinds
        or weight.get("ch_axis") not in (None, 0)
    ):
        return str(unreadable("weight", "of 'fp8_e4m3', 'per_tensor' or 'per_channel'", weight))
    inputs = data.get("input_tensors")
    if inputs is not None and not isinstance(inputs, dict):
        return str(unreadable("input_tensors", "an object, or null", inputs))
    activations = None if inputs is None else "dynamic" if inputs.get("is_dynamic") else "static"
    return Scheme(weights=kinds[weight["qscheme"]], activations=activations, method="quark")


def fbgemm(data: Mapping[str, Any], origin: str, source: CheckpointFolder) -> Plan:
    """Of fbgemm: always a scale for each output channel."""
    scheme = Scheme(weights="channel", method="fbgemm_fp8")
    return Plan(method="fbgemm_fp8", title=f"fbgemm FP8, from {origin}", default=scheme)
