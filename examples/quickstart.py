"""A Flax model on real text, unquantized and in FP8, in a minute: python examples/quickstart.py"""

import pathlib
import sysconfig

import flax.linen as nn
import jax
import numpy as np
import optax

import fp8jax

STEPS, BATCH, LENGTH, WIDTH = 400, 64, 16, 512
folder = pathlib.Path(sysconfig.get_path("stdlib"))  # the source of Python's own modules
text = np.frombuffer(b"".join(map(pathlib.Path.read_bytes, sorted(folder.glob("*.py")))), np.uint8)
training, held_out = np.split(text, [int(0.9 * len(text))])


class Model(nn.Module):  # reads 16 bytes, and tells the next
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, 64)(tokens).reshape(len(tokens), -1)
        x = nn.relu(nn.Dense(WIDTH, name="in")(x))
        for layer in range(3):
            x = x + nn.relu(nn.Dense(WIDTH, name=f"layer_{layer}")(nn.LayerNorm()(x)))
        return nn.Dense(256, name="head")(x)


def batch(text, step, size):
    starts = np.random.default_rng(step).integers(len(text) - LENGTH, size=size)
    windows = text[starts[:, None] + np.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, -1].astype(int)


def train(model, tx):
    def loss(variables, tokens, targets):
        logits = model.apply(variables, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def step(variables, state, tokens, targets):
        gradients = jax.grad(loss)(variables, tokens, targets)
        updates, state = tx.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state

    variables = jax.jit(model.init)(jax.random.key(0), batch(training, 0, BATCH)[0])
    state, evaluate, test = tx.init(variables), jax.jit(loss), batch(held_out, 0, 8192)
    before = evaluate(variables, *test)
    for index in range(STEPS):
        variables, state = step(variables, state, *batch(training, index, BATCH))
    print(f"{type(model).__name__:<28}{before:10.4f} {evaluate(variables, *test):12.4f}")
    return variables, state


fp8_model = fp8jax.linen.Fp8(Model(), fp8jax.recipes.delayed(), [fp8jax.Rule("head", None)])
print(f"held-out loss, nats per byte{'before':>10} {f'{STEPS} steps':>12}")
train(Model(), optax.adamw(1e-3))
variables, state = train(fp8_model, fp8jax.with_delayed_scaling(optax.adamw(1e-3)))
print(fp8_model.explain(variables, batch(training, 0, BATCH)[0]))
print(f"saturated: {fp8jax.metrics.summary(state, variables)['fp8/saturated_share']:.2%} of amaxes")
