"""Convolutions compiled for an H200 and a TPU 7x on a machine that has none: which of their
products multiply FP8 codes, and what that saves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fp8jax import recipes
from fp8jax._formats import E4M3
from fp8jax.bench import targets
from fp8jax.bench.ahead import cost_of
from fp8jax.ops._conv import conv_general_dilated

LAYOUT = ("NHWC", "HWIO", "NHWC")


def network(kernels, x, recipe):
    """Three 3 x 3 convolutions."""
    for kernel in kernels:
        if recipe is None:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
        else:
            x = conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, recipe=recipe
            )
        x = jax.nn.relu(x)
    return x


def gradients(kernels, x, recipe):
    def loss(kernels, x):
        return network(kernels, x, recipe).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1))(kernels, x)


def cost(device, function, batch, channels, recipe):
    if not targets.has_compiler(device):
        pytest.skip(f"no compiler for {device}: {targets.INSTALL}")
    mesh = Mesh(np.array(targets.topology(device).devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    x, kernel = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape in ((batch, 32, 32, channels), (3, 3, channels, channels))
    )
    jitted = jax.jit(lambda kernels, x: function(kernels, x, recipe))
    return cost_of(jitted.lower([kernel] * 3, x).compile())


@pytest.mark.parametrize(
    ("recipe", "in_fp8"),
    [(recipes.current(), 3), (recipes.current(backward=E4M3), 6)],
    ids=["gradients E5M2", "gradients E4M3"],
)
def test_convolutions_of_codes_on_an_h200(recipe, in_fp8):
    found = cost("H200", gradients, 8, 64, recipe)
    assert (found.fp8_products, found.products) == (in_fp8, 9)


def test_forward_convolutions_on_a_tpu_7x_take_less_than_bfloat16():
    in_bfloat16, in_fp8 = (
        cost("TPU 7x", network, 64, 512, recipe) for recipe in (None, recipes.current())
    )
    assert in_fp8.fp8_products == 3
    # Amaxes and casts of `current` are passes of their own, which eat up most of what is saved.
    assert in_fp8.product_cycles <= 0.85 * in_bfloat16.product_cycles
    assert in_fp8.cycles < in_bfloat16.cycles
