#!/usr/bin/env bash
# A Qwix rule for all modules, and a product that is written `x @ w`.
#
# `QtRule(module_path=".*", weight_qtype=float8_e4m3fn, act_qtype=float8_e4m3fn)` reads like "every
# product of every module in FP8". One would guess that it doesn't matter whether a module of the
# user's own multiplies by nn.Dense, jnp.einsum, jnp.dot or `@`: to JAX they are the same operation.
#
# With Qwix 0.1.8 (JAX 0.12.0.1, Flax 0.12.12) nn.Dense and jnp.einsum are quantized; `@` and jnp.dot
# are not, bit for bit, and no error or warning tells it. Qwix replaces a list of functions; the
# operator is not among them.
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

FORMS = {
    "jnp.einsum": lambda x, w: jnp.einsum("bi,io->bo", x, w),
    "jnp.dot": jnp.dot,
    "x @ w": lambda x, w: x @ w,
}


class Layer(nn.Module):
    form: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 48))
        return FORMS[self.form](x, kernel)


rule = qwix.QtRule(
    module_path=".*", weight_qtype=jnp.float8_e4m3fn, act_qtype=jnp.float8_e4m3fn
)
x = jax.random.normal(jax.random.key(0), (32, 64))
errors = {}
for form in ("nn.Dense", *FORMS):
    model = nn.Dense(48) if form == "nn.Dense" else Layer(form)
    variables = model.init(jax.random.key(1), x)
    plain = model.apply(variables, x)
    quantized = qwix.quantize_model(model, qwix.QtProvider([rule])).apply(variables, x)
    errors[form] = float(jnp.linalg.norm(quantized - plain) / jnp.linalg.norm(plain))
print("qwix", importlib.metadata.version("qwix"), "jax", jax.__version__)
print("relative change of the output by form of the product:", errors)
assert errors["nn.Dense"] > 0.01 and errors["jnp.einsum"] > 0.01
assert errors["jnp.dot"] == errors["x @ w"] == 0, "they are quantized now"
PYTHON
