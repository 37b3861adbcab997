#!/usr/bin/env bash
# Random draws in float8: jax.random.normal never goes above 1.25, and truncated_normal is NaN.
#
# float8_e4m3fn has 252 finite values but zero. One would guess that `jax.random.normal(key, shape,
# jnp.float8_e4m3fn)` is a normal variable rounded to these: symmetric, and 2 % of it beyond 2.3.
#
# In JAX 0.12.0.1 it has eight values, from -1.875 to 1.25, with the mean -0.14; one for each of the eight
# mantissas that the uniform draw under it can have. truncated_normal, and so the initializer lecun_normal,
# is NaN throughout. categorical from equal float8 logits prefers the first class to the fourth, 31 % to
# 19 %. Draw in float32 and cast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

FLOAT8, N = jnp.float8_e4m3fn, 100_000
key = jax.random.key(0)
direct = np.asarray(jax.random.normal(key, (N,), FLOAT8)).astype(np.float32)
cast = np.asarray(jax.random.normal(key, (N,)).astype(FLOAT8)).astype(np.float32)
truncated = jax.random.truncated_normal(key, -2, 2, (N,), FLOAT8)
kernel = jax.nn.initializers.lecun_normal()(key, (64, 64), FLOAT8)
classes = jax.random.categorical(key, jnp.zeros(4, FLOAT8), shape=(N,))
shares = np.bincount(np.asarray(classes)) / N
print(f"jax {jax.__version__}: normal in float8 has the values {np.unique(direct)}, mean {direct.mean():.3f}")
print(f"cast from float32: {len(np.unique(cast))} values up to {cast.max()}, mean {cast.mean():.3f}")
print(f"NaN in truncated_normal {jnp.isnan(truncated).mean():.0%}, in lecun_normal {jnp.isnan(kernel).mean():.0%}")
print(f"shares of four equal float8 logits: {shares}")
assert len(np.unique(direct)) == 8 and direct.max() == 1.25 and direct.mean() < -0.1
assert len(np.unique(cast)) > 100 and abs(cast.mean()) < 0.02
assert jnp.isnan(truncated).all() and jnp.isnan(kernel).all()
assert shares[0] > 0.29 and shares[3] < 0.21
PYTHON
