#!/usr/bin/env bash
# 0.75, 1.75 and 3.5 in FP4: Model Optimizer's MXFP4 rounds them down, its NVFP4 rounds them up.
#
# Both formats have the same elements, E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6. One would guess one rounding in one
# library, and that of a cast: a value halfway between two goes to the one with an even mantissa.
#
# With nvidia-modelopt 0.47.0 a block with the scale 1 and these numbers comes back as 0.5, 1.5 and 3 in MXFP4,
# and as 1, 2 and 4 in NVFP4. torchao 0.18.0 and ml_dtypes 0.6.0 have the latter, gguf 0.19.0 the former. Ties
# are common: a bfloat16 weight has 8 bits, and a scale that is a power of two leaves them as they are. Of
# normal weights one in 270 has another code, each time a smaller one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6 gguf==0.19.0 nvidia-modelopt==0.47.0 torchao==0.18.0 \
    huggingface_hub==2.4.0 ml_dtypes==0.6.0
"$folder/env/bin/python" -W ignore - <<'PYTHON' 2> "$folder/log" || { cat "$folder/log"; exit 1; }
from importlib.metadata import version

import ml_dtypes
import torch
from gguf.quants import MXFP4
from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor

TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def mxfp4(x):
    codes, scale = MXFP4QTensor.quantize(x.clone(), 32)
    return codes.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})


def nvfp4(x):
    ones = torch.ones(x.shape[0], x.shape[1] // 16)
    codes, scale, double = NVFP4QTensor.quantize(x.clone(), 16, ones, torch.tensor(1.0))
    return codes.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})


casts = {
    "modelopt, MXFP4": mxfp4,
    "modelopt, NVFP4": nvfp4,
    "gguf, MXFP4": lambda x: torch.from_numpy(MXFP4.dequantize_blocks(MXFP4.quantize_blocks(x.numpy()))),
    "torchao, MXFP4": lambda x: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32),
    "ml_dtypes": lambda x: torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).astype("float32")),
}
for package in ("nvidia-modelopt", "gguf", "torchao", "ml_dtypes"):
    print(package, version(package), end="; ")
block = torch.tensor([[6.0] + TIES + [0.5] * 24])  # with an amax of 6 the scale is 1
print("halfway cases:", TIES)
found = {name: cast(block)[0, 1:8].tolist() for name, cast in casts.items()}
for name, values in found.items():
    print(f"{name}: {values}")
    down = name in ("modelopt, MXFP4", "gguf, MXFP4")
    assert values == ([0, 0.5, 1, 1.5, 2, 3, 4] if down else [0, 1, 1, 2, 2, 4, 4])

torch.manual_seed(0)
weights = torch.randn(4096, 32).bfloat16().float()
weights[:, 0] = 6
share = (mxfp4(weights) != casts["ml_dtypes"](weights)).float().mean().item()
print(f"bfloat16 weights whose code differs: {share:.4f}")
assert 0.003 < share < 0.005
PYTHON
