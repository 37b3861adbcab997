#!/usr/bin/env bash
# jnp.histogram counts in the dtype of the data: no bin of bfloat16 values gets beyond 256.
#
# A histogram of the values that are to be quantized, or of the codes, is what one chooses a clipping
# threshold by. One would guess that counts are integers, or float32, whatever the data: NumPy's are int64
# for float16 data.
#
# In JAX 0.12.0.1 a bin with 5000 equal values says 2048 for float16 data, 256 for bfloat16 and 16 for
# float8_e4m3fn, with no warning: one more is lost in rounding. Give it float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__)
found = {}
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn):
    counts, _ = jnp.histogram(jnp.ones(5000, dtype), bins=4, range=(0, 2))
    found[jnp.dtype(dtype).name] = float(counts.astype(jnp.float32).sum())
    print(f"5000 ones in {jnp.dtype(dtype).name}: counts {counts}, {counts.dtype}")
assert found == {"float32": 5000, "float16": 2048, "bfloat16": 256, "float8_e4m3fn": 16}
assert np.histogram(np.ones(5000, np.float16), bins=4, range=(0, 2))[0].sum() == 5000
PYTHON
