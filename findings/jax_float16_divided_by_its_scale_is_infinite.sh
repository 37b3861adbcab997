#!/usr/bin/env bash
# A float16 array divided by its own FP8 scale is infinite throughout.
#
# The scale of a tensor is its amax / 448, and `x / scale` lies between -448 and 448 by construction. One
# would guess that it does in float16, and that broadcasting the divisor doesn't change a quotient.
#
# In JAX 0.12.0.1 on a CPU the quotient is infinite wherever the amax is below 0.0068, as gradients' is: x /
# scale with one scale for many elements is compiled as x * (1 / scale), and 1 / scale is beyond 65504. The
# same division with a scale per element is right, as is NumPy's. A clip before the cast makes all elements
# +-448 of it: signs alone are left. float8_e5m2 has the same at its smallest numbers. Hold scales, and divide,
# in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

x = jnp.array([0.004, -0.002, 0.001, 0.0001], jnp.float16)


def scaled(x, spread=False):
    scale = jnp.max(jnp.abs(x)) / 448
    if spread:
        scale = jax.lax.optimization_barrier(jnp.broadcast_to(scale, x.shape))
    return x / scale


print("jax", jax.__version__, "x", x, "scale", jnp.max(jnp.abs(x)) / 448)
one_scale, spread = jax.jit(scaled)(x), jax.jit(scaled, static_argnums=1)(x, True)
host = np.asarray(x)
by_numpy = host / (abs(host).max() / np.float16(448))
codes = jnp.clip(one_scale, -448, 448).astype(jnp.float8_e4m3fn)
print("x / scale:", one_scale, "; with a scale per element:", spread, "; NumPy:", by_numpy)
print("clipped and cast:", codes)
assert jnp.isinf(one_scale).all() and jnp.isfinite(spread).all() and np.isfinite(by_numpy).all()
assert np.array_equal(spread, by_numpy) and abs(by_numpy[0] - 448) < 2
assert abs(codes.astype(jnp.float32)).tolist() == [448] * 4
larger = jnp.array([0.01, 0.001], jnp.float16)
assert jnp.isfinite(jax.jit(scaled)(larger)).all()

tiny = jnp.array([1, 2, 3], jnp.float8_e5m2) * jnp.float8_e5m2(2**-16)
quotient = jax.jit(lambda a, b: a / b)(tiny, tiny[0])
print("float8_e5m2:", tiny, "/", tiny[0], "=", quotient)
assert jnp.isinf(quotient).all()
PYTHON
