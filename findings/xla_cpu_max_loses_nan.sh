#!/usr/bin/env bash
# The maximum of a long array of floats loses a NaN on a CPU; that of a short one keeps it.
#
# An amax that is NaN is how an FP8 recipe notices that an operand is not finite. One would guess that
# `jnp.max` gives NaN wherever there is one, as NumPy does and as JAX does for short arrays.
#
# JAX 0.12.0.1 on a CPU gives NaN for three elements, and a finite number for 4096 with a NaN among
# them. So "the amax is finite" does not show that the operand is. A max of the bits, as integers, does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

lost = []
for place in range(0, 4096, 17):
    x = np.ones(4096, np.float32)
    x[place] = np.nan
    assert np.isnan(x.max())
    if not jnp.isnan(jnp.max(jnp.asarray(x))):
        lost.append(place)
print(f"jax {jax.__version__}: of 241 places of a NaN among 4096 ones, jnp.max loses {len(lost)}: {lost[:6]} ...")
assert jnp.isnan(jnp.max(jnp.float32([1, np.nan, 2])))
assert lost, "none is lost any more"
PYTHON
