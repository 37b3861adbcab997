"""The state of delayed scaling: per site, the exponents of the scales of its operands, as pytree nodes.

`SiteScales` is what one site has; `Scales` holds those of all sites of a function in one array, or a few.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from fp8jax.recipe import OPERANDS, CastSpec
from fp8jax.scaling import scale_from_exponent
from fp8jax.state_dicts import register_state_dict

# The leaves of a `SiteScales` that have an element for each operand.
OF_ALL = ("seal", "flushed")
LEAVES = (*OPERANDS, *OF_ALL)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SiteScales:
    """The scales of one site whose operands have delayed scaling; or, as their cotangent, what was observed there.

    As state, `lhs`, `rhs` and `grad` hold the base-2 exponents `e` of the scales `2**e`: integers in float32, of the
    shape of the operand's groups (`()` per tensor), behind the lengths of the scans that the site's weights are
    stacked over. `seal` and `flushed` are zero. An operand without delayed scaling is None.

    As cotangent (of the gradient that `jax.grad` returns, and of `Fp8Function.observe`), the same leaves hold amaxes,
    float32, 0 where nothing was seen; `seal[..., i]` the seal of operand i's amax (see `fp8jax.observe`), and
    `flushed[..., i]` the largest share of operand i in any use that its cast turned into zeros.

    Exponents and not scales, because then `old + (new - old) == new` always holds, and any optimizer's plain addition
    moves a scale exactly.

    Args:
      lhs, rhs, grad: float32 arrays, or None.
      seal: float32, `stack + (3,)`, or None where all three are.
      flushed: float32, `stack + (3,)`, or None where no operand's `DelayedScaling` has `flushed=True`.
      site: name of the site (static); a tuple of names where it stands for several sites, along the last axis of its operands' leaves.
      casts: for lhs, rhs and grad its `CastSpec`, or None where its scaling is not delayed (static).
    """

    lhs: Any
    rhs: Any
    grad: Any
    seal: Any
    flushed: Any
    site: Any
    casts: tuple[CastSpec | None, CastSpec | None, CastSpec | None]

    @classmethod
    def zeros(cls, site: str, casts: tuple, stack: tuple[int, ...] = ()) -> "SiteScales":
        """Scales of 1 (exponents of 0), or no observation, in buffers of their own.

        >>> from fp8jax import recipes
        >>> SiteScales.zeros("mlp/up", recipes.delayed().delayed_casts, (2,)).lhs
        Array([0., 0.], dtype=float32)
        """
        leaves = (None if cast is None else jnp.zeros(stack, jnp.float32) for cast in casts)
        seal = jnp.zeros((*stack, len(OPERANDS)), jnp.float32)
        return cls(
            *leaves, seal, jnp.zeros_like(seal) if observes_flushed(casts) else None, site, casts
        )

    def __repr__(self) -> str:
        leaves = (
            f"{name}={getattr(self, name)}" for name in LEAVES if getattr(self, name) is not None
        )
        return f"SiteScales({self.site!r}, {', '.join(leaves)})"

    def tree_flatten_with_keys(self):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in LEAVES)
        return children, (self.site, self.casts)

    def tree_flatten(self):
        return tuple(getattr(self, name) for name in LEAVES), (self.site, self.casts)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    def scales(self) -> dict[str, Any]:
        """The scales themselves, `2**exponent`, float32, by operand; without those that are not state."""
        exponents = {name: getattr(self, name) for name in OPERANDS}
        return {
            name: scale_from_exponent(value)
            for name, value in exponents.items()
            if value is not None
        }

    def replace(self, **changes) -> "SiteScales":
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)


register_state_dict(SiteScales, *LEAVES)


def _cast_to_json(cast: CastSpec | None) -> str | None:
    return None if cast is None else cast.to_json()


def _cast_from_json(cast: str | None) -> CastSpec | None:
    return None if cast is None else CastSpec.from_json(cast)


def _static_to_bytes(static: tuple) -> bytes:
    site, casts = static
    return json.dumps([site, *map(_cast_to_json, casts)]).encode()


def _static_from_bytes(data: bytes) -> tuple:
    site, *casts = json.loads(bytes(data))
    return site, tuple(map(_cast_from_json, casts))


# So that `jax.export` can write functions that take scales or return observations, and read them.
jax.export.register_pytree_node_serialization(
    SiteScales,
    serialized_name="fp8jax.SiteScales",
    serialize_auxdata=_static_to_bytes,
    deserialize_auxdata=_static_from_bytes,
)


class Group(NamedTuple):
    """What is static about the sites in one array of `Scales`: they have the same casts, and are stacked over scans of the same lengths.

    Args:
      sites: their names, sorted, in the order of the array's last axis but one.
      casts: as of a `SiteScales`.
    """

    sites: tuple[str, ...]
    casts: tuple[CastSpec | None, CastSpec | None, CastSpec | None]

    @property
    def columns(self) -> int:
        """How many numbers a site has: an exponent for each operand, a seal for each, and a flushed share for each, if there are any."""
        return len(OPERANDS) * (2 + observes_flushed(self.casts))

    def node(self, site: Any, row: Any) -> SiteScales:
        """The `SiteScales` of one site, or of several stacked ones, from their numbers: `[..., columns]`."""
        operands = {
            name: None if cast is None else row[..., column]
            for column, (name, cast) in enumerate(zip(OPERANDS, self.casts, strict=True))
        }
        flushed = row[..., 6:] if observes_flushed(self.casts) else None
        return SiteScales(
            **operands, seal=row[..., 3:6], flushed=flushed, site=site, casts=self.casts
        )

    def row(self, node: SiteScales) -> jax.Array:
        """The numbers of a `SiteScales`, 0 for an operand that has none."""
        none = None if all(self.casts) else jnp.zeros_like(node.seal[..., 0])
        leaves = [getattr(node, name) for name in OPERANDS]
        exponents = jnp.stack([none if leaf is None else leaf for leaf in leaves], axis=-1)
        parts = [exponents, node.seal, node.flushed]
        return jnp.concatenate([part for part in parts if part is not None], axis=-1)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Scales:
    """The scales of all sites of a function, or what was observed there: by site name, `SiteScales`, held in few arrays.

    Read it like a dict of names: `scales["mlp/up"].lhs`, `scales.items()`. As a pytree it has one array for all sites with the same casts
    that are stacked over scans of the same lengths: a thousand sites are one leaf, to a compiler, to an optimizer and in a checkpoint.

    Args:
      arrays: for each group, float32 `stack + (sites, columns)`: of each site the exponents (or amaxes) of lhs, rhs and grad,
        their seals, and the shares flushed to zero, where those are observed.
      groups: which sites these are (static).

    >>> from fp8jax import recipes
    >>> casts = recipes.delayed().delayed_casts
    >>> scales = Scales.of(SiteScales.zeros(name, casts) for name in ("up", "down"))
    >>> list(scales), scales["up"].lhs, [leaf.shape for leaf in jax.tree.leaves(scales)]
    (['down', 'up'], Array(0., dtype=float32), [(2, 6)])
    """

    arrays: tuple[Any, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, nodes: Iterable[SiteScales]) -> "Scales":
        """The scales of some sites together."""
        groups: dict[Any, list[SiteScales]] = {}
        for node in sorted(nodes, key=lambda node: node.site):
            groups.setdefault((node.casts, jnp.shape(node.seal)[:-1]), []).append(node)
        found = tuple(
            Group(tuple(node.site for node in nodes), casts) for (casts, _), nodes in groups.items()
        )
        anonymous = [[node.replace(site="") for node in nodes] for nodes in groups.values()]
        return cls(
            tuple(
                _together(Group((), group.casts), nodes) for group, nodes in zip(found, anonymous)
            ),
            found,
        )

    def tree_flatten_with_keys(self):
        keys = (jax.tree_util.SequenceKey(index) for index in range(len(self.arrays)))
        return tuple(zip(keys, self.arrays)), self.groups

    def tree_flatten(self):
        return self.arrays, self.groups

    @classmethod
    def tree_unflatten(cls, groups, arrays):
        return cls(tuple(arrays), groups)

    def __repr__(self) -> str:
        return f"Scales({', '.join(map(repr, self))})"

    def __len__(self) -> int:
        return sum(len(group.sites) for group in self.groups)

    def __iter__(self) -> Iterator[str]:
        return iter([site for group in self.groups for site in group.sites])

    def __contains__(self, site: Any) -> bool:
        return any(site in group.sites for group in self.groups)

    def __getitem__(self, site: str) -> SiteScales:
        for array, group in zip(self.arrays, self.groups, strict=True):
            if site in group.sites:
                return _view(array, group, group.sites.index(site))
        raise KeyError(site)

    def __or__(self, others: Mapping[str, SiteScales]) -> "Scales":
        """These, with other `SiteScales` in the place of some, or beside them."""
        return Scales.of((dict(self) | dict(others)).values())

    def keys(self) -> list[str]:
        """The names of the sites."""
        return list(self)

    def values(self) -> list[SiteScales]:
        """What each site has."""
        return [node for _, node in self.items()]

    def items(self) -> list[tuple[str, SiteScales]]:
        """Both."""
        return [
            (site, _view(array, group, index))
            for array, group in zip(self.arrays, self.groups, strict=True)
            for index, site in enumerate(group.sites)
        ]

    def stacks(self) -> list[SiteScales]:
        """For each group a `SiteScales` that stands for all of its sites, along one more axis of its stack: `site` is their names."""
        return [
            _shape_or_array(functools.partial(group.node, group.sites), array)
            for array, group in zip(self.arrays, self.groups, strict=True)
        ]

    def with_stacks(self, nodes: Sequence[SiteScales]) -> "Scales":
        """The same with other numbers, from nodes like those of `stacks`."""
        arrays = (group.row(node) for group, node in zip(self.groups, nodes, strict=True))
        return Scales(tuple(arrays), self.groups)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _together(group: Group, nodes: Sequence[SiteScales]) -> jax.Array:
    return jnp.stack([group.row(node) for node in nodes], axis=-2)


def _view(array: Any, group: Group, index: int) -> SiteScales:
    """What one site of a group has, from the group's array."""

    def node(array):
        if isinstance(array, np.ndarray):
            return group.node(group.sites[index], array[..., index, :])
        # Dynamic, so that where it runs by itself, one program serves all sites.
        row = jax.lax.dynamic_index_in_dim(array, index, axis=-2, keepdims=False)
        return group.node(group.sites[index], row)

    return _shape_or_array(node, array)


