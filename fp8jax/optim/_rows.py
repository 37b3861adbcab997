"""Operands in rows: the leaves of any number of `SiteScales` as a few long vectors, and back.

All elements of all operand leaves that follow the same rule into the same format form one vector, a
row each. So the cost of a step's arithmetic is that of a few fused operations, however many sites
there are.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

from fp8jax import _xla
from fp8jax._formats import Format
from fp8jax._recipe import OPERANDS, DelayedScaling
from fp8jax._site_scales import SiteScales


@dataclasses.dataclass(frozen=True)
class Rows:
    """The operands that share a rule and a format.

    Args:
      delayed: the rule.
      format: the format.
      members: per operand leaf, the position of its node among all nodes, and the operand's name.
      shapes: of these leaves.
      seals: for each row, where its seal is among the elements of all nodes' seals, and its share
        among those flushed.
    """

    delayed: DelayedScaling
    format: Format
    members: tuple[tuple[int, str], ...]
    shapes: tuple[tuple[int, ...], ...]
    seals: np.ndarray

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.seals)

    @property
    def grouped(self) -> bool:
        """Whether some seal has several rows, the amaxes of an operand's groups."""
        return len(np.unique(self.seals)) < self.count

    def leaves(self, nodes: Sequence[SiteScales]) -> list[jax.Array]:
        """These operands' leaves of `nodes`."""
        return [getattr(nodes[position], operand) for position, operand in self.members]

    def names(self, nodes: Sequence[SiteScales]) -> list[str]:
        """For each row "site/operand", with the indices into the leaf where that has any:
        "mlp/lhs[3]".
        """
        names = []
        for (position, operand), shape in zip(self.members, self.shapes, strict=True):
            for index in np.ndindex(shape):
                site = nodes[position].site
                if isinstance(site, tuple):  # of several sites, along the last axis
                    *index, which = index
                    site = site[which]
                at = f"[{','.join(map(str, index))}]" if index else ""
                names.append(f"{site}/{operand}{at}")
        return names


def rows_of(nodes: Sequence[SiteScales]) -> tuple[Rows, ...]:
    """The rows of `nodes` by rule and format, in the order in which these first appear. Reads
    shapes alone.
    """
    found = {}
    seals_before = 0
    for position, node in enumerate(nodes):
        stack = math.prod(node.seal.shape[:-1]) if any(node.casts) else 0
        for column, (operand, cast) in enumerate(zip(OPERANDS, node.casts, strict=True)):
            if cast is None:
                continue
            shape = tuple(getattr(node, operand).shape)
            of_stack = (
                seals_before + len(OPERANDS) * np.arange(stack, dtype=np.int32) + np.int32(column)
            )
            group = found.setdefault((cast.delayed, cast.format), ([], [], []))
            group[0].append((position, operand))
            group[1].append(shape)
            group[2].append(np.repeat(of_stack, math.prod(shape[node.seal.ndim - 1 :])))
        seals_before += len(OPERANDS) * stack
    return tuple(
        Rows(delayed, fmt, tuple(members), tuple(shapes), np.concatenate(seals))
        for (delayed, fmt), (members, shapes, seals) in found.items()
    )


def join(leaves: Sequence[jax.Array]) -> jax.Array:
    """All elements of `leaves`, which are one or more arrays of one dtype, as one vector."""
    flat = [
        leaf if leaf.ndim == 1 else lax.reshape(leaf, (math.prod(leaf.shape),)) for leaf in leaves
    ]
    return _xla.joined(flat, 0)


def split(vector: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The inverse of `join`.

    Args:
      vector: float32, finite, as long as `shapes` have elements.
      shapes: of the pieces, in order.

    >>> split(join([np.float32([1]), np.float32([[2, 3]])]), [(1,), (1, 2)])
    [Array([1.], dtype=float32), Array([[2., 3.]], dtype=float32)]
    """
    pieces = lax.split(vector, [math.prod(shape) for shape in shapes])
    return [lax.reshape(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]
