"""Which products run in FP8, in which recipe, and why not where they don't."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from fp8jax import _shims
from fp8jax._recipe import Recipe
from fp8jax._transform.sites import Rule, Site, convolution_flops, dot_general_flops
from fp8jax.ops._ragged import is_over_rows

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
# The precisions of who wants a product of float32 or float64 exact.
_EXACT = (
    lax.Precision.HIGHEST,
    lax.DotAlgorithmPreset.F32_F32_F32,
    lax.DotAlgorithmPreset.F64_F64_F64,
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What decides on each product of a function.

    Args:
      recipe: of the sites that no rule names.
      rules: ordered; the first that matches a site's name decides on it.
      weights_name: how messages call the weights.
      min_flops: the fewest operations of a product that is selected without a rule.
    """

    recipe: Recipe
    rules: Sequence[Rule]
    weights_name: str
    min_flops: float = 0

    def choose(
        self, name, equation, flops, both_weights, weight, barrier
    ) -> tuple[Recipe | None, str]:
        """The recipe of a product, None where it is left as it is, and the reason.

        Args:
          name: of its site.
          equation: the product.
          flops: its operations, once.
          both_weights: whether both operands are computed from weights only.
          weight: the operand that alone is, "lhs" or "rhs"; None where neither is, or both.
          barrier: what keeps the transform out of where it is, if anything.
        """
        rule = next((rule for rule in self.rules if rule.matches(name)), None)
        if rule is not None and rule.recipe is None:
            return None, f"left out by rule {rule.pattern!r}"
        if barrier is not None:
            return None, barrier
        if not all(atom.aval.dtype in FLOATS for atom in equation.invars[:2]):
            return None, "its operands are narrow already"
        axes = _shims.reduced_axes(equation.invars[0].aval) | _shims.reduced_axes(
            equation.invars[1].aval
        )
        if axes:
            return (
                None,
                "an operand is typed reduced or unreduced over mesh axes "
                f"({', '.join(sorted(axes))}), and codes can't be",
            )
        if equation.primitive.name == "ragged_dot_general" and not is_over_rows(equation.params):
            return (
                None,
                "its groups are of what is summed over, or of batches; in FP8 they are of rows",
            )
        if rule is not None:
            return rule.recipe, f"rule {rule.pattern!r}"
        if both_weights:
            return None, f"both operands are of {self.weights_name} only"
        if _asks_for_highest(equation):
            return (
                None,
                "it asks for precision HIGHEST of float32 operands; a rule with a recipe overrules",
            )
        if weight is None:
            return None, f"no operand is of {self.weights_name} only"
        if flops < self.min_flops:
            self._check_extents(name, equation)
            return None, f"fewer than min_flops={self.min_flops:g} operations"
        return self.recipe, f"{weight} is of {self.weights_name} only"

    def _check_extents(self, name, equation) -> None:
        """Raises where a product may have as many operations as it should, depending on extents
        that are left open.
        """
        for atom in (*equation.invars[:2], *equation.outvars):
            if _shims.has_symbolic(atom.aval.shape):
                raise ValueError(
                    "min_flops needs the number of operations of each product; got extents that "
                    f"jax.export leaves open at site {name!r}: {atom.aval.str_short()}. Leave "
                    "min_flops out, and small products by a rule, fp8jax.Rule(pattern, None)."
                )


def check_that_rules_match(rules: Sequence[Rule], sites: Sequence[Site]) -> None:
    """Raises ValueError where a rule matches no site: its pattern may have a typing error."""
    for rule in rules:
        if not any(rule.matches(site.name) for site in sites):
            names = ", ".join(site.name for site in sites) or "none"
            raise ValueError(
                f"pattern of a rule must match the name of a site; got {rule.pattern!r}, which "
                "matches none. "
                f"The sites are: {names}."
            )


def check_recipe(recipe: Any) -> None:
    """Raises TypeError where `recipe` is none."""
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe must be a Recipe; got {recipe!r}. Use fp8jax.recipes.delayed(), for instance."
        )


def check_min_flops(min_flops: float) -> float:
    """`min_flops`; ValueError where it is no count of operations."""
    if isinstance(min_flops, bool) or not isinstance(min_flops, (int, float)) or not min_flops >= 0:
        raise ValueError(
            f"min_flops must be a number of operations, 0 or more; got {min_flops!r}. Use 0 to "
            "select all sizes."
        )
    return min_flops


def check_scan_repeats(scan_repeats: bool) -> bool:
    """`scan_repeats`; TypeError where it is no bool."""
    if not isinstance(scan_repeats, bool):
        raise TypeError(
            f"scan_repeats must be True or False; got {scan_repeats!r}. It shapes the program, and "
            "can't be traced."
        )
    return scan_repeats


def _asks_for_highest(equation) -> bool:
    """Whether the user wants a product exact, as a router's or a solver's: in float32 or wider, at
    precision HIGHEST.

    By its own `precision`, or by `jax.default_matmul_precision` around it, which JAX writes into
    each product as its own.
    """
    precision = equation.params.get("precision")
    asked = precision if isinstance(precision, tuple) else (precision,)
    is_wide = all(atom.aval.dtype in (jnp.float32, jnp.float64) for atom in equation.invars[:2])
    return is_wide and any(one in _EXACT for one in asked)


def flops_of(equation, lhs, rhs, out) -> int:
    """The operations of a product, once, by its operands' and its result's types."""
    dimension_numbers = equation.params.get("dimension_numbers")
    if equation.primitive.name == "conv_general_dilated":
        return convolution_flops(rhs.shape, out.shape, dimension_numbers.rhs_spec[0])
    if equation.primitive.name == "ragged_dot_general":
        dimension_numbers = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        (_, contracting), (_, batch) = dimension_numbers
        groups = rhs.shape[equation.params["ragged_dot_dimension_numbers"].rhs_group_dimensions[0]]
        return dot_general_flops(lhs.shape, rhs.shape, dimension_numbers) // max(groups, 1)
    return dot_general_flops(lhs.shape, rhs.shape, dimension_numbers)
