#!/usr/bin/env bash
# A float16 layer of small weights, quantized to FP8 by torchao: its scales are float32, and yet become 0.
#
# A scale is there so that the size of the weights doesn't matter, and float32 holds 10^-38. One would guess
# that weights of 0.0003 are quantized as well as those of 1, as they are in a float32 or bfloat16 layer.
#
# With torchao 0.18.0 (PyTorch 2.13.0) amax / 57344 (E5M2) is computed in the weights' dtype before it is made
# float32, and ends where float16 does: weights with a standard deviation of 0.0003 come back as zeros, the
# largest code times a scale of 0; where one is 0 it is NaN. With E4M3 it happens at 0.000001. Nothing warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON' 2> "$folder/log" || { cat "$folder/log"; exit 1; }
from importlib.metadata import version

import torch
from torchao.quantization import Float8WeightOnlyConfig, quantize_

print("torchao", version("torchao"), "torch", torch.__version__)


def error(dtype, float8, deviation):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False).to(dtype)
    layer.weight.data = (torch.randn(64, 64) * deviation).to(dtype)
    weight = layer.weight.detach().float()
    model = torch.nn.Sequential(layer)
    quantize_(model, Float8WeightOnlyConfig(weight_dtype=float8))
    back = model[0].weight.dequantize().float()
    return ((back - weight).norm() / weight.norm()).item(), model[0].weight.scale.dtype


found = {}
for float8 in (torch.float8_e5m2, torch.float8_e4m3fn):
    for deviation in (1.0, 3e-4, 1e-6):
        errors = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            errors[dtype], scale = error(dtype, float8, deviation)
            assert scale == torch.float32
        print(float8, "standard deviation", deviation, {str(d): round(e, 3) for d, e in errors.items()})
        assert max(errors[torch.float32], errors[torch.bfloat16]) < 0.06
        found[float8, deviation] = errors[torch.float16]
assert found[torch.float8_e5m2, 1.0] < 0.06 and found[torch.float8_e4m3fn, 3e-4] < 0.06
for float8, deviation in ((torch.float8_e5m2, 3e-4), (torch.float8_e4m3fn, 1e-6)):
    assert not found[float8, deviation] < 1  # 1: zeros; or NaN
PYTHON
