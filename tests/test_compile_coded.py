"""Weights held as codes, in programs compiled for GPUs: no wide copy of them is in any."""

import re

import compile_only
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fp8jax
from fp8jax import PerChannel, WeightRule, fp8, quantize_params, recipes

RECIPES = {name: getattr(recipes, name)() for name in ("weight_only", "rowwise", "delayed")}
LAYERS, WIDTH, HIDDEN, RANK = 4, 512, 2048, 8


class Large(nn.Module):
    """A table that is tied, and layers."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(2048, 256, dtype=jnp.bfloat16, name="embed")
        x = embed(ids)
        x = x + nn.Dense(256, dtype=jnp.bfloat16, use_bias=False, name="mlp")(x)
        return embed.attend(x)


@pytest.mark.parametrize("recipe", list(RECIPES.values())[:2], ids=lambda r: r.name)
def test_no_wide_table_is_in_the_program_for_an_h200(recipe):
    mesh = compile_only.h200_mesh()
    ids = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    params = jax.eval_shape(Large().init, jax.random.key(0), ids)["params"]
    rules = [WeightRule(".*embedding", PerChannel(0)), WeightRule(".*kernel", PerChannel(-1))]
    coded = quantize_params(params, rules)
    served = fp8jax.linen.Fp8(Large(), recipe)
    place = lambda tree: compile_only.place(mesh, tree)
    text = compile_only.compile_for(
        mesh, served.apply, {"params": place(coded)}, place(ids)
    ).as_text()
    wide = re.compile(r"(?:f32|bf16|f16)\[(?:2048,256|256,2048)\]")
    assert not wide.search(text)
    # As the dense one has: this sees what it is to see.
    dense = jax.jit(Large().apply).trace({"params": params}, ids)
    assert "tensor<2048x256xbf16>" in dense.lower(lowering_platforms=("cuda",)).as_text()


def layer(x, slices):
    (up, down), (a, b) = slices
    hidden = jax.nn.relu(x @ up.astype(x.dtype))
    return x + hidden @ down.astype(x.dtype) + x @ a.astype(x.dtype) @ b.astype(x.dtype), None


@pytest.mark.parametrize("is_remat", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_step_of_adapters_keeps_no_wide_base(recipe, is_remat):
    mesh = compile_only.h200_mesh()
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    base = (shape(LAYERS, WIDTH, HIDDEN), shape(LAYERS, HIDDEN, WIDTH))
    adapters = (shape(LAYERS, WIDTH, RANK), shape(LAYERS, RANK, WIDTH))
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.bfloat16)
    coded = quantize_params(base, [WeightRule(".*", PerChannel(-1), stacked=1)])

    def loss(base, adapters, x):
        body = jax.checkpoint(layer) if is_remat else layer
        return jnp.square(jax.lax.scan(body, x, (base, adapters))[0].astype(jnp.float32)).mean()

    step = fp8(loss, recipe, weights=(0, 1))
    scales = jax.eval_shape(step.init, coded, adapters, x)
    place = lambda tree: compile_only.place(mesh, tree)
    run = jax.value_and_grad(step, argnums=(0, 2))
    arguments = [place(tree) for tree in (scales, coded, adapters, x)]
    wide = re.compile(rf"(?:f32|bf16|f16)\[(?:{LAYERS},)?(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]")
    assert not wide.search(compile_only.compile_for(mesh, run, *arguments).as_text())
    dense = jax.jit(jax.value_and_grad(loss, argnums=1)).trace(base, adapters, x)
    text = dense.lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<{WIDTH}x{HIDDEN}xbf16>" in text
