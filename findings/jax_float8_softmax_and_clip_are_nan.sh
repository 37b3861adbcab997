#!/usr/bin/env bash
# The softmax of three small float8_e4m3fn logits is NaN, and so is a clip to a range that holds them all.
#
# One would guess that jax.nn.softmax of [1, 2, 3] is right to the precision of its dtype, as it is in
# float16, and that `jnp.clip(x, -500, 500)` of such an x is x.
#
# In JAX 0.12.0.1 both are NaN throughout, with no warning, and the same in float8_e5m2 is right. A bound
# written as a Python number takes the array's dtype: 500 in E4M3 is NaN. So does the minus infinity that
# softmax takes its maximum from, and that callers pass as `initial=`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

exact = jax.nn.softmax(jnp.array([1.0, 2.0, 3.0]))
results = {}
for dtype in (jnp.float16, jnp.float8_e5m2, jnp.float8_e4m3fn):
    x = jnp.array([1, 2, 3], dtype)
    results[jnp.dtype(dtype).name] = {
        "softmax": jax.nn.softmax(x).astype(jnp.float32),
        "log_softmax": jax.nn.log_softmax(x).astype(jnp.float32),
        "clip to 500": jnp.clip(x, -500, 500).astype(jnp.float32),
        "max from -inf": jnp.max(x, initial=-jnp.inf).astype(jnp.float32),
    }
print("jax", jax.__version__)
for dtype, values in results.items():
    print(dtype, {name: value.tolist() for name, value in values.items()})
for dtype in ("float16", "float8_e5m2"):
    assert jnp.abs(results[dtype]["softmax"] / exact - 1).max() < 0.15
    assert results[dtype]["clip to 500"].tolist() == [1, 2, 3] and results[dtype]["max from -inf"] == 3
for name, value in results["float8_e4m3fn"].items():
    assert jnp.isnan(value).all(), name
PYTHON
