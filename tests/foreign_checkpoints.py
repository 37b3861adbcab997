"""Checkpoints in each dialect, made by NumPy and the safetensors library, and their values."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import safetensors

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
E8M0, BF16 = np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(ml_dtypes.bfloat16)
F32, U8 = np.dtype(np.float32), np.dtype(np.uint8)
K, V = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
UP, HEAD = "model.layers.0.mlp.up_proj", "lm_head"
SHAPES = {K: (64, 192), V: (64, 192), UP: (160, 192)}
# For files that are changed byte by byte, so that most bytes are of the header.
SMALL = {K: (2, 16), V: (2, 16), UP: (4, 16)}


def like(shapes=SHAPES):
    """The tree that the files are of, dense."""

    def kernel(module):
        return {"kernel": np.zeros(shapes[module][::-1], np.float32)}

    width = shapes[UP][1]
    attention = {"k_proj": kernel(K), "v_proj": kernel(V)}
    layer = {"self_attn": attention, "mlp": {"up_proj": kernel(UP)}}
    return {
        "model": {"layers": {"0": layer}, "norm": {"scale": np.zeros(width, np.float32)}},
        "lm_head": {"kernel": np.zeros((width, 8), np.float32)},
    }


LIKE = like()
PATHS = {module: module.replace(".", "/") + "/kernel" for module in (*SHAPES, HEAD)}


def write_file(path, tensors, metadata=None):
    """A safetensors file of these arrays, by the safetensors library."""
    tensors = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=str(x.dtype), shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes
        )
        for name, x in tensors.items()
    }
    path.write_bytes(safetensors.serialize(specs, metadata=metadata))


@dataclasses.dataclass
class Foreign:
    """A layout.

    Args:
      method: what fp8jax calls the dialect.
      files: JSON files beside, by name.
      kind: "tensor", "channel" or the block, outputs first; or that of each module.
      scale: template of the name of scales, with {} for the module; and their dtype.
      shape: of scales, from those of groups `[out, in]`.
      inputs: template of the name of static scales of activations, and their shape.
      kv: names of static scales of keys and values.
      extra: tensors that belong to it.
      metadata: of the header, or a function of shapes that gives it.
      title: a part of what it is recognized as.
      says: what the config says of activations, of all or by module.
    """

    method: str
    files: dict
    kind: object
    title: str
    scale: str = "{}.weight_scale"
    dtype: np.dtype = F32
    shape: object = tuple
    inputs: str | None = None
    one: tuple = ()
    kv: tuple = ()
    codes: str = "{}.weight"
    format: np.dtype = E4M3
    extra: dict = dataclasses.field(default_factory=dict)
    metadata: object = None
    says: object = "dynamic"

    def kind_of(self, module):
        return self.kind[module] if isinstance(self.kind, dict) else self.kind

    def write(self, folder, shapes=SHAPES, seed=0):
        """Writes the files; returns the values in float64, and the static scales, all by module."""
        rng = np.random.default_rng(seed)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, values, inputs = {}, {}, {}
        for module, shape in shapes.items():
            bits = rng.integers(0, 0x7F if self.format == E4M3 else 0x7C, shape).astype(np.uint8)
            codes = (bits | rng.integers(0, 2, shape).astype(np.uint8) << 7).view(self.format)
            scales, spread = self._scales(module, shape, rng)
            tensors[self.codes.format(module)] = codes
            if self.scale:
                tensors[self.scale.format(module)] = scales
            values[module] = codes.astype(np.float64) * spread
            if self.inputs:
                inputs[module] = np.float32(rng.uniform(0.01, 0.1))
                tensors[self.inputs.format(module)] = inputs[module].reshape(self.one)
        for name in self.kv:
            tensors[name] = np.float32(rng.uniform(0.01, 0.1)).reshape(self.one)
        width = shapes[UP][1]
        tensors[f"{HEAD}.weight"] = rng.normal(size=(8, width)).astype(BF16)
        tensors["model.norm.weight"] = np.ones(width, BF16)
        values[HEAD] = tensors[f"{HEAD}.weight"].astype(np.float64)
        metadata = self.metadata(shapes) if callable(self.metadata) else self.metadata
        write_file(folder / "model.safetensors", tensors | self.extra, metadata)
        for name, data in self.files.items():
            (folder / name).write_text(json.dumps(data))
        kv = {name: tensors[name].item() for name in self.kv}
        return values, inputs, kv

    def _scales(self, module, shape, rng):
        """Scales as they are stored, and spread out over the elements."""
        kind = self.kind_of(module)
        block = {"tensor": shape, "channel": (1, shape[1])}.get(kind, kind)
        groups = tuple(-(-n // b) for n, b in zip(shape, block))
        exponents = rng.integers(118, 132, groups).astype(np.uint8)
        if not self.scale:
            stored, wide = None, np.ones(groups)
        elif self.dtype in (U8, E8M0):
            stored, wide = exponents.view(self.dtype), np.exp2(exponents.astype(np.float64) - 127)
        else:
            stored = rng.uniform(0.001, 0.1, groups).astype(self.dtype)
            wide = stored.astype(np.float64)
        spread = np.kron(wide, np.ones(block))[: shape[0], : shape[1]]
        if stored is not None:
            stored = stored.reshape(self.one if kind == "tensor" else self.shape(groups))
        return stored, spread


def quantization(**fields):
    return {"config.json": {"model_type": "llama", "quantization_config": fields}}


def args(**fields):
    return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False} | fields


def compressed(weights, inputs, targets=("Linear",), fmt="float-quantized", **fields):
    group = {"weights": weights, "input_activations": inputs, "targets": list(targets)}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "transform_config": {},
        "sparsity_config": {},
    } | fields


def fp8(**fields):
    return quantization(
        quant_method="fp8", **({"activation_scheme": "dynamic", "fmt": "e4m3"} | fields)
    )


def modelopt(algorithm, **fields):
    return {
        "hf_quant_config.json": {
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]} | fields,
        },
        "config.json": {"model_type": "llama"},
    }


def quark(weight, inputs=None, **fields):
    return quantization(
        quant_method="quark",
        global_quant_config={"weight": weight, "input_tensors": inputs},
        exclude=["lm_head"],
        **fields,
    )


def comfy(**mark):
    data = np.frombuffer(json.dumps({"format": "float8_e4m3fn"} | mark).encode(), np.uint8)
    return {f"{module}.comfy_quant": data for module in SHAPES}


def torchao(block_of, act="dynamic"):
    return lambda shapes: {
        f"{module}.weight": json.dumps(
            {
                "_type": "Float8Tensor",
                "_data": {"block_size": block_of(shape), "act_quant_kwargs": act},
            }
        )
        for module, shape in shapes.items()
    }


TOKEN = args(strategy="token", dynamic=True)
TENSOR = args(strategy="tensor")
MX = args(strategy="group", group_size=32, scale_dtype="torch.uint8")
ATTENTION = "model.layers.0.self_attn"
CHANNEL_CT = compressed(args(strategy="channel"), TOKEN)
BLOCK_FP8 = {"weight_block_size": [128, 128]}
_INV = {"scale": "{}.weight_scale_inv"}
_AO = {"codes": "{}._weight_qdata", "scale": "{}._weight_scale"}
_GROUPS = {
    "a": {"targets": ["re:.*self_attn.*proj$"], "weights": args(strategy="channel")},
    "b": {
        "targets": [UP],
        "weights": args(strategy="block", block_structure=[128, 128]),
        "format": "naive-quantized",
    },
}

FOREIGN = {
    "ct static and kv": Foreign(
        "compressed-tensors",
        quantization(**compressed(TENSOR, TENSOR, kv_cache_scheme=TENSOR)),
        "tensor",
        "compressed-tensors FP8, from config.json",
        dtype=BF16,
        inputs="{}.input_scale",
        one=(1,),
        kv=(f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"),
        says="static",
    ),
    "ct channel": Foreign(
        "compressed-tensors", quantization(**CHANNEL_CT), "channel", "compressed-tensors FP8"
    ),
    "ct block": Foreign(
        "compressed-tensors",
        quantization(**compressed(args(strategy="block", block_structure=[128, 128]), TOKEN)),
        (128, 128),
        "compressed-tensors FP8",
        dtype=BF16,
    ),
    "ct group": Foreign(
        "compressed-tensors",
        quantization(**compressed(args(strategy="group", group_size=64), None)),
        (1, 64),
        "compressed-tensors FP8",
        says=None,
    ),
    "ct mxfp8": Foreign(
        "compressed-tensors",
        quantization(**compressed(MX, MX | {"dynamic": True}, fmt="mxfp8-quantized")),
        (1, 32),
        "compressed-tensors FP8",
        dtype=U8,
    ),
    "ct groups": Foreign(
        "compressed-tensors",
        quantization(**compressed(None, None, config_groups=_GROUPS, fmt="float-quantized")),
        {K: "channel", V: "channel", UP: (128, 128)},
        "compressed-tensors FP8",
        says=None,
    ),
    "ct compression_config": Foreign(
        "compressed-tensors",
        {"config.json": {"compression_config": CHANNEL_CT}},
        "channel",
        "from config.json",
    ),
    "ct text_config": Foreign(
        "compressed-tensors",
        {"config.json": {"text_config": {"quantization_config": CHANNEL_CT}}},
        "channel",
        "from text_config of config.json",
    ),
    "hf block": Foreign("fp8", fp8(**BLOCK_FP8), (128, 128), "fine-grained FP8", **_INV),
    "hf block bf16": Foreign(
        "fp8", fp8(**BLOCK_FP8), (128, 128), "fine-grained FP8", dtype=BF16, **_INV
    ),
    "hf block u8": Foreign(
        "fp8", fp8(**BLOCK_FP8), (128, 128), "fine-grained FP8", dtype=U8, **_INV
    ),
    "hf no block said": Foreign("fp8", fp8(), (128, 128), "fine-grained FP8", **_INV),
    "hf tensor": Foreign("fp8", fp8(weight_block_size=None), "tensor", "fine-grained FP8", **_INV),
    "hf tensor of rank 2": Foreign(
        "fp8", fp8(weight_block_size=None), "tensor", "fine-grained", one=(1, 1), **_INV
    ),
    "hf static": Foreign(
        "fp8",
        fp8(weight_block_size=None, activation_scheme="static"),
        "tensor",
        "fine-grained FP8",
        inputs="{}.activation_scale",
        says="static",
        **_INV,
    ),
    "mistral": Foreign(
        "fp8",
        fp8(weight_block_size=None, activation_scheme="static"),
        "tensor",
        "fine-grained FP8",
        scale="{}.qscale_weight",
        inputs="{}.qscale_act",
        says="static",
    ),
    "minimax": Foreign(
        "fp8",
        fp8(fmt="float8_e4m3fn", ignored_layers=["lm_head"], **BLOCK_FP8),
        (128, 128),
        "fine-grained FP8",
        **_INV,
    ),
    "deepseek v4": Foreign(
        "fp8",
        fp8(scale_fmt="ue8m0", **BLOCK_FP8),
        (128, 128),
        "fine-grained FP8",
        scale="{}.scale",
        dtype=E8M0,
    ),
    "autofp8": Foreign(
        "fp8",
        fp8(activation_scheme="static"),
        "tensor",
        "AutoFP8 or vLLM FP8",
        inputs="{}.input_scale",
        one=(1,),
        kv=(f"{ATTENTION}.kv_scale",),
        says="static",
    ),
    "autofp8 dynamic": Foreign("fp8", fp8(), "tensor", "AutoFP8 or vLLM FP8"),
    "autofp8 oldest": Foreign(
        "fp8",
        quantization(quant_method="fp8", activation_scheme="static"),
        "tensor",
        "AutoFP8 or vLLM FP8",
        inputs="{}.act_scale",
        says="static",
    ),
    "mxfp8": Foreign(
        "mxfp8",
        quantization(quant_method="mxfp8", weight_block_size=[1, 32]),
        (1, 32),
        "MXFP8, from config.json",
        dtype=U8,
        **_INV,
    ),
    "modelopt fp8": Foreign(
        "modelopt",
        modelopt("FP8"),
        "tensor",
        "ModelOpt FP8, from hf_quant_config.json",
        inputs="{}.input_scale",
        says="static",
    ),
    "modelopt kv": Foreign(
        "modelopt",
        quantization(quant_method="modelopt", quant_algo="FP8", ignore=["lm_head"]),
        "tensor",
        "ModelOpt FP8, from config.json",
        inputs="{}.input_scale",
        kv=(f"{K}.k_scale", f"{V}.v_scale"),
        says="static",
    ),
    "modelopt channel": Foreign(
        "modelopt",
        modelopt("FP8_PER_CHANNEL_PER_TOKEN"),
        "channel",
        "ModelOpt FP8_PER_CHANNEL_PER_TOKEN",
        shape=lambda groups: groups[:1],
    ),
    "modelopt blocks": Foreign(
        "modelopt",
        quantization(quant_method="modelopt", quant_algo="fp8_pb_wo"),
        (128, 128),
        "ModelOpt FP8_PB_WO",
        shape=lambda groups: (groups[0], 1, groups[1], 1),
        says=None,
    ),
    "modelopt mxfp8": Foreign(
        "modelopt", modelopt("MXFP8", group_size=32), (1, 32), "ModelOpt MXFP8", dtype=U8
    ),
    "modelopt mixed": Foreign(
        "modelopt",
        modelopt(
            "MIXED_PRECISION",
            quantized_layers={
                K: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
                V: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
                UP: {"quant_algo": "fp8_pb_wo"},
                "model.layers.0.mlp.other": {"quant_algo": "NVFP4"},
            },
        ),
        {K: "channel", V: "channel", UP: (128, 128)},
        "ModelOpt mixed precision",
        says={K: "dynamic", V: "dynamic", UP: None},
    ),
    "quark": Foreign(
        "quark",
        quark(
            {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
            {"dtype": "fp8_e4m3", "is_dynamic": False},
        ),
        "tensor",
        "Quark FP8",
        dtype=BF16,
        inputs="{}.input_scale",
        kv=(f"{K}.output_scale", f"{V}.output_scale"),
        says="static",
    ),
    "quark layers": Foreign(
        "quark",
        quark(
            {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0},
            layer_quant_config={
                "*mlp*": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}
            },
        ),
        {K: "channel", V: "channel", UP: "tensor"},
        "Quark FP8",
        shape=lambda groups: groups[:1],
        says=None,
    ),
    "fbgemm": Foreign(
        "fbgemm_fp8",
        quantization(quant_method="fbgemm_fp8", activation_scale_ub=1200.0),
        "channel",
        "fbgemm FP8",
    ),
    "torchao rows": Foreign(
        "torchao",
        quantization(quant_method="torchao", quant_type={"default": {}}),
        "channel",
        "torchao FP8, from config.json and metadata",
        metadata=torchao(lambda shape: [1, shape[1]]),
        **_AO,
    ),
    "torchao tensor": Foreign(
        "torchao",
        {},
        "tensor",
        "torchao FP8, from the header",
        metadata=torchao(list, act=None),
        one=(1, 1),
        says=None,
        **_AO,
    ),
    "torchao blocks": Foreign(
        "torchao",
        quantization(quant_method="torchao"),
        (128, 128),
        "torchao FP8",
        metadata=torchao(lambda shape: [128, 128]),
        **_AO,
    ),
    "comfy": Foreign(
        "comfyui",
        {},
        "tensor",
        "ComfyUI FP8, from its tensors",
        scale="{}.scale_weight",
        inputs="{}.scale_input",
        extra={"scaled_fp8": np.zeros(0, E4M3)},
        says="static",
    ),
    "comfy e5m2, wide products": Foreign(
        "comfyui",
        {},
        "tensor",
        "ComfyUI FP8",
        scale="{}.scale_weight",
        format=E5M2,
        extra={"scaled_fp8": np.zeros(2, E5M2)},
        one=(1,),
        says=None,
    ),
    "comfy newer": Foreign("comfyui", {}, "tensor", "ComfyUI FP8", extra=comfy()),
    "comfy newest": Foreign(
        "comfyui",
        {},
        "tensor",
        "ComfyUI FP8, from _quantization_metadata",
        metadata={
            "_quantization_metadata": json.dumps(
                {"layers": {module: {"format": "float8_e4m3fn"} for module in SHAPES}}
            )
        },
        inputs="{}.input_scale",
        says="static",
    ),
    "cast": Foreign("cast", {}, "tensor", "a plain cast to float8", scale="", says=None),
    "cast e5m2": Foreign(
        "cast", {"config.json": {}}, "tensor", "a plain cast", scale="", format=E5M2, says=None
    ),
}