def _shape_or_array(function: Callable[[Any], SiteScales], array: Any) -> SiteScales:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.eval_shape(function, jax.ShapeDtypeStruct(array.shape, array.dtype))
    return function(array)


register_state_dict(
    Scales,
    children=lambda scales: {str(index): array for index, array in enumerate(scales.arrays)},
    replace=lambda scales, **arrays: Scales(tuple(arrays.values()), scales.groups),
)


def _groups_to_bytes(groups: tuple[Group, ...]) -> bytes:
    return json.dumps(
        [[group.sites, *map(_cast_to_json, group.casts)] for group in groups]
    ).encode()


def _groups_from_bytes(data: bytes) -> tuple[Group, ...]:
    return tuple(
        Group(tuple(sites), tuple(map(_cast_from_json, casts)))
        for sites, *casts in json.loads(bytes(data))
    )


jax.export.register_pytree_node_serialization(
    Scales,
    serialized_name="fp8jax.Scales",
    serialize_auxdata=_groups_to_bytes,
    deserialize_auxdata=_groups_from_bytes,
)


def observes_flushed(casts: tuple[CastSpec | None, ...]) -> bool:
    """Whether any of these casts of a site observes what it flushes to zero."""
    return any(cast is not None and cast.delayed.flushed for cast in casts)


