#!/usr/bin/env bash
# jnp.exp2 of a whole number isn't a power of two, and jnp.log2 of a power of two isn't whole.
#
# The scale of an MX block is 2^(floor(log2(amax)) - emax), and any power-of-two scale is written with these
# two. One would guess that both are exact where the result is a number of the dtype, as in NumPy.
#
# In JAX 0.12.0.1 on a CPU exp2(13) is 8192.004 in float32, and exp2(-4) is 0.06299 in bfloat16, where 0.0625
# is meant: multiplying by such a scale isn't free of error. log2(8192) is 12.999999, so its floor is 12 and a
# block with that amax gets half the scale of the rule: 8192 is stored as 7168, E4M3's largest times 16. Take
# the exponent's bits, or frexp and ldexp of float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

exponents = np.arange(-100, 101)
print("jax", jax.__version__, "numpy", np.__version__)
for dtype in (jnp.float32, jnp.bfloat16):
    powers = np.ldexp(1.0, exponents).astype(dtype)
    by_exp2 = np.asarray(jnp.exp2(jnp.asarray(exponents, dtype)))
    inexact = exponents[by_exp2 != powers]
    floors = np.asarray(jnp.floor(jnp.log2(jnp.asarray(powers)))).astype(int)
    low = exponents[floors < exponents]
    print(f"{jnp.dtype(dtype).name}: exp2 is inexact for {len(inexact)} of 201 exponents, the smallest "
          f"{min(inexact, key=abs)}; the floor of log2 is one too small for {low}")
    assert len(inexact) > 100
    if dtype == jnp.float32:
        assert 13 in inexact and 13 in low
        assert (np.exp2(exponents.astype(dtype)) == powers).all() and (np.log2(powers) == exponents).all()
    else:
        assert -4 in inexact
print("exp2(13) in float32:", jnp.exp2(jnp.float32(13)), "exp2(-4) in bfloat16:", jnp.exp2(jnp.bfloat16(-4)))

amax = jnp.float32(8192)
scales = {
    "log2": 2.0 ** (int(jnp.floor(jnp.log2(amax))) - 8),  # 8: E4M3's largest exponent
    "frexp": 2.0 ** (int(jnp.frexp(amax)[1]) - 1 - 8),
}
for name, scale in scales.items():
    stored = float(jnp.clip(amax / scale, -448, 448).astype(jnp.float8_e4m3fn)) * scale
    print(f"a block's amax of 8192 with the scale by {name}, {scale}, is stored as {stored}")
    assert stored == {"log2": 7168, "frexp": 8192}[name]
PYTHON
