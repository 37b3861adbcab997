#!/usr/bin/env bash
# Casting to float8_e4m3fn with saturate=0 in ONNX Runtime: 470 is NaN, 490 is 448, 500 is NaN.
#
# With saturate=0, ONNX says, what is above the largest value, 448, becomes NaN once it is rounded. One would
# guess one threshold, as in the reference evaluator of the onnx package and in ml_dtypes: 464 rounds to 448,
# all above it is NaN.
#
# onnxruntime 1.32.0 on a CPU gives NaN from there up to 480, then 448 from 480 to 496, and NaN again. QuantizeLinear
# does the same. So a non-saturating cast doesn't show every overflow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "onnxruntime==1.32.0" "onnx==1.23.2" "ml_dtypes==0.6.0" "numpy==2.5.5"
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

casts = [
    helper.make_node("Cast", ["x"], ["codes"], to=TensorProto.FLOAT8E4M3FN, saturate=0),
    helper.make_node("Cast", ["codes"], ["cast"], to=TensorProto.FLOAT),
    helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], saturate=0),
    helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["quantized"]),
]
graph = helper.make_graph(
    casts,
    "overflow",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
    [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in ("cast", "quantized")],
    [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
    ],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
onnx.checker.check_model(model)

x = np.arange(449, 1024, dtype=np.float32)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
cast, quantized = session.run(None, {"x": x})
reference = ReferenceEvaluator(model).run(None, {"x": x})[0]
print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__)
for name, result in (("reference", reference), ("Cast", cast), ("QuantizeLinear", quantized)):
    finite = x[~np.isnan(result)].astype(int)
    print(f"{name}: finite for {finite[0]} to {finite[finite <= 464][-1]}, then {finite[finite > 464]}")
assert np.array_equal(~np.isnan(reference), x <= 464)
for result in (cast, quantized):
    kept = x[(x > 464) & ~np.isnan(result)]
    assert (result[(x > 464) & ~np.isnan(result)] == 448).all()
    assert 480 <= kept.min() and kept.max() < 496 and len(kept) > 10, kept
PYTHON
