#!/usr/bin/env bash
# Casts to E8M0, the format of MX scales, in ONNX's reference evaluator and in ONNX Runtime.
#
# The text of Cast has a table: with saturate=1 infinity becomes the largest value, 2^127; with saturate=0 a
# zero becomes NaN. One would guess that the evaluator in the onnx package, which is there to be compared with,
# does that, and that a power of two stays one whatever the rounding.
#
# With onnx 1.23.2 the reference makes NaN of infinity with saturate=1, 2^-127 of zero with saturate=0, and
# with the default round_mode "up" it moves 2^-127, which E8M0 holds, to 2^-126. onnxruntime 1.32.0 follows the
# text in all three. A negative number, which the text leaves open, becomes NaN or 2^-127 in ONNX Runtime and
# loses its sign in the reference. helper.make_tensor has the reference's casts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "onnxruntime==1.32.0" "onnx==1.23.2" "ml_dtypes==0.6.0" "numpy==2.5.5"
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

SMALLEST, LARGEST = 2.0**-127, 2.0**127
x = np.float32([0, np.inf, SMALLEST, -2, 3, LARGEST])


def cast(saturate):
    nodes = [
        helper.make_node("Cast", ["x"], ["scale"], to=TensorProto.FLOAT8E8M0, saturate=saturate),
        helper.make_node("Cast", ["scale"], ["y"], to=TensorProto.FLOAT),
    ]
    x_info, y_info = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in "xy")
    graph = helper.make_graph(nodes, "scales", [x_info], [y_info])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return ReferenceEvaluator(model).run(None, {"x": x})[0], session.run(None, {"x": x})[0]


def same(found, expected):
    return np.array_equal(found, np.float32(expected), equal_nan=True)


print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__, "values", x)
for saturate in (0, 1):
    reference, runtime = cast(saturate)
    print(f"saturate={saturate}: reference {reference}, ONNX Runtime {runtime}")
    assert same(reference, [SMALLEST, np.nan, 2 * SMALLEST, 2, 4, LARGEST])
    special = [SMALLEST, LARGEST, SMALLEST, SMALLEST] if saturate else [np.nan, np.nan, SMALLEST, np.nan]
    assert same(runtime, special + [4, LARGEST])
tensor = helper.make_tensor("scale", TensorProto.FLOAT8E8M0, [len(x)], x)
made = numpy_helper.to_array(tensor).astype(np.float32)
print("make_tensor:", made)
assert made[2] == 2 * SMALLEST
PYTHON
