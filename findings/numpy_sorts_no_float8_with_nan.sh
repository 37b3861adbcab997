#!/usr/bin/env bash
# One NaN in a float8 or bfloat16 array, and np.sort leaves it unsorted.
#
# NumPy's sort documents that NaN goes to the end, for real types. One would guess that it does for the types
# of ml_dtypes: that package gives NumPy their comparisons, and jnp.sort of the same array does.
#
# With ml_dtypes 0.6.0 and NumPy 2.5.5, np.sort([3, nan, 1, 2]) is [3, nan, 1, 2]: each comparison with NaN
# says "not less", and the sort takes what is on either side for sorted. np.unique of [3, nan, 1, 3] has 3
# twice, np.argsort is [0, 1, 2, 3]. Percentiles for a clipping threshold are read off such an array.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import jax.numpy as jnp
import ml_dtypes
import numpy as np

print("numpy", np.__version__, "ml_dtypes", version("ml_dtypes"))
results = {}
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
    x = np.array([3, np.nan, 1, 2], dtype)
    again = np.array([3, np.nan, 1, 3], dtype)
    name = np.dtype(dtype).name
    results[name] = np.sort(x).astype(float), np.unique(again).astype(float), np.argsort(x)
    print(f"{name}: sort {results[name][0]}, unique {results[name][1]}, argsort {results[name][2]}")
    assert np.array_equal(np.asarray(jnp.sort(jnp.asarray(x))).astype(float), [1, 2, 3, np.nan], equal_nan=True)
for name, (ordered, unique, places) in results.items():
    right = name == "float16"
    assert np.array_equal(ordered, [1, 2, 3, np.nan] if right else [3, np.nan, 1, 2], equal_nan=True)
    assert np.array_equal(unique, [1, 3, np.nan] if right else [3, np.nan, 1, 3], equal_nan=True)
    assert places.tolist() == ([2, 3, 0, 1] if right else [0, 1, 2, 3])
PYTHON
