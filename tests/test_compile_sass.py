"""What a cast is to an H200: its machine code, compiled on a machine that has none."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from compile_only import h200_mesh, place
from machine_code import instructions_by_kernel

from fp8jax import recipes
from fp8jax._formats import E4M3, E5M2
from fp8jax._scaling import PerTensor
from fp8jax.ops._cast import cast

# A thread has four elements. Where they lie in memory, reading and writing them, and the end take
# these. Around the conversion, XLA looks for what overflows, in five.
AROUND = 18


@pytest.mark.parametrize(
    ("fmt", "dtype", "most"),
    [
        (E4M3, jnp.float32, 13),
        (E5M2, jnp.float32, 14),
        # An instruction and a half widen a bfloat16, of which there are two in a register.
        (E4M3, jnp.bfloat16, 14.5),
        (E5M2, jnp.bfloat16, 15.5),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_cast_is_the_hardware_s_conversion_and_little_more(fmt, dtype, most, tmp_path):
    mesh = h200_mesh()
    x, scale = (
        place(mesh, jax.ShapeDtypeStruct(shape, one))
        for shape, one in (((1024, 4096), dtype), ((), jnp.float32))
    )
    spec = dataclasses.replace(recipes.delayed().forward.lhs, format=fmt)
    compiled = (
        jax.jit(lambda x, scale: cast(x, spec, PerTensor(), scale).data).lower(x, scale).compile()
    )
    kernels = instructions_by_kernel(compiled, tmp_path).values()
    (found,) = (one for one in kernels if any(name.startswith("F2FP") for name in one))
    conversions = {name: count for name, count in found.items() if name.startswith("F2FP")}
    assert list(conversions.values()) == [4]
    assert next(iter(conversions)).startswith(f"F2FP.SATFINITE.{fmt.name}.F32")
    assert 0 < (found.total() - AROUND) / 4 <= most
