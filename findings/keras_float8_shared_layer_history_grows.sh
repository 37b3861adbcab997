#!/usr/bin/env bash
# A layer that a Keras model calls twice: under quantize("float8") its amax history doubles at each step.
#
# Tied embeddings, siamese towers and recurrent blocks share layers. One would guess that the amax of such a
# layer is the larger of the two calls', and that its scale stays where the data is.
#
# With Keras 3.15.1 on JAX 0.12.0.1 scales and histories leave the step as gradients, which JAX adds up. An
# entry of the history of amaxes is twice what it was after each step: after 40 steps the largest "amax" of
# inputs that never exceed 4 is above 10^12, and the scale follows. All inputs then round to zero, the
# outputs are the bias, and the layer's gradient is zero; nothing warns. Two layers that aren't shared are
# right throughout.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "keras==3.15.1" "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" \
    "numpy==2.5.5"
KERAS_HOME="$folder" KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/env/bin/python" -W ignore - <<'PYTHON'
import jax
import keras
import numpy as np

rng = np.random.default_rng(0)
x, y = rng.normal(size=(2, 64, 32)).astype(np.float32)


def train(shared, steps=40):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32,))
    first = keras.layers.Dense(32)
    second = first if shared else keras.layers.Dense(32)
    model = keras.Model(inputs, second(keras.ops.tanh(first(inputs))))
    model.quantize("float8")
    model.compile(keras.optimizers.SGD(0.01), loss="mse")
    for _ in range(steps):
        model.train_on_batch(x, y)
    outputs = model.predict_on_batch(x)
    values = {v.path.rsplit("/", 1)[1]: np.asarray(v) for v in first.variables}
    return values["inputs_amax_history"].max(), values["inputs_scale"], np.ptp(outputs, axis=0).max()


print("keras", keras.__version__, "jax", jax.__version__, "largest input", abs(x).max())
found = {shared: train(shared) for shared in (False, True)}
for shared, (amax, scale, spread) in found.items():
    print(f"shared: {shared}. After 40 steps: amax {amax:.3g}, scale {scale:.3g}, spread of outputs {spread:.3g}")
amax, scale, spread = found[False]
assert amax == abs(x).max() and abs(scale * 448 / amax - 1) < 1e-6 and spread > 0.1
amax, scale, spread = found[True]
assert amax > 1e11 and scale > 1e8 and spread == 0
PYTHON
