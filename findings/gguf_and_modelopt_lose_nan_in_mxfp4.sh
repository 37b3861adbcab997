#!/usr/bin/env bash
# One NaN in a block of 32 numbers, quantized to MXFP4 by gguf-py and by NVIDIA's Model Optimizer.
#
# E2M1 has no NaN, but E8M0, the format of the scale, has. One would guess that such a block comes back as
# NaN, as it does from torchao 0.18.0, or that its other numbers are unharmed.
#
# With gguf 0.19.0 and nvidia-modelopt 0.47.0 the NaN and 31 ones come back as 32 zeros, under the smallest
# scale there is, with no error and no NaN. A diverged weight leaves no trace in the file but outputs that
# are too small. Nor does gguf know the NaN that others write: a block with the scale 0xFF is read as 2^128
# times its elements, zeros and infinities.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6 gguf==0.19.0 nvidia-modelopt==0.47.0 torchao==0.18.0 \
    huggingface_hub==2.4.0
"$folder/env/bin/python" -W ignore - <<'PYTHON' 2> "$folder/log" || { cat "$folder/log"; exit 1; }
from importlib.metadata import version

import numpy as np
import torch
from gguf.quants import MXFP4
from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor


def by_gguf(x):
    return MXFP4.dequantize_blocks(MXFP4.quantize_blocks(x))


def by_modelopt(x):
    codes, scale = MXFP4QTensor.quantize(torch.from_numpy(x), 32)
    return codes.dequantize(torch.float32, scale=scale, block_sizes={-1: 32}).numpy()


def by_torchao(x):
    return MXTensor.to_mx(torch.from_numpy(x), torch.float4_e2m1fn_x2, 32).dequantize(torch.float32).numpy()


for package in ("gguf", "nvidia-modelopt", "torchao", "torch"):
    print(package, version(package), end="; ")
print("there and back:")
for first in (1.0, np.nan):
    block = np.full((1, 32), 1, np.float32)
    block[0, 0] = first
    back = {f.__name__[3:]: f(block)[0] for f in (by_gguf, by_modelopt, by_torchao)}
    print(f"{first} and 31 ones:", {name: f"{b[0]}, {b[1]} ..." for name, b in back.items()})
    if first == 1:
        assert all((values == 1).all() for values in back.values())
    else:
        assert not back["gguf"].any() and not back["modelopt"].any() and np.isnan(back["torchao"]).all()
written = np.concatenate([[0xFF], np.full(16, 0x20)]).astype(np.uint8)  # the elements 0 and 1
read = np.unique(MXFP4.dequantize_blocks(written[None]))
print("gguf: a block with the scale 0xFF has the values", read)
assert read.tolist() == [0, np.inf]
PYTHON
