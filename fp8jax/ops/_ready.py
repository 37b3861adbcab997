"""The numbers that products read of their sites' scales, made for many sites at once.

A site's state is three exponents. Its casts multiply by the inverses of the scales, its products by
two factors of them; each is a few operations on one number. Done at each use that is a kernel each
on a GPU, and some hundred instructions a site for a compiler. So they are made in front: where a
function begins, or in front of the loop that slices them. What a site reads is a row of its own, a
buffer at the same place in each site's kernels, so that a compiler finds them to be one kernel.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import _xla
from fp8jax._recipe import OPERANDS
from fp8jax._site_exponents import SiteExponents
from fp8jax._site_scales import observes_flushed
from fp8jax.ops._cast import ReadyScale, row_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "rows"],
    meta_fields=["index", "site", "casts"],
)
@dataclasses.dataclass(frozen=True)
class Ready:
    """A site's scales, and what its products read of them.

    Attributes:
      scales: the site's; None where a backward pass takes them from the row.
      rows: float32 `[15]`, see `fp8jax.ops._cast.row_of`; or `[sites, 15]`, of which `index` says
        the site's. A backward pass keeps what one iteration of a scan was given whole: it is
        there, and no other array need be made.
      index: see there (static).
      site, casts: of the site (static).
    """

    scales: SiteExponents | None
    rows: jax.Array
    index: int | None
    site: Any
    casts: tuple

    @classmethod
    def of(cls, scales: SiteExponents, rows: jax.Array | None = None, index: int | None = None):
        """A site's scales, neither stacked nor for a batch; with lanes or without."""
        rows = _row_of(_exponents(scales)) if rows is None else jnp.asarray(rows)
        return cls(scales, rows, index, scales.site, scales.casts)

    @property
    def row(self) -> jax.Array:
        """The site's own."""
        return self.rows if self.index is None else self.rows[self.index]

    def alone(self) -> "Ready":
        """Without the names that make each site another case to trace."""
        return Ready(self.restored().replace(site=""), self.row, None, "", self.casts)

    def restored(self) -> SiteExponents:
        """The site's scales; from its row where they were left out."""
        if self.scales is not None:
            return self.scales
        values = self.row[-len(OPERANDS) :]
        if observes_flushed(self.casts):
            values = jnp.concatenate([values, jnp.zeros_like(values)])
        return SiteExponents(values, self.site, self.casts)

    def of_operand(self, name: str) -> ReadyScale:
        """What an operand is cast with, and its products multiplied by."""
        return ReadyScale(jax.lax.stop_gradient(self.row), name)


@typing.overload
def own_scales(scales: SiteExponents | Ready) -> SiteExponents: ...


@typing.overload
def own_scales(scales: SiteExponents | Ready | None) -> SiteExponents | None: ...


def own_scales(scales: SiteExponents | Ready | None) -> SiteExponents | None:
    """A site's scales alone."""
    return scales.restored() if isinstance(scales, Ready) else scales


def rows_of(exponents: jax.Array) -> list[jax.Array]:
    """What products read of each site that no scan slices.

    Args:
      exponents: float32 `[sites, 3 or 6]`, as of `fp8jax._observe.exponents_of`.

    >>> ready = [ReadyScale(row, "lhs") for row in rows_of(jnp.float32([[3, 0, 0], [-1, 0, 0]]))]
    >>> [float(one.scale) for one in ready], float(ready[0].inverse)
    ([8.0, 0.5], 0.125)
    """
    # Within a derivative, rows are no part of it: observations leave by the scales.
    return _xla.rows_apart(_row_of, jax.lax.stop_gradient(exponents[:, : len(OPERANDS)]))


def stacked_rows(exponents: jax.Array) -> jax.Array | None:
    """The rows of sites that a scan slices, `[length, sites, 15]`, from their exponents in one
    array; None where a further one slices them again.
    """
    if exponents.ndim > 3:
        return None
    return _row_of(jax.lax.stop_gradient(exponents[..., : len(OPERANDS)]))


def stacked_rows_of_lanes(scales: Sequence[SiteExponents]) -> jax.Array | None:
    """The same of sites in lanes; of none, None."""
    if not scales:
        return None
    exponents = [_exponents(node, stacked=1) for node in scales]
    return _row_of(jax.lax.stop_gradient(jnp.stack(exponents, axis=1)))


def _exponents(scales: SiteExponents, stacked: int = 0) -> jax.Array:
    """`[..., 3]`, by operand. Lanes are copies."""
    values = scales.values[..., : len(OPERANDS)]
    return values[(..., *[0] * (scales.ndim - stacked), slice(None))]


_row_of = jax.jit(row_of, inline=True)  # Its trace is cached.
