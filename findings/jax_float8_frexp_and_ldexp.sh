#!/usr/bin/env bash
# jnp.frexp and jnp.ldexp of float8: 448 is split into 448 and 0, and twice 448 is 448.
#
# frexp is what one reaches for to make a scale a power of two, or to look at exponents. One would guess
# that it gives a mantissa from 0.5 up to 1 and an exponent, as jnp.frexp does for bfloat16 and as NumPy's
# does for the same float8 array.
#
# In JAX 0.12.0.1 no mantissa of float8_e4m3fn is in that range: 448 becomes (448, 0), 3 becomes (1.5, 1),
# and the subnormals become (0, 0): their value is lost. jnp.ldexp gives 448 for
# 448 * 2 and 256 for 1 * 2**9, where E4M3 overflows to NaN, and 0 for 1 * 2**-9, which E4M3 holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
values = values[np.isfinite(values) & (values != 0)]


def split(frexp, x):
    mantissa, exponent = (np.asarray(part).astype(np.float64) for part in frexp(x))
    normal = (0.5 <= abs(mantissa)) & (abs(mantissa) < 1)
    return int(normal.sum()), int((mantissa * 2.0**exponent == x.astype(np.float64)).sum())


print("jax", jax.__version__, "numpy", np.__version__)
counts = {name: split(f, values) for name, f in (("jnp.frexp", jnp.frexp), ("np.frexp", np.frexp))}
for name, (normal, kept) in counts.items():
    print(f"{name}: of {len(values)} values {normal} mantissas in [0.5, 1), {kept} whose parts make the value")
assert split(jnp.frexp, values.astype(ml_dtypes.bfloat16)) == counts["np.frexp"] == (252, 252)
assert counts["jnp.frexp"] == (0, 238)

x = jnp.array([448, 1, 1], jnp.float8_e4m3fn)
moved = jnp.ldexp(x, jnp.array([1, 9, -9])).astype(jnp.float32).tolist()
print(f"jnp.ldexp: 448 * 2 = {moved[0]}, 1 * 2**9 = {moved[1]}, 1 * 2**-9 = {moved[2]}")
assert moved == [448, 256, 0] and jnp.float8_e4m3fn(2**-9) == 2**-9
PYTHON
