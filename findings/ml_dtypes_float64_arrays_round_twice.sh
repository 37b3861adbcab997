#!/usr/bin/env bash
# A float64 array cast to float8 by ml_dtypes isn't rounded to nearest; a single float64 is.
#
# ml_dtypes is what one holds a codec of one's own against, with float64 values so that nothing is lost on
# the way. One would guess that `np.array([v]).astype(T)` and `T(v)` are the same number, the nearest of T.
#
# With ml_dtypes 0.6.0, 272 + 1e-7 as float8_e4m3fn is 256 in an array and 288 as a scalar; 288 is nearer.
# Arrays go through float32, where 272 + 1e-7 is 272, a tie. TensorStore 0.1.86 and a compiled JAX cast give
# 288, so that "differs from ml_dtypes" is not "wrong". Of values 2^-40 of themselves beyond a midpoint of two
# neighbours of the format, half are rounded to the wrong one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "ml_dtypes==0.6.0" "numpy==2.5.5" "jax==0.12.0.1" "jaxlib==0.12.0.1" \
    "tensorstore==0.1.86"
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 "$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorstore

FLOAT8 = ml_dtypes.float8_e4m3fn
casts = {
    "ml_dtypes, array": lambda x: x.astype(FLOAT8),
    "ml_dtypes, scalars": lambda x: np.array([FLOAT8(float(v)) for v in x]),
    "TensorStore": lambda x: tensorstore.cast(
        tensorstore.array(x), tensorstore.dtype(FLOAT8)
    ).read().result(),
    "JAX, compiled": lambda x: np.asarray(jax.jit(lambda v: v.astype(FLOAT8))(jnp.asarray(x))),
}
positive = np.arange(1, 127, dtype=np.uint8).view(FLOAT8).astype(np.float64)
low, high = positive[:-1], positive[1:]
past = (low + high) / 2 * (1 + 2.0**-40)

print("ml_dtypes", version("ml_dtypes"), "jax", jax.__version__, "tensorstore", version("tensorstore"))
wrong = {}
for name, cast in casts.items():
    wrong[name] = int((cast(past).astype(np.float64) != high).sum())
    print(f"{name}: 272 + 1e-7 is {cast(np.array([272 + 1e-7]))[0]}; {wrong[name]} of {len(past)} wrong")
assert past.dtype == np.float64 and (past > (low + high) / 2).all()
assert wrong.pop("ml_dtypes, array") == 62
assert not any(wrong.values()), wrong
PYTHON
