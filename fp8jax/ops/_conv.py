"""`conv_general_dilated` in FP8, forward and backward."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax._formats import E4M3
from fp8jax._recipe import Recipe
from fp8jax._site_scales import SiteScales
from fp8jax.ops._cast import Codes
from fp8jax.ops._run import checked_scales, run
from fp8jax.ops._transposed import Transposed, check_execution

# By XLA's estimates for a TPU 7x, a convolution of codes of 8 x 32 x 32 positions takes 1.85 times
# bfloat16's cycles, and one of 64 x 32 x 32 takes 0.51 times.
_ROWS_ON_TPU = 65_536


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    scales: SiteScales | None = None,
    *,
    recipe: Recipe,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` in FP8, forward and backward, as `recipe` says.

    The values are those of FP8 codes, kept as such for the backward pass. Where both operands of
    the forward convolution or of the input's gradient have one scale per tensor and the format
    E4M3, and channels come in sixteens, GPUs multiply the codes; so do TPUs, from 65,536 positions
    in the batch on. All other products run in bfloat16 or float32, and always the kernel's
    gradient. The contracted axes, along which `PerToken` has one scale, are:

        forward  lhs: features              rhs: input features and window
        dlhs     grad: features             rhs: output features and window
        drhs     lhs: batch and positions   grad: batch and positions

    Args:
      lhs, rhs: float arrays, the input and the kernel, of 1 to 3 spatial dimensions or any other
        number.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count: as `jax.lax.conv_general_dilated`'s.
      scales, recipe, preferred_element_type: as of `fp8jax.ops.dot_general`; sums are
        float32.

    Returns:
      The result, of `preferred_element_type`. Reverse mode only.

    Raises:
      TypeError: operands that are not floats; scales missing, surplus or of another recipe.
      ValueError: where the recipe's execution is native.

    >>> from fp8jax import recipes
    >>> image, kernel = jnp.ones((1, 1, 4, 4)), jnp.full((1, 1, 3, 3), 0.5)
    >>> conv_general_dilated(image, kernel, (1, 1), "VALID", recipe=recipes.current())[0, 0]
    Array([[4.5, 4.5],
           [4.5, 4.5]], dtype=float32)
    """
    exponents = checked_scales(recipe, scales, lhs=lhs, rhs=rhs)

    def convolve(lhs, rhs):
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            preferred_element_type=preferred_element_type,
        )

    equation: Any
    (equation,) = jax.make_jaxpr(convolve)(
        *(jax.ShapeDtypeStruct(x.shape, jnp.result_type(lhs, rhs)) for x in (lhs, rhs))
    ).eqns
    product = conv_product(
        lhs,
        rhs,
        equation.primitive,
        equation.params,
        equation.outvars[0].aval.dtype,
        recipe=recipe,
    )
    return run(product, lhs, rhs, (), exponents, {})


@dataclasses.dataclass(frozen=True)
class Conv(Transposed):
    """`conv_general_dilated`."""

    def native_on(self, first, second):
        params = dict(self.params)
        numbers = params["dimension_numbers"]
        channels = [self.rhs_shape[axis] for axis in numbers.rhs_spec[:2]]
        batch, _, *positions = numbers.lhs_spec
        fits = (
            self.recipe.execution == "auto"
            and params["feature_group_count"] == params["batch_group_count"] == 1
            # cuDNN's are for channels in sixteens.
            and all(size % 16 == 0 for size in channels)
            and all(
                isinstance(operand, Codes) and operand.format == E4M3 and not operand.scale.ndim
                for operand in (first, second)
            )
        )
        rows = math.prod(self.lhs_shape[axis] for axis in (batch, *positions))
        return ("cuda", "tpu")[: (1 + (rows >= _ROWS_ON_TPU)) if fits else 0]

    def axes(self, product, operand):
        numbers = dict(self.params)["dimension_numbers"]
        (batch, features, *positions) = {
            "lhs": numbers.lhs_spec,
            "rhs": numbers.rhs_spec,
            "grad": numbers.out_spec,
        }[operand]
        ndim = len(numbers.lhs_spec)
        if operand == "rhs":  # Its axes are output features, input features, window.
            into, out_of = (batch, features) if product == "forward" else (features, batch)
            return ndim, (into,), (*positions, out_of)
        if product == "drhs":
            return ndim, (features,), (batch, *positions)
        return ndim, (batch, *positions), (features,)


def conv_product(lhs, rhs, primitive, params: dict, out_dtype, *, recipe: Recipe) -> Conv:
    """The static part of the convolution that an equation of it says."""
    check_execution(recipe, "convolution")
    return Conv(
        recipe=recipe,
        out_dtype=jnp.dtype(out_dtype),
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs.dtype,
        primitive=primitive,
        params=tuple(params.items()),
        lhs_shape=tuple(lhs.shape),
        rhs_shape=tuple(rhs.shape),
    )
