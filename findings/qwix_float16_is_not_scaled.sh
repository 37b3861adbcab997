#!/usr/bin/env bash
# A float16 array quantized by Qwix gets the scale 1 unless it has values above 3.5.
#
# One would guess that the error of an FP8 quantization doesn't depend on the size of the numbers: the scale
# is there for that. It is so in Qwix for float32 and bfloat16.
#
# Qwix 0.1.8 (JAX 0.12.0.1) computes scales in the array's dtype and takes one below the square root of its
# smallest normal number for that of an empty array, and makes it 1. In float16 that root is 0.0078; a scale
# is amax / 448. Weights of a standard deviation of 0.001 have an error of 55 % in E4M3, those of 0.0001
# become zero; in int8 those of 0.02 do. No error or warning tells it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "qwix==0.1.8" "flax==0.12.12" "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import qwix


def error(x, qtype):
    back = qwix.dequantize(qwix.quantize(x, qtype, channelwise_axes=(0,)))
    x, back = x.astype(jnp.float32), back.astype(jnp.float32)
    return float(jnp.linalg.norm(back - x) / jnp.linalg.norm(x))


normal = jax.random.normal(jax.random.key(0), (64, 64))
print("qwix", version("qwix"), "jax", jax.__version__)
errors = {}
for deviation in (0.02, 0.001, 0.0001):
    for dtype in ("bfloat16", "float16"):
        x = (normal * deviation).astype(dtype)
        errors[deviation, dtype] = error(x, jnp.float8_e4m3fn), error(x, "int8")
        print(f"deviation {deviation}, {dtype}: relative error in E4M3 and int8", errors[deviation, dtype])
scales = qwix.quantize((normal * 0.02).astype("float16"), jnp.float8_e4m3fn, channelwise_axes=(0,)).scale
print("scales of a deviation of 0.02 in float16:", set(scales.ravel().tolist()))
assert all(fp8 < 0.03 and int8 < 0.01 for (_, dtype), (fp8, int8) in errors.items() if dtype == "bfloat16")
assert errors[0.02, "float16"][1] == 1 and errors[0.001, "float16"][0] > 0.5
assert errors[0.0001, "float16"] == (1, 1) and set(scales.ravel().tolist()) == {1}
PYTHON
