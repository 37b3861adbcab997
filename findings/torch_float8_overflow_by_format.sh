#!/usr/bin/env bash
# What a cast to float8 makes of infinity in PyTorch: 448, NaN or infinity, by the format.
#
# E4M3 has no infinity. One would guess that an infinity becomes NaN there, as a value that isn't finite
# should stay one, as JAX and ml_dtypes have it; and that the formats of one library agree on what overflows.
#
# PyTorch 2.13.0 on a CPU makes 448 of an infinity and of 1e9 in float8_e4m3fn, NaN of both in the two
# "fnuz" formats, and infinity in float8_e5m2. So a check for finite values after an E4M3 cast finds
# nothing, and the same float32 array has other codes in JAX. Sums follow: 600 ones times 600 ones in
# float8_e4m3fn are 448.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import torch

VALUES = [1.0, 1e9, float("inf"), float("-inf"), float("nan")]
found = {}
print("torch", torch.__version__, "jax", jax.__version__)
for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"):
    in_torch = torch.tensor(VALUES).to(getattr(torch, name)).float().tolist()
    in_jax = jnp.array(VALUES).astype(name).astype(jnp.float32).tolist()
    found[name] = list(map(str, in_torch)), list(map(str, in_jax))
    print(f"{VALUES} in {name}: {in_torch} in PyTorch, {in_jax} in JAX")
row = torch.ones(1, 600).to(torch.float8_e4m3fn)
product = (row @ row.T).float().item()
print("600 ones times 600 ones in float8_e4m3fn:", product)
nan = ["1.0", "nan", "nan", "nan", "nan"]
assert found["float8_e4m3fn"] == (["1.0", "448.0", "448.0", "-448.0", "nan"], nan)
assert found["float8_e4m3fnuz"] == found["float8_e5m2fnuz"] == (nan, nan)
assert found["float8_e5m2"] == (["1.0", "inf", "inf", "-inf", "nan"],) * 2
assert product == 448
PYTHON