def is_site_scales(node: Any) -> bool:
    """Whether `node` is a `SiteScales`; for `is_leaf`."""
    return isinstance(node, SiteScales)


def is_scales(node: Any) -> bool:
    """Whether `node` is a `SiteScales` or a `Scales`; for `is_leaf`."""
    return isinstance(node, (SiteScales, Scales))


def find_site_scales(tree: Any) -> list[SiteScales]:
    """All `SiteScales` in `tree`, wherever they sit, those in a `Scales` too, in the order of flattening.

    >>> find_site_scales({"params": 1.0, "fp8": {"mlp": SiteScales(0.0, 0.0, 0.0, 0.0, None, "mlp", ())}})[0].site
    'mlp'
    """
    nodes = [node for node in jax.tree.leaves(tree, is_leaf=is_scales) if is_scales(node)]
    return [one for node in nodes for one in ([node] if is_site_scales(node) else node.values())]


def map_site_scales(function, tree: Any, *rest: Any, other=lambda leaf, *rest: leaf) -> Any:
    """`tree` with `function(node, *rest_nodes)` in the place of each `SiteScales` and `other(leaf, ...)` elsewhere.

    In a `Scales` it must return a `SiteScales` of the same site.
    """

    def visit(node, *others):
        if isinstance(node, Scales):
            return Scales.of(map(function, node.values(), *(one.values() for one in others)))
        return (function if is_site_scales(node) else other)(node, *others)

    return jax.tree.map(visit, tree, *rest, is_leaf=is_scales)


