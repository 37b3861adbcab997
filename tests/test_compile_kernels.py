"""Kernels for scales within a sum, compiled for devices that are not here."""

import functools
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from machine_code import listing, tool
from tiers import thorough_but

import fp8jax
from fp8jax import _shims, recipes
from fp8jax.bench import ahead, targets
from fp8jax.hlo._products import products_in
from fp8jax.hlo._report import program_of

needs_mosaic = pytest.mark.skipif(
    not _shims.HAS_GPU_KERNELS, reason="JAX before 0.12 has other kernels for GPUs"
)


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
    # Types of what a backward pass computes don't tell the mesh.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
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
    declared = [known[0] for one in program.kernels() if (known := program.declared(one))]
    least = 2 * 200 * 352 * 384
    assert len(declared) == 3 and all(least < flops < 3 * least for flops in declared)
    for one in report.products:
        assert (one.lhs, one.rhs) == ("f8e4m3fn", "f8e4m3fn") and not one.in_fp8


@needs_mosaic
@pytest.mark.parametrize(
    "recipe",
    thorough_but({"mxfp8": recipes.mxfp8, "blockwise": recipes.blockwise}, ["blockwise"]),
)
def test_products_on_hopper_multiply_codes(recipe):
    shapes = ((200, 352), (352, 384))
    compiled, site = compiled_step("H200", recipe(execution="native"), shapes)
    assert site.engine == "Pallas, two-level FP8"
    report = fp8jax.hlo.report(compiled)
    assert {one.product for one in report.products} == {"forward", "dlhs", "drhs"}
    assert len(report.products) == 3 and not report.others and not report.fallen_back
    assert report.verdict(site.name) == "Pallas, two-level FP8"
    for one in report.products:
        assert (one.lhs, one.rhs) == ("f8e4m3fn", "f8e4m3fn") and one.in_fp8
    assert not wide_copies(program_of(compiled))


def wide_copies(program):
    """Kernels beside the products that write a float as large as codes that they read."""
    found = []
    for kernel in program.kernels():
        known = kernel.computation.instructions
        read = [known[name].leaves[0] for name in kernel.instruction.operands if name in known]
        codes = {np.prod(leaf.shape) for leaf in read if leaf.is_fp8}
        wide = {
            np.prod(leaf.shape)
            for leaf in kernel.instruction.leaves
            if leaf.dtype in ("bf16", "f16", "f32")
        }
        if codes & wide and not products_in(program, kernel):
            found.append(kernel.instruction.name)
    return found


@needs_mosaic
@pytest.mark.thorough
@pytest.mark.parametrize("wrap", ["remat", "vmap", "vmap of vmap", "shard_map"])
def test_the_kernel_for_hopper_inside_of(wrap):
    devices = 2 if wrap == "shard_map" else 1
    if not targets.has_compiler("H200"):
        pytest.skip(f"compiling for H200 needs no device, but {targets.INSTALL}")
    mesh = Mesh(np.array(targets.topology("H200", devices).devices), ("x",))
    product = functools.partial(
        fp8jax.fp8(jnp.matmul, recipes.blockwise(execution="native"), weights=1), {}
    )
    spec = PartitionSpec
    run = {
        "remat": jax.checkpoint(product),
        "vmap": jax.vmap(product, (0, None)),
        "vmap of vmap": jax.vmap(jax.vmap(product, (0, None))),
        "shard_map": jax.shard_map(
            product, mesh=mesh, in_specs=(spec("x"), spec()), out_specs=spec("x")
        ),
    }[wrap]
    shapes = {
        "vmap": ((3, 160, 160), (160, 160)),
        "vmap of vmap": ((2, 3, 160, 160), (2, 160, 160)),
    }
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec()))
        for shape in shapes.get(wrap, ((320, 160), (160, 160)))
    )

    def loss(x, w):
        return jnp.square(run(x, w)).mean(dtype=jnp.float32)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w)
    report = fp8jax.hlo.report(lowered.compile(compiler_options=ahead.GPU_OPTIONS))
    assert {one.engine for one in report.products} == {"Pallas, two-level"}
    assert {one.product for one in report.products} == {"forward", "dlhs", "drhs"}


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")  # Flax's LayerNorm needs it for bfloat16
def test_a_step_on_blackwell_moves_few_bytes():
    if not targets.has_compiler("B200"):
        pytest.skip(f"compiling for B200 needs no device, but {targets.INSTALL}")
    cost = ahead.cost_of(ahead.compile_step("B200", ahead.all_workloads()["large"], "mxfp8"))
    assert (cost.fp8_products, cost.products) == (36, 36)
    assert cost.bytes <= 45e9


