"""The scales of many sites in one array, apart for the sites that read them, and what they observed together again."""

import functools
import itertools

import jax
import jax.numpy as jnp

from fp8jax.observe.share import merged_beside
from fp8jax.state import Group, SiteScales

_SPAN = 16  # pieces of an array in one stage
_MANY = 64  # arrays that one kernel puts together


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unbind(array: jax.Array, group: Group) -> tuple[SiteScales, ...]:
    """The `SiteScales` of all sites of a group, from the group's array in a `Scales`; what they observed comes back as one array.

    The observations of a batch that shares the array merge by max.

    Args:
      array: float32 `stack + (sites, columns)`.
      group: which sites these are (static).

    >>> from fp8jax import recipes
    >>> group = Group(("down", "up"), recipes.delayed().delayed_casts)
    >>> [node.rhs for node in unbind(jnp.arange(12.0).reshape(2, 6), group)]
    [Array(1., dtype=float32), Array(7., dtype=float32)]
    """
    rows = _rows(array, len(group.sites))
    return tuple(group.node(site, row) for site, row in zip(group.sites, rows, strict=True))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _rows(array: jax.Array, sites: int) -> tuple[jax.Array, ...]:
    if array.ndim > 2 or sites <= _SPAN:
        return _cut(array, sites)
    return jax.lax.platform_dependent(
        array,
        cpu=functools.partial(_rows_on_cpu, sites=sites),
        default=functools.partial(_cut, sites=sites),
    )


def _cut(array, sites):
    return tuple(jax.lax.index_in_dim(array, site, -2, keepdims=False) for site in range(sites))


def _rows_on_cpu(array, sites):
    """`_cut`, in stages.

    XLA's CPU compiler takes 10 ms for the kernel of each piece, but makes only one for all that are alike: such as the
    pieces at the same place of equally long arrays, if these are buffers and not fused away. A conditional's results are
    buffers, so each stage but the last is one.
    """
    lengths, arrays = (sites,), (array,)
    for span in (_SPAN**2, _SPAN):
        parts = [
            [min(span, length - start) for start in range(0, length, span)] for length in lengths
        ]

        def cut(*arrays, parts=parts):
            starts = [[0, *itertools.accumulate(lengths)] for lengths in parts]
            return tuple(
                jax.lax.slice_in_dim(array, start, start + length)
                for array, of_array, lengths in zip(arrays, starts, parts, strict=True)
                for start, length in zip(of_array, lengths)
            )

        def never(*arrays, cut=cut):
            return jax.tree.map(jnp.zeros_like, cut(*arrays))

        # Always true, which XLA can't know.
        arrays = jax.lax.cond(array[0, 0] != -jnp.inf, cut, never, *arrays)
        lengths = [length for of_array in parts for length in of_array]
    return tuple(row for array, length in zip(arrays, lengths) for row in _cut(array, length))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _bind(group: Group, observations, array):
    rows = [jnp.expand_dims(group.row(node), -2) for node in observations]
    while (
        len(rows) > 1
    ):  # In stages, kept apart: a kernel that reads very many arrays takes a compiler long.
        parts = [rows[start : start + _MANY] for start in range(0, len(rows), _MANY)]
        stages = [jnp.concatenate(part, -2) for part in parts]
        rows = jax.lax.optimization_barrier(stages) if len(stages) > 1 else stages
    return merged_beside(rows[0], array)


def _unbind_bwd(group, array, observations):
    anonymous = [node.replace(site="") for node in observations]
    return (_bind(group._replace(sites=()), anonymous, array),)


unbind.defvjp(lambda array, group: (unbind(array, group), array), _unbind_bwd)
