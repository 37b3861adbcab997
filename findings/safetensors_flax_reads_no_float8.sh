#!/usr/bin/env bash
# safetensors.flax writes float8 arrays and can't read them back.
#
# The format has names for them (F8_E4M3, F8_E5M2, F8_E8M0), and bfloat16, which NumPy doesn't have either,
# goes there and back. One would guess that what `save_file` takes without a word `load_file` returns.
#
# With safetensors 0.8.0 `load_file` says "module 'numpy' has no attribute 'float8_e4m3fn'", though ml_dtypes
# is installed and imported, and the file is right: PyTorch reads it. `load`, from bytes, knows neither float8
# nor bfloat16, which `save` writes. One finds out when the checkpoint is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "safetensors==0.8.0" "flax==0.12.12" "jax==0.12.0.1" "jaxlib==0.12.0.1" \
    "ml_dtypes==0.6.0" "numpy==2.5.5"
cat > "$folder/read.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax

print("safetensors", version("safetensors"), "jax", jax.__version__)
results = {}
for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
    path = f"{sys.argv[1]}/{name}.safetensors"
    x = jnp.array([1, 2, 4, 0.5], name)
    safetensors.flax.save_file({"x": x}, path)
    data = open(path, "rb").read()
    start = 8 + int.from_bytes(data[:8], "little")
    assert np.array_equal(np.frombuffer(data[start:], np.uint8), np.asarray(x).view(np.uint8))
    print(name, "is written as", json.loads(data[8:start])["x"]["dtype"])
    for way, read in (
        ("load_file", lambda: safetensors.flax.load_file(path)["x"]),
        ("load", lambda: safetensors.flax.load(data)["x"]),
    ):
        try:
            results[name, way] = str(read().dtype)
        except (AttributeError, KeyError) as error:
            results[name, way] = f"{type(error).__name__}: {error}"
        print(f"    {way}: {results[name, way]}")
assert results["bfloat16", "load_file"] == "bfloat16" and "BF16" in results["bfloat16", "load"]
for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
    assert "no attribute" in results[name, "load_file"] and "KeyError" in results[name, "load"]
PYTHON
JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/read.py" "$folder"