def find_stacks(tree: Any) -> dict[str, SiteScales]:
    """All that `tree` has of scales by path, in the order of flattening: each `SiteScales`, and the stacks of each `Scales`."""
    found = {}
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_scales)[0]:
        if is_site_scales(node):
            found[jax.tree_util.keystr(path)] = node
        elif is_scales(node):
            for index, stack in enumerate(node.stacks()):
                found[f"{jax.tree_util.keystr(path)}[{index}]"] = stack
    return found


def with_stacks(tree: Any, nodes: Iterable[SiteScales], *rest: Any, other=lambda leaf: leaf) -> Any:
    """`tree` with `nodes`, which are like those of `find_stacks`, in their places; `other(leaf, ...)` elsewhere."""
    nodes = iter(nodes)

    def visit(node, *others):
        if isinstance(node, Scales):
            return node.with_stacks([next(nodes) for _ in node.groups])
        return next(nodes) if is_site_scales(node) else other(node, *others)

    return jax.tree.map(visit, tree, *rest, is_leaf=is_scales)


def migrate_scales(old: Any, new: Any) -> Any:
    """`new`, with the exponents of `old` at every site that both have: for a model that grew or was renamed in part.

    Args:
      old: any tree that holds the `SiteScales` to carry over.
      new: scales of the model as it is now, from its `init`; a tree like it comes back.

    Returns:
      `new` with the old exponents at the sites of the same name, casts and shapes; the others stay as `init` made them.

    Raises:
      ValueError: where no site matches.

    >>> from fp8jax import recipes
    >>> casts = recipes.delayed().delayed_casts
    >>> old = {"a": SiteScales.zeros("a", casts).replace(lhs=jnp.float32(-3))}
    >>> new = {"a": SiteScales.zeros("a", casts), "b": SiteScales.zeros("b", casts)}
    >>> migrate_scales(old, new)["a"].lhs
    Array(-3., dtype=float32)
    """
    found = {node.site: node for node in find_site_scales(old)}

    def matches(node: SiteScales) -> bool:
        match = found.get(node.site)
        return match is not None and match.casts == node.casts and _shapes(match) == _shapes(node)

    if not any(matches(node) for node in find_site_scales(new)):
        raise ValueError(
            f"old must share a site of the same name, casts and shapes with new; got the sites {sorted(found)} "
            f"and {sorted(node.site for node in find_site_scales(new))}. Use new as it is."
        )
    return map_site_scales(lambda node: found[node.site] if matches(node) else node, new)


def _shapes(node: SiteScales) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(node)]
