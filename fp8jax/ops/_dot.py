"""`dot_general` in FP8, forward and backward."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fp8jax._recipe import PRODUCTS, Recipe
from fp8jax._site_scales import SiteScales
from fp8jax.ops._cast import Codes, boxes_of
from fp8jax.ops._execution import (
    DimensionNumbers,
    engine_of,
    in_rows,
    multiply,
)
from fp8jax.ops._product import Product
from fp8jax.ops._run import check_operands, run
from fp8jax.ops._shardings import sharding_of_product

# Hopper's tensor cores sum faster with fewer bits under DEFAULT; the gradients want the full sum.
_FORWARD, _BACKWARD = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    scales: SiteScales | None = None,
    *,
    recipe: Recipe,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` in FP8, forward and backward, as `recipe` says.

    Args:
      lhs, rhs: arrays of float32, bfloat16 or float16 (float64 where enabled), any rank.
      dimension_numbers: as `jax.lax.dot_general`'s: `((lhs_contracting, rhs_contracting),
        (lhs_batch, rhs_batch))`.
      scales: the exponents of the operands with delayed scaling; None where the recipe has none.
        Their gradient is the amaxes observed, with their seals.
      recipe: the casts and the execution.
      precision: as `jax.lax.dot_general`'s, of products that the recipe casts nothing of; others
        have no use for it.
      preferred_element_type: dtype of the result; by default the operands' common one. Sums are
        float32 always.
      out_sharding: of the result, on meshes with explicit axes, where JAX can't infer it.

    Returns:
      The product, of `preferred_element_type`. Reverse mode only.

    Raises:
      TypeError: operands that are not floats; scales missing, surplus or of another recipe.

    >>> from fp8jax import recipes
    >>> x, w = jnp.ones((2, 4)), jnp.full((4, 3), 0.5)
    >>> recipe = recipes.delayed()
    >>> scales = SiteScales.zeros("dot", recipe.delayed_casts)
    >>> def loss(scales, w):
    ...     return dot_general(x, w, (((1,), (0,)), ((), ())), scales, recipe=recipe).sum()
    >>> amax, dw = jax.grad(loss, argnums=(0, 1))(scales, w)
    >>> float(amax.rhs), dw[0, 0]
    (0.5, Array(2., dtype=float32))
    """
    check_operands(recipe, scales, lhs=lhs, rhs=rhs)
    product = dot_product(
        lhs,
        rhs,
        dimension_numbers,
        recipe=recipe,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    return run(product, lhs, rhs, (), scales, {})


@dataclasses.dataclass(frozen=True)
class Dot(Product):
    """`dot_general`, by `dimension_numbers` whose axes are not negative."""

    dimension_numbers: DimensionNumbers
    lhs_ndim: int
    rhs_ndim: int
    own_precision: Any
    out_sharding: NamedSharding | None

    def axes(self, product, operand):
        (lhs_contracting, rhs_contracting), _ = self.dimension_numbers
        lhs_kept, rhs_kept = self._kept
        if operand == "grad":
            _, of_lhs, of_rhs = self._axes_of_result
            kept, contracted = {"dlhs": (of_lhs, of_rhs), "drhs": (of_rhs, of_lhs)}[product]
            return len(_flat(self._axes_of_result)), kept, contracted
        ndim, kept, contracted = {
            "lhs": (self.lhs_ndim, lhs_kept, lhs_contracting),
            "rhs": (self.rhs_ndim, rhs_kept, rhs_contracting),
        }[operand]
        return (ndim, kept, contracted) if product == "forward" else (ndim, contracted, kept)

    reads_values = True

    def placed(self, codes, contracted):
        return in_rows(codes, contracted, self.recipe.execution)

    def engines(self, lhs: Any, rhs: Any, out: Any) -> dict[str, str]:
        """What multiplies the products whose scales are within their sums, and why where it is none
        but decoded values; of abstract values of the operands and of the result.
        """
        found = {}
        avals = {"lhs": lhs, "rhs": rhs, "grad": out}
        for which, names in PRODUCTS.items():
            operands: list[Any] = []  # abstract
            for name in names:
                spec, shape = getattr(getattr(self.recipe, which), name), avals[name].shape
                if spec is None:
                    operands.append(jax.ShapeDtypeStruct(shape, avals[name].dtype))
                    continue
                data: Any = jax.ShapeDtypeStruct(shape, spec.format.dtype)
                scale: Any = None
                boxes = boxes_of(spec.scaling, *self.axes(which, name))
                operands.append(Codes.of(data, scale, spec, boxes))
            left, right = operands
            words = engine_of(left, right, self._numbers(which), self.recipe.execution, (lhs, rhs))
            if words:
                found[which] = words
        return found

    def forward(self, lhs, rhs, extra):
        return self._multiply("forward", lhs, rhs, self.out_dtype, _FORWARD, self.out_sharding)

    def _numbers(self, product: str) -> DimensionNumbers:
        """The dimension numbers of one of the three products."""
        _, (lhs_batch, rhs_batch) = self.dimension_numbers
        batch, of_lhs, of_rhs = self._axes_of_result
        lhs_kept, rhs_kept = self._kept
        return {
            "forward": self.dimension_numbers,
            "dlhs": ((of_rhs, rhs_kept), (batch, rhs_batch)),
            "drhs": ((lhs_kept, of_lhs), (lhs_batch, batch)),
        }[product]

    def gradient_of_lhs(self, grad, rhs, lhs, extra):
        (lhs_contracting, rhs_contracting), (lhs_batch, _) = self.dimension_numbers
        lhs_kept, _ = self._kept
        # Axes of the product: batch, the lhs's kept ones, and the contracted ones in the order of
        # the rhs's axes.
        order = (
            lhs_batch + lhs_kept + tuple(lhs_contracting[i] for i in _ascending(rhs_contracting))
        )
        gradient = self._multiply(
            "dlhs",
            grad,
            rhs,
            self.lhs_dtype,
            _BACKWARD,
            sharding_of_product(lhs, order),
        )
        return jnp.transpose(gradient, _ascending(order))

    def gradient_of_rhs(self, lhs, grad, rhs, extra):
        (lhs_contracting, rhs_contracting), (_, rhs_batch) = self.dimension_numbers
        _, rhs_kept = self._kept
        order = (
            rhs_batch + tuple(rhs_contracting[i] for i in _ascending(lhs_contracting)) + rhs_kept
        )
        gradient = self._multiply(
            "drhs",
            lhs,
            grad,
            self.rhs_dtype,
            _BACKWARD,
            sharding_of_product(rhs, order),
        )
        return jnp.transpose(gradient, _ascending(order))

    def _multiply(self, which, lhs, rhs, out_dtype, precision, out_sharding):
        dimension_numbers = self._numbers(which)
        is_cast = any(
            isinstance(operand, Codes) or getattr(getattr(self.recipe, which), name) is not None
            for name, operand in zip(PRODUCTS[which], (lhs, rhs), strict=True)
        )
        if not is_cast:
            return jax.lax.dot_general(
                lhs,
                rhs,
                dimension_numbers,
                precision=self.own_precision,
                preferred_element_type=out_dtype,
                out_sharding=out_sharding,
            )
        return multiply(
            lhs,
            rhs,
            dimension_numbers,
            out_dtype=out_dtype,
            precision=precision,
            execution=self.recipe.execution,
            out_sharding=out_sharding,
        )

    @property
    def _kept(self):
        (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = self.dimension_numbers
        return (
            tuple(axis for axis in range(self.lhs_ndim) if axis not in lhs_contracting + lhs_batch),
            tuple(axis for axis in range(self.rhs_ndim) if axis not in rhs_contracting + rhs_batch),
        )

    @property
    def _axes_of_result(self):
        """The axes of the forward product: batch, kept from the lhs, and kept from the rhs."""
        lhs_kept, rhs_kept = self._kept
        batch = self.lhs_ndim - len(self.dimension_numbers[0][0]) - len(lhs_kept)
        middle = batch + len(lhs_kept)
        return (
            tuple(range(batch)),
            tuple(range(batch, middle)),
            tuple(range(middle, middle + len(rhs_kept))),
        )


def dot_product(
    lhs,
    rhs,
    dimension_numbers,
    *,
    recipe: Recipe,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: NamedSharding | None = None,
) -> Dot:
    """The static part of a `dot_general` of these operands, or of their `ShapeDtypeStruct`s."""
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    return Dot(
        recipe=recipe,
        out_dtype=jnp.dtype(preferred_element_type or jnp.result_type(lhs, rhs)),
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs.dtype,
        lhs_ndim=lhs.ndim,
        rhs_ndim=rhs.ndim,
        own_precision=jax.lax.Precision(precision) if isinstance(precision, str) else precision,
        out_sharding=out_sharding,
        dimension_numbers=(
            (_axes(lhs_contracting, lhs), _axes(rhs_contracting, rhs)),
            (_axes(lhs_batch, lhs), _axes(rhs_batch, rhs)),
        ),
    )


def _axes(axes, operand) -> tuple[int, ...]:
    return tuple(int(axis) % operand.ndim for axis in axes)


def _flat(axes) -> tuple[int, ...]:
    return tuple(axis for some in axes for axis in some)


def _ascending(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The order that sorts `axes`; of a permutation, its inverse."""
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))
