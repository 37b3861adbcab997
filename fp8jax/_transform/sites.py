"""A site: one product of the function, whether it is selected to run in FP8, and why not where it
isn't.
"""

import dataclasses
import re
from collections.abc import Sequence

from fp8jax import _shims
from fp8jax._patterns import check_pattern
from fp8jax._recipe import CastSpec, Recipe


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which recipe the sites of some names get.

    Args:
      pattern: regular expression that the whole name of a site must match (`re.fullmatch`).
      recipe: the recipe of these sites, or None to leave them as they are. With a recipe, a product
        is selected even where neither operand is a weight, as in attention.
      first, last: only this many of the matching products that read weights, from the first or the
        last of the program; together, those at both ends. The layers that a scan stacks are one.
        What comes first is another product in another entry method: use names where a model has
        several.

    Raises:
      ValueError: where `pattern` is no regular expression, or a count is negative.
      TypeError: where `recipe` is neither a `Recipe` nor None.

    >>> Rule(r".*lm_head", None).matches("decoder/lm_head")
    True
    >>> skip_first_and_last = Rule(".*", None, first=1, last=1)
    """

    pattern: str
    recipe: Recipe | None
    first: int = 0
    last: int = 0

    def __post_init__(self):
        for name in ("first", "last"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"{name} must be a number of products, 0 or more; got {count!r}. Leave it out "
                    "for no limit."
                )
        check_pattern(self.pattern, over="site names")
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise TypeError(
                f"recipe of a rule must be a Recipe or None; got {self.recipe!r}. "
                "Use fp8jax.recipes.delayed(), for instance, or None to leave the sites "
                "unquantized."
            )

    def matches(self, name: str) -> bool:
        """Whether a site of this name gets the rule's recipe."""
        return re.fullmatch(self.pattern, name) is not None

    def among(self, sites: Sequence["Site"]) -> "Rule":
        """The rule by names alone, for a function with these sites."""
        if not self.first and not self.last:
            return self
        names = [site.name for site in sites if site.weight is not None and self.matches(site.name)]
        chosen = dict.fromkeys((*names[: self.first], *names[max(len(names) - self.last, 0) :]))
        return Rule("|".join(map(re.escape, chosen)) or "(?!)", self.recipe)


@dataclasses.dataclass(frozen=True)
class Site:
    """One product of the function.

    Args:
      name: module path or name scope, what of the weight's path that does not say yet, and a
        counter where products are alike in both.
      product: name of the primitive.
      lhs, rhs, out: dtype and shape of the operands and the result, as in "float32[8,16]".
      flops: floating-point operations of the forward product in one call of the function, all
        iterations of the scans around it together; extents that `jax.export` leaves open count as
        1. Each gradient costs the same again.
      recipe: the recipe it runs with, or None.
      reason: why it was selected, or why not.
      loops: the scans around it, as (identity, length), outermost first.
      stacked_over: the identities of those scans over which its weights, and so its scales, are
        stacked.
      device_axes: the manual mesh axes over which its operands may differ.
      weight: "lhs" or "rhs", the operand that is computed from weights only; None where that isn't
        one of the two.
      source: the line of the user's code that it comes from, as "model.py:12"; "" where none is
        known.
      cast_with: operands that an earlier site of the same scope reads and casts alike: each one's
        name, and that site's, whose cast and scale it takes.
      engines: for each of its three products whose scales differ along its sum, what multiplies it
        on the device that is traced for, or why it is emulated.
    """

    name: str
    product: str
    lhs: str
    rhs: str
    out: str
    flops: int
    recipe: Recipe | None
    reason: str
    loops: tuple[tuple[int, int], ...] = ()
    stacked_over: frozenset[int] = frozenset()
    device_axes: frozenset[str] = frozenset()
    weight: str | None = None
    source: str = dataclasses.field(default="", compare=False)
    cast_with: tuple[tuple[str, str], ...] = ()
    engines: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)

    @property
    def selected(self) -> bool:
        """Whether the product runs in FP8."""
        return self.recipe is not None

    @property
    def delayed_casts(self) -> tuple[CastSpec | None, CastSpec | None, CastSpec | None]:
        """For lhs, rhs and grad: the cast where its scale is state; else None."""
        return (None, None, None) if self.recipe is None else self.recipe.delayed_casts

    @property
    def engine(self) -> str:
        """What multiplies its products that have scales within their sums; "" where none has."""
        words = dict.fromkeys(word for _, word in self.engines)
        if len(words) < 2:
            return next(iter(words), "")
        return ", ".join(f"{product}: {word}" for product, word in self.engines)

    @property
    def has_scales(self) -> bool:
        """Whether any of its operands has a scale that is state."""
        return any(self.delayed_casts)

    @property
    def weight_operand(self) -> str:
        """`weight`, of a site that has one."""
        if self.weight is None:
            raise ValueError(f"site must read a weight; got {self.name!r}, which reads none.")
        return self.weight

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of its scales: the lengths of the scans its weights are stacked over."""
        return tuple(length for loop, length in self.loops if loop in self.stacked_over)


def dot_general_flops(lhs_shape: Sequence[int], rhs_shape: Sequence[int], dimension_numbers) -> int:
    """Multiplications and additions of a `dot_general`.

    >>> dot_general_flops((2, 3), (3, 4), (((1,), (0,)), ((), ())))
    48
    """
    (_, rhs_contracting), (_, rhs_batch) = dimension_numbers
    kept = (
        size for axis, size in enumerate(rhs_shape) if axis not in (*rhs_contracting, *rhs_batch)
    )
    return 2 * _shims.least_size(lhs_shape) * _shims.least_size(tuple(kept))


def convolution_flops(
    rhs_shape: Sequence[int], out_shape: Sequence[int], rhs_output_axis: int
) -> int:
    """Multiplications and additions of a `conv_general_dilated`, its padding counted in.

    >>> convolution_flops((3, 3, 8, 16), (1, 4, 4, 16), 3)
    36864
    """
    taps = (size for axis, size in enumerate(rhs_shape) if axis != rhs_output_axis)
    return 2 * _shims.least_size(out_shape) * _shims.least_size(tuple(taps))
