#!/usr/bin/env bash
# The maximum of float8_e8m0fnu scales is NaN in JAX, and argmax is 0.
#
# E8M0 holds powers of two, all comparable; jnp.sort puts them in order, jnp.maximum finds the larger of two,
# jax.lax.top_k the largest. One would guess that jnp.max of [2, 1, 4, 0.5] is 4, as NumPy says, and
# jnp.argmax 2.
#
# In JAX 0.12.0.1 (on a CPU) jnp.max and jnp.min are NaN, jnp.argmax and jnp.argmin are 0, and a running
# maximum is NaN everywhere. A reduction starts from minus infinity, which E8M0 has not: it is NaN, and so
# is all that follows. Take the bits, as uint8: they have the same order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

scales = jnp.array([2, 1, 4, 0.5], jnp.float8_e8m0fnu)
print(f"jax {jax.__version__}: sorted {jnp.sort(scales)}, top_k {jax.lax.top_k(scales, 1)[0]}")
print(f"max {jnp.max(scales)}, min {jnp.min(scales)}, argmax {jnp.argmax(scales)}, argmin {jnp.argmin(scales)}")
print(f"running maximum {jax.lax.cummax(scales)}; NumPy: max {np.asarray(scales).max()}")
assert jnp.sort(scales).astype(jnp.float32).tolist() == [0.5, 1, 2, 4]
assert jax.lax.top_k(scales, 1)[0] == jnp.maximum(scales[0], scales[2]) == np.asarray(scales).max() == 4
assert jnp.isnan(jnp.max(scales)) and jnp.isnan(jnp.min(scales))
assert jnp.isnan(jax.lax.cummax(scales)).all()
assert jnp.argmax(scales) == jnp.argmin(scales) == 0
assert jax.lax.bitcast_convert_type(jnp.max(scales.view(jnp.uint8)), scales.dtype) == 4
PYTHON
