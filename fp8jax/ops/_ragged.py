"""`ragged_dot_general` in FP8, forward and backward: rows in groups, each multiplied by a matrix of
its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax._recipe import Recipe
from fp8jax._site_scales import SiteScales
from fp8jax.ops._run import checked_scales, run
from fp8jax.ops._transposed import Transposed, check_execution


def ragged_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    ragged_dot_dimension_numbers: Any,
    scales: SiteScales | None = None,
    *,
    recipe: Recipe,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.ragged_dot_general` in FP8, forward and backward, as `recipe` says: a mixture of
    experts' product.

    The rows of `lhs` are taken in groups; group `g` is multiplied by `rhs[g]`. The values are those
    of FP8 codes, kept as such for the backward pass; the products run in bfloat16 or float32. Rows
    behind the last group, of `lhs` and of the gradient, are not read, whatever they hold; their
    results and gradients are zeros.

    Args:
      lhs, rhs: float arrays, as in `[rows, k]` and `[groups, k, n]`.
      group_sizes: int32, the rows of each group, in order.
      ragged_dot_dimension_numbers: a `jax.lax.RaggedDotDimensionNumbers` whose ragged axis of the
        lhs is a kept one.
      scales, recipe, preferred_element_type: as of `fp8jax.ops.dot_general`; sums are
        float32. Per tensor, all groups share a scale.

    Returns:
      The result, of `preferred_element_type`. Reverse mode only.

    Raises:
      TypeError: operands that are not floats; scales missing, surplus or of another recipe.
      ValueError: where the ragged axis is a contracted one or a batch; where the recipe's execution
        is native.

    >>> from fp8jax import recipes
    >>> numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
    >>> x, experts = jnp.ones((3, 4)), jnp.stack([jnp.ones((4, 1)), jnp.full((4, 1), 2.0)])
    >>> ragged_dot_general(x, experts, jnp.array([1, 2]), numbers, recipe=recipes.current())[:, 0]
    Array([4., 8., 8.], dtype=float32)
    """
    exponents = checked_scales(recipe, scales, lhs=lhs, rhs=rhs)

    def multiply(lhs, rhs, group_sizes):
        return jax.lax.ragged_dot_general(
            lhs,
            rhs,
            group_sizes,
            ragged_dot_dimension_numbers,
            preferred_element_type=preferred_element_type,
        )

    shapes = (jax.ShapeDtypeStruct(x.shape, jnp.result_type(lhs, rhs)) for x in (lhs, rhs))
    equation: Any
    (equation,) = jax.make_jaxpr(multiply)(*shapes, group_sizes).eqns
    product = ragged_product(
        lhs,
        rhs,
        equation.primitive,
        equation.params,
        equation.outvars[0].aval.dtype,
        recipe=recipe,
    )
    rows = Rows.of(equation.params, lhs.ndim)
    out = run(product, rows.in_groups(lhs, group_sizes), rhs, (group_sizes,), exponents, {})
    return rows.of_result().in_groups(out, group_sizes)


@dataclasses.dataclass(frozen=True)
class Ragged(Transposed):
    """`ragged_dot_general` over rows in groups."""

    def axes(self, product, operand):
        numbers = dict(self.params)["ragged_dot_dimension_numbers"]
        (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
        groups = tuple(numbers.rhs_group_dimensions)
        lhs_kept = _others(len(self.lhs_shape), lhs_contracting, lhs_batch)
        rhs_kept = _others(len(self.rhs_shape), rhs_contracting, rhs_batch, groups)
        if operand == "grad":
            ndim = len(lhs_batch) + len(lhs_kept) + len(rhs_kept)
            of_lhs, of_rhs = (
                tuple(range(len(lhs_batch), ndim - len(rhs_kept))),
                tuple(range(ndim - len(rhs_kept), ndim)),
            )
            return (ndim, of_lhs, of_rhs) if product == "dlhs" else (ndim, of_rhs, of_lhs)
        ndim, kept, contracted = {
            "lhs": (len(self.lhs_shape), lhs_kept, tuple(lhs_contracting)),
            "rhs": (len(self.rhs_shape), rhs_kept, tuple(rhs_contracting)),
        }[operand]
        return (ndim, kept, contracted) if product == "forward" else (ndim, contracted, kept)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows are that the groups take, in one operand.

    Args:
      axis: of the rows.
      outer: axes that each have groups of their own, where `group_sizes` has several axes.
      in_result: for each of the operand's axes its place in the result, None for contracted ones.
    """

    axis: int
    outer: tuple[int, ...]
    in_result: tuple[int | None, ...]

    @classmethod
    def of(cls, params: dict, ndim: int) -> "Rows":
        """The rows of the lhs, of this rank, of an equation whose ragged axis is a kept one."""
        numbers = params["ragged_dot_dimension_numbers"]
        (contracted, _), (batch, _) = numbers.dot_dimension_numbers
        (axis,) = numbers.lhs_ragged_dimensions
        kept = _others(ndim, contracted, batch)
        ordered = (*batch, *kept)
        places = tuple(ordered.index(a) if a in ordered else None for a in range(ndim))
        return cls(axis, (*batch, *(a for a in kept if a < axis)), places)

    def of_result(self) -> "Rows":
        """The same in the result."""
        places = [self.in_result[axis] for axis in (self.axis, *self.outer)]
        axis, *outer = (place for place in places if place is not None)
        return Rows(axis, tuple(outer), ())

    def in_groups(self, array: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """An array with zeros in the rows behind the last group; its gradient has them there, too.

        JAX never reads these rows, so they may hold anything, and must not make a scale.
        """
        count = jnp.sum(group_sizes, axis=-1, dtype=np.int32)
        if count.ndim:
            order = sorted(range(count.ndim), key=self.outer.__getitem__)
            outer = [self.outer[nth] for nth in order]
            count = lax.broadcast_in_dim(lax.transpose(count, order), array.shape, outer)
        row = lax.broadcasted_iota(
            np.int32, array.shape, self.axis, out_sharding=jax.typeof(array).sharding
        )
        return jnp.where(row < count, array, jnp.zeros((), array.dtype))


def _others(ndim: int, *axes) -> tuple[int, ...]:
    taken = {axis for some in axes for axis in some}
    return tuple(axis for axis in range(ndim) if axis not in taken)


def is_over_rows(params: dict) -> bool:
    """Whether the ragged axis of an equation's lhs is a kept one: the one case that models have."""
    numbers = params["ragged_dot_dimension_numbers"]
    (contracting, _), (batch, _) = numbers.dot_dimension_numbers
    return bool(numbers.rhs_group_dimensions) and not set(numbers.lhs_ragged_dimensions) & {
        *contracting,
        *batch,
    }


def ragged_product(lhs, rhs, primitive, params: dict, out_dtype, *, recipe: Recipe) -> Ragged:
    """The static part of the ragged product that an equation of it says."""
    check_execution(recipe, "ragged product")
    if not is_over_rows(params):
        raise ValueError(
            "ragged_dot_dimension_numbers must name a kept axis of lhs as the ragged one; got "
            f"{params['ragged_dot_dimension_numbers']}. Leave such products to "
            "jax.lax.ragged_dot_general."
        )
    return Ragged(
        recipe=recipe,
        out_dtype=jnp.dtype(out_dtype),
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs.dtype,
        primitive=primitive,
        params=tuple(params.items()),
        lhs_shape=tuple(lhs.shape),
        rhs_shape=tuple(rhs.shape),
    )
