#!/usr/bin/env bash
# -2 cast to float8_e8m0fnu is 2 in PyTorch, NaN in JAX and ml_dtypes; 0 is 2^-127 or NaN.
#
# E8M0 has neither a sign nor a zero. One would guess that a number it can't hold becomes its NaN everywhere,
# or at least that the two frameworks whose MX checkpoints are exchanged give the same bytes.
#
# PyTorch 2.13.0 drops the sign, and makes of a zero the smallest number, 2^-127; ml_dtypes 0.6.0 and JAX make
# NaN of both. So the scale of a block of zeros is harmless when it was cast in one, and makes the block NaN
# when it was cast in the other; and a scale with a wrong sign goes unnoticed in the first. All other float32
# numbers that were tried have the same bytes, ties and overflow included.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch


def in_torch(x):
    return torch.from_numpy(x).to(torch.float8_e8m0fnu).view(torch.uint8).numpy()


def in_jax(x):
    return np.asarray(jax.jit(lambda x: x.astype(jnp.float8_e8m0fnu))(x)).view(np.uint8)


def in_ml_dtypes(x):
    return x.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)


print("torch", torch.__version__, "jax", jax.__version__, "ml_dtypes", version("ml_dtypes"))
odd = np.float32([0, -0.0, -2, -0.75])
for cast in (in_torch, in_jax, in_ml_dtypes):
    print(f"{cast.__name__}: {odd} have the bytes {cast(odd)}")
assert in_torch(odd).tolist() == [0, 0, 128, 127]
assert (in_jax(odd) == 255).all() and (in_ml_dtypes(odd) == 255).all()

bits = np.random.default_rng(0).integers(2**23, 0x7F800000, 100_000).astype(np.uint32)
powers = (np.arange(1, 255) << 23).astype(np.uint32)
special = np.float32([np.inf, np.nan]).view(np.uint32)
others = np.concatenate([bits, powers, powers + 2**22, powers + 2**22 - 1, special]).view(np.float32)
alike = (in_torch(others) == in_ml_dtypes(others)).mean()
print(f"of {len(others)} positive normal numbers, infinity and NaN {alike:.0%} have the same byte")
assert alike == 1 and np.array_equal(in_jax(others), in_ml_dtypes(others))
PYTHON
