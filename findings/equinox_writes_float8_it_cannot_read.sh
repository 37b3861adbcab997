#!/usr/bin/env bash
# eqx.tree_serialise_leaves writes a model with float8 weights, and tree_deserialise_leaves refuses it.
#
# The two are Equinox's way to save a model; bfloat16 goes there and back. One would guess that a dtype that
# can't be read isn't written.
#
# With equinox 0.13.8 (JAX 0.12.0.1) the file of a float8 leaf is written without a word. Reading it back, with
# the same model at hand, says for E4M3, E8M0 and the "fnuz" formats that the leaf "has changed type": jnp.load
# knows bfloat16 alone, and gives raw bytes. For E5M2 NumPy has written the dtype "<f1", which it refuses to
# read. The bytes are in the file: view weights as uint8 before, and back after.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "equinox==0.13.8" "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" \
    "numpy==2.5.5"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import io

import equinox as eqx
import jax
import jax.numpy as jnp


def there_and_back(dtype):
    model = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    model = jax.tree.map(lambda x: x.astype(dtype), model)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    try:
        back = eqx.tree_deserialise_leaves(file, model)
    except Exception as error:
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
        return f"written, and not read: {error}"
    return "there and back" if eqx.tree_equal(model, back) else "changed"


print("equinox", eqx.__version__, "jax", jax.__version__)
found = {}
for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e8m0fnu", "float8_e5m2"):
    found[name] = there_and_back(name)
    print(f"{name}: {found[name]}")
assert found["float16"] == found["bfloat16"] == "there and back"
for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e8m0fnu"):
    assert "written, and not read" in found[name] and "changed type" in found[name]
assert "written, and not read" in found["float8_e5m2"] and "<f1" in found["float8_e5m2"]

weight = jnp.array([1, 2, 448], jnp.float8_e4m3fn)
file = io.BytesIO()
jnp.save(file, weight)
file.seek(0)
raw = jnp.load(file)
print("jnp.load after jnp.save:", type(raw).__name__, raw.dtype, raw)
assert raw.dtype.kind == "V" and raw.tobytes() == weight.tobytes()
PYTHON
