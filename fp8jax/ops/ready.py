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
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import _xla, shims
from fp8jax.ops.cast import ReadyScale, row_of
from fp8jax.recipe import OPERANDS
from fp8jax.state import SiteScales

_SITES = 16  # in a kernel: one that writes very many arrays takes a compiler long


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
      rows: float32 `[15]`, see `fp8jax.ops.cast.row_of`; or `[sites, 15]`, of which `index` says
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


def made_ready(scales: dict[str, SiteScales]) -> dict[str, Ready]:
    """Scales of sites, none of them stacked, with their rows.

    >>> lhs, seal = jnp.float32(3), jnp.zeros(3)
    >>> scales = {name: SiteScales(lhs, None, None, seal, None, name, ()) for name in ("a", "b")}
    >>> ready = made_ready(scales)["b"].of_operand("lhs")
    >>> ready.scale, ready.inverse
    (Array(8., dtype=float32), Array(0.125, dtype=float32))
    """
    found = {}
    for group in groups_by_axes(scales):
        names = list(group)
        for start in range(0, len(names), _SITES):
            some = names[start : start + _SITES]
            # Within a derivative, rows are no part of it: observations leave by the scales.
            exponents = jax.lax.stop_gradient([_exponents(group[name]) for name in some])
            rows = _xla.rows_apart(_row_of, exponents)
            found |= {name: Ready.of(group[name], row) for name, row in zip(some, rows)}
    return found


def stacked_rows(scales: dict[str, SiteScales]) -> jax.Array | None:
    """The rows of sites that a scan slices, `[length, sites, 15]`; of none, None."""
    if not scales:
        return None
    exponents = [_exponents(node, stacked=1) for node in scales.values()]
    return _row_of(jax.lax.stop_gradient(jnp.stack(exponents, axis=1)))


def groups_by_axes(scales: dict[str, SiteScales]) -> list[dict[str, SiteScales]]:
    """`scales` in groups that can be one array each: they vary over the same mesh axes."""
    groups = {}
    for name, node in scales.items():
        groups.setdefault(shims.varying_axes(node.seal), {})[name] = node
    return list(groups.values())


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
