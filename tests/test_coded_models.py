"""Models with large tables, tied and not, as codes: alone, and with all other weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coded_models import MODELS, RULES, TABLES, Gemma, Sizes
from test_serving import sqnr
from tiers import thorough_but

import fp8jax
from fp8jax import Rule, quantize_params, recipes

RECIPES = {name: getattr(recipes, name)() for name in ("weight_only", "rowwise", "delayed")}
IDS = np.random.default_rng(0).integers(0, Sizes.vocabulary, (2, 12)).astype(np.int32)
NAMES = {name: name for name in MODELS}
OTHERS = [Rule("(?!.*embed).*", None)]


def trained(module):
    """Parameters of which none is what it began as."""
    rng, params = np.random.default_rng(1), jax.jit(module.init)(jax.random.key(0), IDS)["params"]

    def moved(leaf):
        factor = 1 + 0.2 * rng.normal(size=leaf.shape)
        return np.float32(leaf * factor if leaf.any() else factor - 1)

    return jax.tree.map(moved, params)


def check(module, params, coded, served):
    variables = {"params": coded}
    if any(served.recipe.delayed_casts):
        variables |= served.apply(variables, IDS, mutable="fp8")[1]
    got = jax.tree.leaves(jax.jit(served.apply)(variables, IDS))
    expected = jax.tree.leaves(module.apply({"params": params}, IDS))
    for one, want in zip(got, expected, strict=True):
        assert 25 < sqnr(one, np.float64(want)) < 60


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_tables_alone(name, recipe):
    module = MODELS[name]()
    params = trained(module)
    coded = quantize_params(params, TABLES)
    assert (
        len(jax.tree.leaves(coded)) - len(jax.tree.leaves(params)) == {"gemma": 1, "bert": 3}[name]
    )
    check(module, params, coded, fp8jax.linen.Fp8(module, recipe, OTHERS))


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
def test_all_weights(name):
    """In the format that a product which decodes them anyway should have."""
    module = MODELS[name]()
    params = trained(module)
    fine = {"format": "E3M4", "power_of_two": False, "scale": "mse"}
    coded = quantize_params(params, [dataclasses.replace(rule, **fine) for rule in RULES])
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert size(coded) < 0.33 * size(params)
    check(module, params, coded, fp8jax.linen.Fp8(module, recipes.weight_only()))


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")  # attention in bfloat16 needs it
def test_a_table_in_bfloat16():
    params = trained(Gemma())
    module, wide = Gemma(dtype=jnp.bfloat16), Gemma().apply({"params": params}, IDS)
    served = fp8jax.linen.Fp8(module, recipes.weight_only(), OTHERS)
    got = jax.jit(served.apply)({"params": quantize_params(params, TABLES)}, IDS)
    assert 25 < sqnr(got, np.float64(wide)) < 60


@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["weight_only"]))
@pytest.mark.parametrize("name", thorough_but(NAMES, ["gemma"]))
def test_no_wide_table_is_in_a_cpu_s_program_for_a_token(name, recipe):
    """A CPU decodes in the kernel that multiplies one row; several rows share a decoded copy, and
    from JAX 0.11 on one row has it, too.
    """
    module, ids = MODELS[name](Sizes(vocabulary=4096)), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    served, coded = fp8jax.linen.Fp8(module, recipe), quantize_params(params, RULES)
    init = lambda params, ids: served.apply({"params": params}, ids, mutable="fp8")[1]
    variables = {"params": coded, **jax.eval_shape(init, coded, ids)}
    memory = jax.jit(served.apply).lower(variables, ids).compile().memory_analysis()
    # A copy of its bytes; and none of its values, or one in float32 and from that one in bfloat16.
    copies = 6.5 if jax.__version_info__ >= (0, 11) else 1.5
    assert memory.temp_size_in_bytes < copies * 4096 * Sizes.width
