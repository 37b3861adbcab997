"""The memory and the kernels that a training step takes on an H200, beside a bfloat16 step,
compiled on a machine that has none.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from compile_only import compile_for, h200_mesh, place, temporary_bytes
from test_compile_only import Block

import fp8jax
from fp8jax import hlo, recipes

LAYERS, WIDTH, TOKENS = 12, 4096, (4, 2048)
POLICIES = {
    "rematerialized": None,
    "rematerialized but codes": fp8jax.checkpoint_policies.save_codes(),
}


class Transformer(nn.Module):
    layers: str

    @nn.compact
    def __call__(self, x):
        if self.layers == "unrolled":
            for i in range(LAYERS // 3):
                x, _ = Block(WIDTH, 128, name=f"layer{i}")(x, None)
            return x
        block = nn.remat(Block, policy=POLICIES[self.layers]) if self.layers in POLICIES else Block
        return nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )(WIDTH, 128, name="layers")(x, None)[0]


X = jax.ShapeDtypeStruct((*TOKENS, WIDTH), jnp.bfloat16)


def model_of(layers, recipe):
    model = Transformer(layers)
    return model if recipe is None else fp8jax.linen.Fp8(model, recipe)


@functools.cache
@jax.numpy_dtype_promotion("standard")  # Flax's LayerNorm needs it for bfloat16
def compile_step(layers: str, recipe: fp8jax.Recipe | None) -> jax.stages.Compiled:
    model = model_of(layers, recipe)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    optimizer = optax.sgd(1e-3) if recipe is None else fp8jax.with_delayed_scaling(optax.sgd(1e-3))
    state = jax.eval_shape(optimizer.init, variables)

    def step(variables, state, x):
        grads = jax.grad(
            lambda variables: jnp.square(model.apply(variables, x)).mean(dtype=jnp.float32)
        )(variables)
        updates, state = optimizer.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state

    return compile_for(
        h200_mesh(), step, *place(h200_mesh(), (variables, state, X)), donate_argnums=(0, 1)
    )


@pytest.mark.parametrize(
    ("layers", "beside", "bound"),
    [
        ("scanned", "scanned", 0.95),
        ("rematerialized", "rematerialized", 1.10),
        ("rematerialized but codes", "scanned", 0.40),
        ("unrolled", "unrolled", 0.95),
    ],
)
def test_temporaries_beside_those_of_bfloat16(layers, beside, bound):
    ratio = temporary_bytes(compile_step(layers, recipes.delayed())) / temporary_bytes(
        compile_step(beside, None)
    )
    print(f"{layers}: {ratio:.3f}")
    assert 0.1 < ratio <= bound


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(
    ("layers", "kernels"), [("scanned", 6), ("rematerialized", 15), ("unrolled", 6)]
)
def test_kernels_and_bytes_that_casts_add(layers, kernels):
    """For the three products of a site; a naive rewrite takes 12, and would read each operand more
    than once.
    """
    model = model_of(layers, recipes.delayed())
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    added = hlo.added(
        compile_step(layers, recipes.delayed()),
        compile_step(layers, None),
        model.explain(variables, X).sites,
    )
    print(f"{layers}: {added}: {added.bytes / added.minimum:.2f} of the minimum")
    assert 2 < added.launches_per_site <= kernels and added.bytes <= 1.5 * added.minimum


def test_kernels_of_unrolled_layers_are_the_same_ones():
    """XLA compiles each kernel once, however often it is launched."""

    def kernels(layers):
        def loss(weights, x):
            for up, down in weights:
                x = x + jnp.tanh(x @ up) @ down
            return jnp.square(x).mean(dtype=jnp.float32)

        fp8_loss = fp8jax.fp8(loss, recipes.delayed())
        up, down = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 2048), (2048, 512)))
        arguments = [(up, down)] * layers, jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
        scales = jax.eval_shape(fp8_loss.init, *arguments)
        step = jax.grad(fp8_loss, argnums=(0, 1))
        text = compile_for(h200_mesh(), step, *place(h200_mesh(), (scales, *arguments))).as_text()
        # A kernel of one instruction has no name for what it is the same as.
        lines = text[text.index("\nENTRY") :].splitlines()
        launched = [line for line in lines if " fusion(" in line and "%wrapped_" not in line]
        assert (
            sum("%wrapped_slice" in line for line in lines) < layers
        )  # The rows of scales are cut at once.
        named = (re.search(r'deduplicated_name="[^"]*"', line) for line in launched)
        return len(launched), len({name[0] if name else n for n, name in enumerate(named)})

    few, many = kernels(3), kernels(9)
    print(few, many)
    assert many[0] > 2 * few[0] and many[1] <= 1.5 * few[1]


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [(recipes.delayed(), 470), (recipes.current(), 535)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_instructions_that_a_site_adds_for_a_cpu(recipe, bound):
    """A compiler's time grows with them, and a model of unrolled layers has them for each site."""

    def loss(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return jnp.square(x).mean()

    def instructions(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().as_text().count(" = ")

    weights, x = [jnp.ones((64, 64))] * 4, jnp.ones((32, 64))
    fp8_loss = fp8jax.fp8(loss, recipe)
    plain = instructions(jax.value_and_grad(loss), weights, x)
    quantized = instructions(
        jax.value_and_grad(fp8_loss, argnums=(0, 1)), fp8_loss.init(weights, x), weights, x
    )
    print(f"{recipe.name}: {(quantized - plain) / len(weights):.0f}")
    # Before 0.11, XLA repeats more of the scales' arithmetic in each fusion that reads them.
    bound = bound if jax.__version_info__ >= (0, 11) else 1.1 * bound
    assert 100 < (quantized - plain) / len(weights) <= bound
