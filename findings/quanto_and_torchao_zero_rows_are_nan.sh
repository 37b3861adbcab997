#!/usr/bin/env bash
# A layer with one row of zeros, its weights quantized to FP8 by optimum-quanto or by torchao.
#
# Pruned channels and padded vocabularies have such rows. One would guess that zeros stay zeros, as they do
# in int8 with the same two libraries, and that a scale of 0 is looked out for.
#
# With optimum-quanto 0.2.7 and torchao 0.18.0 (PyTorch 2.13.0) the row is NaN, and so is that output for
# every input: amax, 0, divided by 448 is the scale, and 0 is divided by it. In an output layer one padded
# token makes each softmax NaN. compressed-tensors 0.20.0 gives such a row a small scale, and zeros.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 torchao==0.18.0 optimum-quanto==0.2.7 \
    compressed-tensors==0.20.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON' 2> "$folder/log" || { cat "$folder/log"; exit 1; }
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from optimum import quanto
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

ROW = 3


def layer():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64, bias=False)
    linear.weight.data[ROW] = 0
    return linear


def by_quanto(qtype):
    model = torch.nn.Sequential(layer())
    quanto.quantize(model, weights=qtype)
    quanto.freeze(model)
    return model


def by_torchao(config):
    model = torch.nn.Sequential(layer())
    quantize_(model, config)
    return model


x = torch.randn(8, 64)
outputs = {
    "quanto, float8": by_quanto(quanto.qfloat8)(x),
    "quanto, int8": by_quanto(quanto.qint8)(x),
    "torchao, float8": by_torchao(Float8WeightOnlyConfig())(x),
    "torchao, int8": by_torchao(Int8WeightOnlyConfig())(x),
}
arguments = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
weight = layer().weight.detach()
qparams = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), arguments)
outputs["compressed-tensors, float8"] = x @ fake_quantize(weight, *qparams, arguments).T
for package in ("torch", "optimum-quanto", "torchao", "compressed-tensors"):
    print(package, version(package), end="; ")
print("a layer whose row", ROW, "is zero")
for name, y in outputs.items():
    columns = y.isnan().all(0).nonzero().flatten().tolist()
    print(f"{name}: outputs that are NaN {columns}; output {ROW} {y[0, ROW].item()}")
    if name in ("quanto, float8", "torchao, float8"):
        assert columns == [ROW]
    else:
        assert not y.isnan().any() and (y[:, ROW] == 0).all()
PYTHON
