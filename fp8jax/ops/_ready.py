"""The numbers that products read of their sites' scales, made for many sites at once.

A site's state is three exponents. Its casts multiply by the inverses of the scales, its products by
two factors of them; each is a few operations on one number. Done at each use that is a kernel each
on a GPU, and some hundred instructions a site for a compiler. So they are made in front: where a
function begins, or in front of the loop that slices them. What a site reads is a row of its own, a
buffer at the same place in each site's kernels, so that a compiler finds them to be one kernel.
"""

import collections
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _shims, _xla
from fp8jax._bank import Scales
from fp8jax._recipe import OPERANDS
from fp8jax._site_scales import SiteScales
from fp8jax.ops._cast import ReadyScale, row_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "rows"],
    meta_fields=["index", "tree"],
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
      tree: the structure of `scales` (static).
    """

    scales: SiteScales | None
    rows: jax.Array
    index: int | None
    tree: Any

    @classmethod
    def of(cls, scales: SiteScales, rows: jax.Array | None = None, index: int | None = None):
        """A site's scales, neither stacked nor for a batch; with lanes or without."""
        rows = _row_of(_exponents(scales)) if rows is None else jnp.asarray(rows)
        return cls(scales, rows, index, jax.tree.structure(scales))

    @property
    def row(self) -> jax.Array:
        """The site's own."""
        return self.rows if self.index is None else self.rows[self.index]

    def alone(self) -> "Ready":
        """Without the names that make each site another case to trace."""
        scales = self.restored().replace(site="")
        return Ready(scales, self.row, None, jax.tree.structure(scales))

    def restored(self) -> SiteScales:
        """The site's scales; from its row where they were left out."""
        if self.scales is not None:
            return self.scales
        like = jax.tree.unflatten(self.tree, [0] * self.tree.num_leaves)
        zeros = jnp.zeros_like(self.row[: len(OPERANDS)])
        return like.replace(
            seal=zeros,
            uses=zeros[0],
            flushed=None if like.flushed is None else zeros,
            **{
                name: None if getattr(like, name) is None else self.of_operand(name).exponent
                for name in OPERANDS
            },
        )

    def of_operand(self, name: str) -> ReadyScale:
        """What an operand is cast with, and its products multiplied by."""
        return ReadyScale(jax.lax.stop_gradient(self.row), name)


@typing.overload
def own_scales(scales: SiteScales | Ready) -> SiteScales: ...


@typing.overload
def own_scales(scales: SiteScales | Ready | None) -> SiteScales | None: ...


def own_scales(scales: SiteScales | Ready | None) -> SiteScales | None:
    """A site's scales alone."""
    return scales.restored() if isinstance(scales, Ready) else scales


def rows_of(
    scales: Scales, leaders: Mapping[str, Mapping[str, str]] = types.MappingProxyType({})
) -> dict[str, jax.Array]:
    """What products read of each site that no scan slices.

    Args:
      scales: of all sites.
      leaders: by site, for each operand that takes another site's scale, the name of that one.

    >>> from fp8jax import recipes
    >>> casts = recipes.delayed().delayed_casts
    >>> sites = (SiteScales.zeros(name, casts) for name in ("a", "b"))
    >>> scales = Scales.of(site.replace(lhs=site.lhs + 3) for site in sites)
    >>> ready = Ready.of(scales["b"], rows_of(scales)["b"]).of_operand("lhs")
    >>> ready.scale, ready.inverse
    (Array(8., dtype=float32), Array(0.125, dtype=float32))
    """
    kinds = collections.defaultdict(list)
    for array, group in zip(scales.arrays, scales.groups, strict=True):
        if array.ndim == 2:
            kinds[_shims.varying_axes(array)].append((array, group.sites))
    found = {}
    for alike in kinds.values():
        sites = [site for _, of_group in alike for site in of_group]
        at = {site: index for index, site in enumerate(sites)}
        sources = np.tile(np.arange(len(sites))[:, None], len(OPERANDS))
        without = set()
        for site in sites:
            for operand, first in leaders.get(site, {}).items():
                # One that varies over other mesh axes is none of these.
                without |= set() if first in at else {site}
                sources[at[site], OPERANDS.index(operand)] = at.get(first, 0)
        # Within a derivative, rows are no part of it: observations leave by the scales.
        exponents = jax.lax.stop_gradient(
            jnp.concatenate([array[:, : len(OPERANDS)] for array, _ in alike])
        )
        if (sources != sources[:, -1:]).any():
            exponents = jnp.take_along_axis(exponents, jnp.asarray(sources), axis=0)
        rows = zip(sites, _xla.rows_apart(_row_of, exponents), strict=True)
        found |= {site: row for site, row in rows if site not in without}
    return found


def stacked_rows(array: jax.Array) -> jax.Array | None:
    """The rows of sites that a scan slices, `[length, sites, 15]`, from their array in a `Scales`;
    None where a further one slices them again.
    """
    if array.ndim > 3:
        return None
    return _row_of(jax.lax.stop_gradient(array[..., : len(OPERANDS)]))


def stacked_rows_of_lanes(scales: Sequence[SiteScales]) -> jax.Array | None:
    """The same of sites in lanes; of none, None."""
    if not scales:
        return None
    exponents = [_exponents(node, stacked=1) for node in scales]
    return _row_of(jax.lax.stop_gradient(jnp.stack(exponents, axis=1)))


def _exponents(scales: SiteScales, stacked: int = 0) -> jax.Array:
    """`[..., 3]`, by operand; 0 of those that are no state. Lanes are copies."""
    zero = jnp.zeros_like(scales.seal[(..., *[0] * (scales.seal.ndim - stacked))])
    found = (getattr(scales, name) for name in OPERANDS)
    return jnp.stack(
        [
            zero if leaf is None else leaf[(..., 0)] if leaf.ndim > stacked else leaf
            for leaf in found
        ],
        axis=-1,
    )


_row_of = jax.jit(row_of, inline=True)  # Its trace is cached.
