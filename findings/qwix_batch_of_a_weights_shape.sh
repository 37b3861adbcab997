#!/usr/bin/env bash
# A batch of as many rows as a layer has inputs, where activations have the shape of a weight.
#
# One would guess that what a training step does with a batch of 32 it does with a batch of 64: which
# operand of a product is the parameter doesn't depend on the batch.
#
# Qwix 0.1.8 (JAX 0.12.0.1, Flax 0.12.12) tells a weight by its shape, among other things. Two layers
# of 64 run at batch 32; at batch 64 the activations are taken for a weight too, and the product is
# refused: "lhs and rhs cannot be both weights". Square layers at such a batch are what benchmarks of
# products measure.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "qwix==0.1.8" "flax==0.12.12" "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import importlib.metadata

import jax
import jax.numpy as jnp
import qwix
from flax import linen as nn

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64)])
rule = qwix.QtRule(
    module_path=".*", weight_qtype=jnp.float8_e4m3fn, act_qtype=jnp.float8_e4m3fn
)
quantized = qwix.quantize_model(model, qwix.QtProvider([rule]))
results = {}
for batch in (32, 63, 64, 65):
    x = jax.random.normal(jax.random.key(0), (batch, 64))
    variables = model.init(jax.random.key(1), x)
    try:
        results[batch] = str(quantized.apply(variables, x).shape)
    except AssertionError as error:
        results[batch] = f"AssertionError: {error}"
print("qwix", importlib.metadata.version("qwix"), "jax", jax.__version__)
for batch, result in results.items():
    print(f"batch {batch}: {result}")
assert all(results[batch] == f"({batch}, 64)" for batch in (32, 63, 65))
assert "both weights" in results[64], "it runs now"
PYTHON
