#!/usr/bin/env bash
# MX scales (float8_e8m0fnu) in an Orbax checkpoint, restored as float32.
#
# Orbax converts while it restores: give it an abstract array of another dtype, and float8_e4m3fn comes back
# as the same numbers in float32. One would guess the same of E8M0, of which every value is a power of two
# that float32 holds exactly.
#
# With orbax-checkpoint 0.12.8 (TensorStore 0.1.86) the scales 1, 2, 4 and 0.5 come back as 2^64, -2^65,
# -2^66 and 2^63, with no error; and 1, 2, 4, 0.5 stored in float32 come back as 2^-64 and so on when E8M0 is
# asked for. TensorStore's own cast takes the byte for a sign, other exponent bits and a mantissa. Restored
# in the dtype that was stored they are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "orbax-checkpoint==0.12.8" "tensorstore==0.1.86" "ml_dtypes==0.6.0" \
    "jax==0.12.0.1" "jaxlib==0.12.0.1"
cat > "$folder/restore.py" <<'PYTHON'
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import orbax.checkpoint

VALUES = [1, 2, 4, 0.5]
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
found = {}
with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    for stored, asked in (
        ("float8_e4m3fn", "float32"),
        ("float8_e8m0fnu", "float8_e8m0fnu"),
        ("float8_e8m0fnu", "float32"),
        ("float32", "float8_e8m0fnu"),
    ):
        path = f"{sys.argv[1]}/{stored}_{asked}"
        checkpointer.save(path, {"scale": jnp.array(VALUES, stored)})
        checkpointer.wait_until_finished()
        target = {"scale": jax.ShapeDtypeStruct((4,), asked, sharding=sharding)}
        found[stored, asked] = checkpointer.restore(path, target)["scale"].astype("float32").tolist()
print("orbax-checkpoint", version("orbax-checkpoint"), "tensorstore", version("tensorstore"))
for (stored, asked), values in found.items():
    print(f"{VALUES} stored as {stored}, restored as {asked}: {values}")
assert found["float8_e4m3fn", "float32"] == found["float8_e8m0fnu", "float8_e8m0fnu"] == VALUES
assert found["float8_e8m0fnu", "float32"] == [2.0**64, -(2.0**65), -(2.0**66), 2.0**63]
assert found["float32", "float8_e8m0fnu"] == [2.0**-64, 2.0**-63, 2.0**-62, 2.0**-65]
PYTHON
JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/restore.py" "$folder"
