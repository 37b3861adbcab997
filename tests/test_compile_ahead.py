"""What XLA estimates of casts and of training steps on a TPU 7x, compiled on a machine that has
none.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fp8jax import recipes
from fp8jax._scaling import PerTensor, PerToken, group_amax, observed_amax
from fp8jax.bench import targets
from fp8jax.bench.ahead import Layers, Workload, all_workloads, compile_step, cost_of
from fp8jax.bench.timing import optional
from fp8jax.ops._cast import cast

DEVICE = "TPU 7x"
needs_compiler = pytest.mark.skipif(
    not targets.has_compiler(DEVICE), reason=f"no compiler for {DEVICE}: {targets.INSTALL}"
)


def cycles_of_product(finish):
    """Of a product of codes, and of what `finish` makes of its result by a scale."""
    mesh = Mesh(np.array(targets.topology(DEVICE).devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    x, w, scale = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (
            ((8192, 4096), jnp.float8_e4m3fn),
            ((4096, 4096), jnp.float8_e4m3fn),
            ((), jnp.float32),
        )
    )

    def program(x, w, scale):
        out = jax.lax.dot(x, w, preferred_element_type=jnp.bfloat16)
        return finish(jax.nn.gelu(out), scale)

    return cost_of(jax.jit(program).lower(x, w, scale).compile()).cycles


@needs_compiler
def test_a_cast_and_an_amax_cost_a_product_a_tenth():
    """By integer operations, the cast alone costs it three tenths."""
    spec = recipes.delayed().forward.lhs
    alone = cycles_of_product(lambda out, scale: out)
    both = cycles_of_product(
        lambda out, scale: (
            cast(out, spec, PerTensor(), scale).data,
            observed_amax(out, PerTensor()),
        )
    )
    assert 0 < both <= 1.12 * alone


@needs_compiler
def test_amaxes_of_weights_are_read_in_parts():
    mesh = Mesh(np.array(targets.topology(DEVICE).devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    weight = jax.ShapeDtypeStruct((4096, 16384), jnp.bfloat16, sharding=sharding)

    def cycles(scaling, in_memory):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            amax = functools.partial(group_amax, scaling=scaling, in_memory=in_memory)
            return cost_of(jax.jit(amax).lower(weight).compile()).cycles

    for scaling in (PerTensor(), PerToken()):
        assert 0 < cycles(scaling, True) <= 0.45 * cycles(scaling, False)


@functools.cache
def cycles_of_step(contender):
    return cost_of(compile_step(DEVICE, all_workloads()["large"], contender))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "most"), [("delayed", 0.6), ("current", 0.6), ("rowwise", 0.64)]
)
@jax.numpy_dtype_promotion("standard")  # Flax's LayerNorm needs it for bfloat16
def test_a_step_is_ahead_of_bfloat16_and_of_qwix(recipe, most):
    ours = cycles_of_step(recipe)
    assert ours.fp8_products == ours.products
    assert ours.cycles <= most * cycles_of_step("bf16").cycles
    if optional("qwix") and recipe != "rowwise":  # Whose gradients have two casts more.
        assert ours.cycles <= cycles_of_step("qwix").cycles


@pytest.mark.skipif(
    not targets.has_compiler("H200"), reason=f"no compiler for an H200: {targets.INSTALL}"
)
@jax.numpy_dtype_promotion("standard")
def test_a_gpu_keeps_no_codes_of_the_layers_that_a_scan_slices():
    work = Workload(Layers(4, 512, attention=True, scanned=True), (4, 256, 512), optax.sgd(1e-3))
    plain, ours = (compile_step("H200", work, name) for name in ("bf16", "delayed"))
    cost = cost_of(ours)
    assert cost.fp8_products == cost.products - 6 * 4  # attention's own two, as they are
    assert not re.search(r"(u8|f8e4m3fn)\[4,(512,2048|2048,512|512,512)\]", ours.as_text())
    assert cost.temporary_bytes <= 0.97 * cost_of(plain).temporary_bytes
