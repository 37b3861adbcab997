#!/usr/bin/env bash
# The gradient through a cast to float8 is itself rounded to float8.
#
# `x.astype(jnp.float8_e4m3fn).astype(jnp.float32)` looks like a quantizer with a straight-through
# gradient: one would guess that a cotangent passes it as it is, since casts are linear.
#
# JAX 0.12.0.1 gives a cotangent the dtype of the value, here float8_e4m3fn: 660 becomes NaN, beyond its
# largest value of 448; 0.0001, as gradients of a mean are, becomes 0. Training then stands still with no
# error. A quantizer needs a derivative rule of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def scaled_sum(x, factor):
    return (x.astype(jnp.float8_e4m3fn).astype(jnp.float32) * factor).sum()


found = {factor: float(jax.grad(scaled_sum)(jnp.float32(1), factor)) for factor in (1.0, 660.0, 1e-4)}
print(f"jax {jax.__version__}: gradients through a cast, by what they should be: {found}")
assert found[1.0] == 1 and found[660.0] != found[660.0] and found[1e-4] == 0
PYTHON