@pytest.mark.parametrize("device", thorough_but({"7x": "TPU 7x", "v6e": "TPU v6e"}, ["7x"]))
@pytest.mark.parametrize(
    "recipe", thorough_but({"mxfp8": recipes.mxfp8, "blockwise": recipes.blockwise}, ["mxfp8"])
)
def test_tpus_round_each_operand_once(recipe, device):
    compiled, _ = compiled_step(device, recipe())
    program = program_of(compiled)
    rounded = [one for one in program.kernels() if "fp8jax_values" in one.instruction.op_name]
    # Each of the three operands, for both products that it takes part in.
    assert len(rounded) == 3 and all(program.declared(one) for one in rounded)
    two = 1 if recipe is recipes.blockwise else 2  # of a weight in squares, one cast
    assert sorted(len(one.instruction.leaves) for one in rounded) == sorted([2, 2, two])
    products = [one for kernel in program.kernels() for one in products_in(program, kernel)]
    assert len(products) == 3
    assert {dtype for one in products for dtype in (one.lhs, one.rhs)} == {"bf16"}


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (recipes.mxfp8, jnp.bfloat16),
        (recipes.mxfp8, jnp.float32),
        pytest.param(recipes.blockwise, jnp.float32, marks=pytest.mark.thorough),
    ],
)
def test_scanned_layers_compile_for_a_tpu(recipe, dtype):
    """What the kernel writes is stacked in the layout that a product of the backward pass wants."""
    if not targets.has_compiler("TPU 7x"):
        pytest.skip(f"compiling for TPU 7x needs no device, but {targets.INSTALL}")
    mesh = Mesh(np.array(targets.topology("TPU 7x").devices[:1]), ("x",))
    weights, x = (
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, PartitionSpec()))
        for shape, kind in (((3, 1024, 1024), dtype), ((512, 1024), jnp.bfloat16))
    )

    def loss(weights, x):
        layer = lambda x, w: (x + jnp.tanh(x @ w.astype(x.dtype)), None)
        return jnp.square(jax.lax.scan(layer, x, weights)[0]).mean(dtype=jnp.float32)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradient = jax.grad(fp8jax.fp8(loss, recipe()), argnums=1)
        compiled = jax.jit(gradient).lower({}, weights, x).compile()
    found = program_of(compiled).kernels()
    assert any("fp8jax_values" in one.instruction.op_name for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mxfp8", "blockwise"])
@jax.numpy_dtype_promotion("standard")
def test_a_step_on_a_tpu_is_estimated_no_slower_than_bfloat16s(recipe):
    if not targets.has_compiler("TPU 7x"):
        pytest.skip(f"compiling for TPU 7x needs no device, but {targets.INSTALL}")
    large = ahead.all_workloads()["large"]
    plain, cost = (
        ahead.cost_of(ahead.compile_step("TPU 7x", large, one)) for one in ("bf16", recipe)
    )
    assert cost.cycles is not None and plain.cycles is not None
    assert cost.cycles <= plain.cycles and cost.temporary_bytes <= plain.temporary_bytes


@needs_mosaic
@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Flax's LayerNorm needs it for bfloat16
def test_a_step_on_hopper_moves_fewer_bytes_by_the_kernel():
    if not targets.has_compiler("H200"):
        pytest.skip(f"compiling for H200 needs no device, but {targets.INSTALL}")
    large = ahead.all_workloads()["large"]
    cost = ahead.cost_of(ahead.compile_step("H200", large, "blockwise-native"))
    emulated = ahead.cost_of(ahead.compile_step("H200", large, "blockwise"))
    assert (cost.fp8_products, cost.products) == (36, 36)
    assert (emulated.fp8_products, emulated.products) == (0, 36)
    assert cost.bytes <= 40e9 < 48e9 < emulated.bytes


@needs_mosaic
@pytest.mark.thorough
@pytest.mark.parametrize("extent", [128, 32])
def test_the_machine_code_for_hopper_multiplies_in_fp8(extent, tmp_path, monkeypatch):
    """By FP8 instructions of the tensor cores, with no code widened and no sum spilled."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    recipe = recipes.blockwise if extent == 128 else recipes.mxfp8
    # Shapes of no other test: a kernel that was compiled before is not dumped.
    compiled_step("H200", recipe(execution="native"), ((264, 640), (640, 904)))
    programs = sorted(tmp_path.glob("fp8jax_two_level_product*.ptx"))
    assert len(programs) == 3
    for program in programs:
        multiplications = re.findall(r"(wgmma\.mma_async\S+)", program.read_text())
        assert set(multiplications) == {"wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"}
        if extent == 128:
            assert " 0 bytes spill stores" in program.with_suffix(".ptxas").read_text()
    for program in programs:
        binary = program.with_suffix(".cubin")
        subprocess.run([tool("ptxas"), "-arch=sm_90a", program, "-o", binary], check=True)
        code = listing(binary)
        assert len(re.findall(r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3", code)) >= 4
        assert not re.search(r"HGMMA|HMMA|F2FP.*E4M3|I2F", code)


def test_a_device_that_has_no_kernel_is_emulated():
    recipe = recipes.mxfp8(execution="native")
    with pytest.raises(ValueError, match="there is no kernel for TPU v6"):
        compiled_step("TPU v6e", recipe)
