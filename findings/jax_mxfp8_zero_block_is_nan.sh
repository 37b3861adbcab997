#!/usr/bin/env bash
# A block of zeros in jax.nn.scaled_dot_general makes its row of the product NaN.
#
# The "mxfp8" configuration gives each 32 elements along the contraction a scale of their own. One would
# guess that 32 zeros (padding, a masked token, a pruned weight, an expert that got nothing) are the
# easiest block of all: any scale does.
#
# JAX 0.12.0.1 takes the block's amax, 0, divided by 448 as the scale; E8M0 has no zero and makes that NaN,
# and the NaN multiplies the block. One such block among the two of a row: its whole row of the product is
# NaN. The gradients are as well, when a block of the cotangent is zero.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

configs = [jax.nn.get_scaled_dot_general_config("mxfp8") for _ in range(3)]
numbers = (((2,), (2,)), ((0,), (0,)))
x, y = jax.random.normal(jax.random.key(0), (2, 1, 64, 64))


def product(x, y):
    return jax.nn.scaled_dot_general(x, y, numbers, preferred_element_type=jnp.float32, configs=configs)


exact = jax.lax.dot_general(x, y, numbers)
error = jnp.linalg.norm(product(x, y) - exact) / jnp.linalg.norm(exact)
padded = product(x.at[0, 7, :32].set(0), y)
rows = jnp.isnan(padded).any(axis=-1)[0].nonzero()[0].tolist()
mask = jnp.ones((64, 1)).at[32:].set(0)
for_y = jax.grad(lambda y: (product(x, y) * mask * exact).sum())(y)
print(f"jax {jax.__version__}: relative error without zeros {error:.3f}")
print(f"with one block of zeros in row 7, rows that are NaN: {rows}")
print(f"with a loss that masks half of the rows, NaN in the gradient: {jnp.isnan(for_y).mean():.0%}")
assert error < 0.1 and rows == [7] and jnp.isnan(padded[0, 7]).all()
assert jnp.isnan(for_y).all()
PYTHON
