"""Kernels for scales within a sum, compiled for devices that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fp8jax
from fp8jax import recipes
from fp8jax.bench import ahead, targets
from fp8jax.hlo.report import program_of


def compiled_step(device, recipe, shapes=((256, 512), (512, 384))):
    """A function's value and gradients, its operands on one device."""
    if not targets.has_compiler(device):
        pytest.skip(f"compiling for {device} needs no device, but {targets.INSTALL}")
    mesh = Mesh(np.array(targets.topology(device).devices[:1]), ("x",))
    placed = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
        for shape in shapes
    ]
    fn = fp8jax.fp8(jnp.matmul, recipe, weights=1)
    (site,) = fn.explain(*placed).sites

    def loss(x, w):
        return jnp.square(fn({}, x, w)).mean(dtype=jnp.float32)

    options = ahead.GPU_OPTIONS if device in targets.GPUS else {}
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*placed)
    return lowered.compile(compiler_options=options), site


@pytest.mark.parametrize("recipe", [recipes.mxfp8(), recipes.blockwise()], ids=lambda r: r.name)
def test_all_products_are_block_scaled_on_blackwell(recipe):
    compiled, site = compiled_step("B200", recipe)
    report = fp8jax.hlo.report(compiled)
    assert site.engine == report.products[0].engine == "cuDNN block-scaled"
    assert {one.product for one in report.products} == {"forward", "dlhs", "drhs"}
    assert not report.fallen_back and len(report.products) == 3 and not report.others
    assert report.verdict(site.name) == "cuDNN block-scaled FP8"


def test_products_on_a_tpu_read_codes():
    recipe = recipes.mxfp8(execution="native")
    compiled, site = compiled_step("TPU 7x", recipe, ((200, 352), (352, 384)))
    assert site.engine == "Pallas, decoding to bfloat16"
    report = fp8jax.hlo.report(compiled)
    assert {one.product for one in report.products} == {"forward", "dlhs", "drhs"}
    assert len(report.products) == 3 and not report.others
    assert report.verdict(site.name) == "Pallas, decoding"
    program = program_of(compiled)
    declared = [flops for one in program.kernels() if (flops := program.declared_flops(one))]
    least = 2 * 200 * 352 * 384
    assert len(declared) == 3 and all(least < flops < 3 * least for flops in declared)
    for one in report.products:
        assert (one.lhs, one.rhs) == ("f8e4m3fn", "f8e4m3fn") and not one.in_fp8


def test_a_device_that_has_no_kernel_is_emulated():
    recipe = recipes.mxfp8(execution="native")
    with pytest.raises(ValueError, match="there is no kernel for NVIDIA H200"):
        compiled_step("H200", recipe)
