#!/usr/bin/env bash
# np.mean of a bfloat16 or float8 array is far too small, with no warning; np.dot and @ differ.
#
# NumPy adds up the mean of a float16 array in float32, and documents it. One would guess that it does for
# the shorter types of ml_dtypes, as JAX does for bfloat16; or that a sum that can't be held is at least large.
#
# With NumPy 2.5.5 and ml_dtypes 0.6.0 the mean of 100,000 ones is 0.0026 in bfloat16 and 0 in float8_e4m3fn:
# the sum stops at 256 and at 16, where one more is lost in rounding. A quantizer's mean absolute error, read
# so, looks 50 times better than it is. `np.dot` gives a result of their dtype, and 1000 ones times 1000 ones
# are NaN in E4M3, while `@`, the same product of two vectors, gives float32. Pass dtype=np.float32, or use @.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "ml_dtypes==0.6.0" "numpy==2.5.5"
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np

print("numpy", np.__version__, "ml_dtypes", version("ml_dtypes"))
means = {}
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
    name, ones, row = np.dtype(dtype).name, np.ones(100_000, dtype), np.ones(1000, dtype)
    means[name] = float(np.mean(ones))
    dot, at = np.dot(row, row), row @ row
    print(f"{name}: mean of ones {means[name]:.2g}, with dtype=float32 {np.mean(ones, dtype=np.float32)}; "
          f"1000 ones by np.dot {dot}, {dot.dtype}, by @ {at}, {at.dtype}")
    assert np.mean(ones, dtype=np.float32) == 1 and at == 1000
    assert at.dtype == (dtype if name == "float16" else np.float32) and dot.dtype == dtype
    assert np.isnan(dot) or name != "float8_e4m3fn"
assert means["float16"] == 1 and means["bfloat16"] < 0.01
assert means["float8_e4m3fn"] < 0.001 and means["float8_e5m2"] < 0.001

x = np.random.default_rng(0).normal(size=100_000).astype(ml_dtypes.bfloat16)
error = np.abs(x - x.astype(ml_dtypes.float8_e4m3fn).astype(ml_dtypes.bfloat16))
read, right = float(error.mean()), float(error.astype(np.float32).mean())
print(f"mean absolute error of a cast to float8: {read:.2g} read in bfloat16, {right:.2g} in float32")
assert right > 50 * read
PYTHON
