"""The scales of one site inside of a function: the exponents alone, in one array."""

import dataclasses
import functools
from typing import Any

import jax

from fp8jax._recipe import OPERANDS, CastSpec
from fp8jax._site_scales import scales_of


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "whole"], meta_fields=["site", "casts"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class SiteExponents:
    """The exponents of one site's scales; or, as their cotangent, the amaxes observed there.

    A `SiteScales` has an array for each of its numbers, and seals for what happens to observations
    outside of a function. Inside, all of a site is one array, and all merging is by max.

    Attributes:
      values: float32 `[..., 3]`, of lhs, rhs and grad; or `[..., 6]`, with the shares flushed to
        zero behind, which are 0 as state. 0 for an operand without delayed scaling. Before that,
        the axes of the scans that the site is stacked over, and of lanes.
      site: its name (static).
      casts: as of a `SiteScales` (static).
      whole: where `values` has lanes, the same without, for what has none: weights. It is there
        until the outermost loop, in front of which these are observed.
    """

    values: Any
    site: Any
    casts: tuple[CastSpec | None, CastSpec | None, CastSpec | None]
    whole: Any = None

    @property
    def ndim(self) -> int:
        """The number of axes before the site's own."""
        return self.values.ndim - 1

    def of_operand(self, name: str) -> jax.Array | None:
        """The exponent, or the amax, of an operand; None where its scaling is not delayed.

            >>> import jax.numpy as jnp
        >>> from fp8jax import recipes
            >>> casts = recipes.delayed().delayed_casts
            >>> SiteExponents(jnp.float32([1, 2, 3]), "up", casts).of_operand("rhs")
            Array(2., dtype=float32)
        """
        column = OPERANDS.index(name)
        if self.casts[column] is None:
            return None
        return jax.lax.index_in_dim(self.values, column, -1, keepdims=False)

    def scales(self) -> dict[str, jax.Array]:
        """The scales themselves, `2**exponent`, float32, by operand; without those that are not
        state.
        """
        return scales_of({name: self.of_operand(name) for name in OPERANDS})

    def replace(self, **changes: Any) -> "SiteExponents":
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)
