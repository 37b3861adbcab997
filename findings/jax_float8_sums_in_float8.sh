#!/usr/bin/env bash
# Sums, means and products of float8 arrays are rounded to float8 in JAX, and become NaN at 449.
#
# `jnp.sum` and `jnp.mean` of float16 and bfloat16 add up in float32, and their results are as good as
# their dtype allows. One would guess the same of float8, or that a product of float8 arrays is of a
# wider dtype, as hardware makes it.
#
# In JAX 0.12.0.1 the mean of 4096 ones in float8_e4m3fn is NaN, and so is a product of vectors of 1024
# ones: the result's dtype is float8, and E4M3 has no infinity to overflow to. Pass `dtype=` or
# `preferred_element_type=`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

ones, row = jnp.ones(4096, jnp.float8_e4m3fn), jnp.ones((1, 1024), jnp.float8_e4m3fn)
product = row @ row.T
wide = jax.lax.dot(row, row.T, preferred_element_type=jnp.float32)
print(f"jax {jax.__version__}: mean of 4096 ones {jnp.mean(ones)}, in bfloat16 {jnp.mean(ones.astype(jnp.bfloat16))}")
print(f"product of 1024 ones {product}, {product.dtype}; with float32 asked for {wide}")
assert jnp.isnan(jnp.mean(ones)) and jnp.mean(ones.astype(jnp.bfloat16)) == 1
assert product.dtype == jnp.float8_e4m3fn and jnp.isnan(product).all() and wide == 1024
assert jnp.mean(ones, dtype=jnp.float32) == 1
PYTHON
