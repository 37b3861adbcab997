"""Weights held as codes, in programs compiled for GPUs: no wide copy of them is in any."""

import re

import compile_only
import jax
import jax.numpy as jnp
import pytest
from coded_models import MODELS, RULES, Sizes
from tiers import thorough_but

import fp8jax
from fp8jax import PerChannel, WeightRule, fp8, quantize_params, recipes

RECIPES = {
    name: getattr(recipes, name)() for name in ("weight_only", "rowwise", "delayed", "current")
}
LAYERS, WIDTH, HIDDEN, RANK = 8, 1024, 4096, 8


@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["weight_only", "rowwise"]))
@pytest.mark.parametrize("name", MODELS)
def test_no_wide_table_is_in_the_program_for_an_h200(name, recipe):
    compile_only.h200_mesh()  # Else it is skipped.
    ids = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    module = MODELS[name](Sizes(vocabulary=2048, width=256, hidden=512))
    params = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    served, coded = fp8jax.linen.Fp8(module, recipe), quantize_params(params, RULES)
    init = lambda params, ids: served.apply({"params": params}, ids, mutable="fp8")[1]
    variables = {"params": coded, **jax.eval_shape(init, coded, ids)}
    wide = re.compile(r"(?:f32|bf16|f16)\[(?:2048,256|256,2048)\]")
    assert not wide.search(compiled(served.apply, variables, ids).as_text())
    # As the dense one has: this sees what it is to see. Not compiled: programs for devices that
    # are not here can't be had from the cache.
    dense = jax.jit(module.apply).trace({"params": params}, ids)
    assert "tensor<2048x256xf32>" in dense.lower(lowering_platforms=("cuda",)).as_text()


def layer(x, slices):
    (up, down), (a, b) = slices
    hidden = jax.nn.relu(x @ up.astype(x.dtype))
    return x + hidden @ down.astype(x.dtype) + x @ a.astype(x.dtype) @ b.astype(x.dtype), None


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


BASE = (shape(LAYERS, WIDTH, HIDDEN), shape(LAYERS, HIDDEN, WIDTH))
ADAPTERS = (shape(LAYERS, WIDTH, RANK), shape(LAYERS, RANK, WIDTH))
X = jax.ShapeDtypeStruct((64, WIDTH), jnp.bfloat16)
WIDE = re.compile(rf"(?:f32|bf16|f16)\[(?:{LAYERS},)?(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]")


def loss(base, adapters, x):
    return jnp.square(jax.lax.scan(layer, x, (base, adapters))[0].astype(jnp.float32)).mean()


def rematerialized(base, adapters, x):
    out, _ = jax.lax.scan(jax.checkpoint(layer), x, (base, adapters))
    return jnp.square(out.astype(jnp.float32)).mean()


def compiled(run, *arguments):
    mesh = compile_only.h200_mesh()
    return compile_only.compile_for(
        mesh, run, *(compile_only.place(mesh, tree) for tree in arguments)
    )


# Of the bytes of the base in bfloat16: what a step on codes needs at most, and one on the dense
# base at least. 32 MiB are cuBLAS's, 128 are the base's.
NEEDED = {loss: (0.4, 1.0), rematerialized: (0.2, 0.3)}
FUNCTIONS = thorough_but({fn.__name__: fn for fn in NEEDED}, ["loss"])


def share_needed(program):
    return compile_only.temporary_bytes(program) / (2 * sum(leaf.size for leaf in BASE))


@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["weight_only", "delayed"]))
def test_a_step_of_adapters_keeps_no_wide_base(recipe, fn):
    compile_only.h200_mesh()  # Else it is skipped.
    coded = quantize_params(BASE, [WeightRule(".*", PerChannel(-1), stacked=1)])
    step = fp8(fn, recipe, weights=(0, 1))
    scales = jax.eval_shape(step.init, coded, ADAPTERS, X)
    program = compiled(jax.value_and_grad(step, argnums=(0, 2)), scales, coded, ADAPTERS, X)
    assert not WIDE.search(program.as_text())
    assert share_needed(program) < NEEDED[fn][0]  # Nor has it a copy in parts.


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a_step_on_the_dense_base_does(fn):
    program = compiled(jax.value_and_grad(fn, argnums=1), BASE, ADAPTERS, X)
    assert WIDE.search(program.as_text()) and share_needed(program) > NEEDED[fn][1]
