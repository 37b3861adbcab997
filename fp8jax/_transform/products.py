"""From an equation to the product that runs in its place."""

import dataclasses
from collections.abc import Callable

import jax

from fp8jax._recipe import OPERANDS
from fp8jax._scaling import BlockWise
from fp8jax._transform.sites import Site
from fp8jax.ops._conv import conv_product
from fp8jax.ops._dot import dot_product
from fp8jax.ops._product import Product
from fp8jax.ops._ragged import Rows, ragged_product
from fp8jax.recipes import weight_only


def product_of(equation, site: Site, lhs, rhs) -> Product:
    """The static part of a site's product, for these operands."""
    return dataclasses.replace(
        _product_of(equation, site.recipe, lhs, rhs), looped=bool(site.loops)
    )


def uncast_product_of(equation, lhs, rhs, mirrored: bool) -> Product:
    """The static part of a product that is no site, of a weight held as codes: the lhs where
    `mirrored`.
    """
    recipe = weight_only()
    return _product_of(equation, recipe.mirrored() if mirrored else recipe, lhs, rhs)


def engines_of(equation, site: Site) -> tuple[tuple[str, str], ...]:
    """For each of a site's products that has scales within its sum, what multiplies it."""
    casts = () if site.recipe is None else map(site.recipe.casts_of, OPERANDS)
    if not any(isinstance(cast.scaling, BlockWise) for found in casts for cast in found):
        return ()
    lhs, rhs, out = (atom.aval for atom in (*equation.invars[:2], equation.outvars[0]))
    return tuple(_product_of(equation, site.recipe, lhs, rhs).engines(lhs, rhs, out).items())


def read_rows(equation, operands: list) -> tuple[list, Callable[[jax.Array], jax.Array]]:
    """The operands with zeros in what the product doesn't read, and the same for its result and so
    for the gradient.

    These are rows of no group, of ragged products. A lhs that is held as codes stays as it is.
    """
    if equation.primitive.name != "ragged_dot_general":
        return operands, lambda out: out
    lhs, rhs, group_sizes = operands
    rows = Rows.of(equation.params, lhs.ndim)
    if isinstance(lhs, jax.Array):
        lhs = rows.in_groups(lhs, group_sizes)
    return [lhs, rhs, group_sizes], lambda out: rows.of_result().in_groups(out, group_sizes)


def _product_of(equation, recipe, lhs, rhs):
    params, out_dtype = equation.params, equation.outvars[0].aval.dtype
    if equation.primitive.name == "dot_general":
        return dot_product(
            lhs,
            rhs,
            params["dimension_numbers"],
            recipe=recipe,
            precision=params["precision"],
            preferred_element_type=out_dtype,
            out_sharding=params["out_sharding"],
        )
    make = {"conv_general_dilated": conv_product, "ragged_dot_general": ragged_product}[
        equation.primitive.name
    ]
    return make(lhs, rhs, equation.primitive, params, out_dtype, recipe=recipe)
