"""The scales of all sites of a function in few arrays, as a pytree node."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax import _xla
from fp8jax._recipe import OPERANDS, CastSpec
from fp8jax._site_scales import SiteScales, casts_from_json, casts_to_json, observes_flushed
from fp8jax._state_dicts import register_state_dict


class Group(NamedTuple):
    """What is static about the sites in one array of `Scales`: they have the same casts, and are
    stacked over scans of the same lengths.

    Args:
      sites: their names, sorted, in the order of the array's last axis but one.
      casts: as of a `SiteScales`.
    """

    sites: tuple[str, ...]
    casts: tuple[CastSpec | None, CastSpec | None, CastSpec | None]

    @property
    def shape(self) -> tuple[int, int]:
        """What its array's ends in."""
        # Filled up to a multiple of 4, so that a rule that divides all arrays may divide this one.
        numbers = len(OPERANDS) * (2 + observes_flushed(self.casts)) + 1
        return len(self.sites), -(-numbers // 4) * 4

    @property
    def key(self) -> str:
        """What its array is called in checkpoints, the same for the same sites alone."""
        digest = hashlib.blake2s("\n".join(self.sites).encode(), digest_size=8).hexdigest()
        return f"{len(self.sites)}-{digest}"

    def node(self, site: Any, numbers: Any) -> SiteScales:
        """The `SiteScales` of one site, or of several stacked ones, from `[..., columns]`: an
        exponent for each operand, a seal for each, the number of uses, and a share flushed for
        each operand, if there are any.
        """
        count = len(OPERANDS)
        operands = {
            name: None if cast is None else numbers[..., column]
            for column, (name, cast) in enumerate(zip(OPERANDS, self.casts, strict=True))
        }
        after = 2 * count + 1
        flushed = numbers[..., after : after + count] if observes_flushed(self.casts) else None
        return SiteScales(
            **operands,
            seal=numbers[..., count : 2 * count],
            uses=numbers[..., 2 * count],
            flushed=flushed,
            site=site,
            casts=self.casts,
        )

    def numbers(self, node: SiteScales) -> jax.Array:
        """The inverse of `node`; 0 for an operand that has no exponent."""
        leaves = (getattr(node, name) for name in OPERANDS)
        zero = jnp.zeros_like(node.seal[..., 0])
        exponents = jnp.stack([zero if leaf is None else leaf for leaf in leaves], axis=-1)
        parts = [exponents, node.seal, node.uses[..., None]]
        parts += [] if node.flushed is None else [node.flushed]
        rest = self.shape[1] - sum(part.shape[-1] for part in parts)
        filling = jnp.zeros_like(exponents[..., :1])
        return jnp.concatenate([*parts, *[filling] * rest], axis=-1)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Scales:
    """The scales of all sites of a function, or what was observed there: by site name,
    `SiteScales`, held in few arrays.

    Read it as a mapping from names: `scales["mlp/up"].lhs`, `scales.items()`, `dict(scales)`. As a
    pytree it has one array for all sites with the same casts that are stacked over scans of the
    same lengths: a thousand sites are one leaf, to a compiler, an optimizer and a checkpoint. The
    key of an array there has a hash of its sites' names: those of another model don't fit it.

    Args:
      arrays: for each group, float32 `stack + (sites, columns)`: of each site the exponents (or
        amaxes) of lhs, rhs and grad, their seals, the number of uses, and the shares flushed to
        zero, where those are observed.
      groups: which sites these are (static).

    >>> from fp8jax import recipes
    >>> casts = recipes.delayed().delayed_casts
    >>> scales = Scales.of(SiteScales.zeros(name, casts) for name in ("up", "down"))
    >>> list(scales), scales["up"].lhs, [leaf.shape for leaf in jax.tree.leaves(scales)]
    (['down', 'up'], Array(0., dtype=float32), [(2, 8)])
    """

    arrays: tuple[Any, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, nodes: Iterable[SiteScales]) -> "Scales":
        """The scales of some sites together.

        Raises:
          ValueError: where a site is there twice.
          TypeError: where one of them is no `SiteScales`.
        """
        kinds: dict[Any, list[SiteScales]] = {}
        nodes = list(nodes)
        for node in nodes:
            if not isinstance(node, SiteScales):
                raise TypeError(
                    f"nodes must be SiteScales; got {node!r} among them. Of a mapping, pass its "
                    "values: Scales.of(nodes.values())."
                )
        nodes = sorted(nodes, key=lambda node: node.site)
        for node, after in zip(nodes, nodes[1:]):
            if node.site == after.site:
                raise ValueError(
                    f"nodes must hold each site once; got site {node.site!r} twice. Give the sites "
                    "of one of them other names (a Flax wrapper's name), or keep both apart."
                )
        for node in nodes:
            kinds.setdefault((node.casts, jnp.shape(node.seal)[:-1]), []).append(node)
        groups = tuple(
            Group(tuple(node.site for node in alike), casts) for (casts, _), alike in kinds.items()
        )
        return cls(tuple(map(together, kinds.values())), groups)

    def tree_flatten_with_keys(self):
        keys = (jax.tree_util.DictKey(group.key) for group in self.groups)
        return tuple(zip(keys, self.arrays, strict=True)), self.groups

    def tree_flatten(self):
        return self.arrays, self.groups

    @classmethod
    def tree_unflatten(cls, groups, arrays):
        return cls(tuple(arrays), groups)

    def __repr__(self) -> str:
        shown = []
        for array, group in zip(self.arrays, self.groups, strict=True):
            if np.ndim(array) < 2:  # what a tree of shapes or of shardings holds
                shown.append(f"{', '.join(group.sites)}: {array!r}")
                continue
            # One by one, elements of a device's array take long.
            array = np.asarray(array) if is_at_hand(array) else array
            shown += map(repr, Scales((array,), (group,)).values())
        return f"Scales({', '.join(shown)})"

    def __len__(self) -> int:
        return sum(len(group.sites) for group in self.groups)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, site: Any) -> bool:
        return any(site in group.sites for group in self.groups)

    def __getitem__(self, site: str) -> SiteScales:
        for array, group in zip(self.arrays, self.groups, strict=True):
            if site in group.sites:
                return _view(array, group, group.sites.index(site))
        raise KeyError(site)

    def __or__(self, others: Any) -> "Scales":
        """These, with other `SiteScales` in the place of some, or beside them; of a mapping by the
        names of sites.
        """
        for name, node in others.items():
            if getattr(node, "site", name) != name:
                raise ValueError(
                    f"others must hold each SiteScales by its site's name; got that of "
                    f"{node.site!r} as {name!r}. Rename it: node.replace(site={name!r})."
                )
        return Scales.of({**self, **others}.values())

    def get(self, site: str, default: Any = None) -> Any:
        """What a site has; `default` where it isn't there."""
        return self[site] if site in self else default

    def keys(self) -> KeysView[str]:
        """The names of the sites."""
        return dict.fromkeys(site for group in self.groups for site in group.sites).keys()

    def values(self) -> ValuesView[SiteScales]:
        """What each site has."""
        return {site: self[site] for site in self}.values()

    def items(self) -> ItemsView[str, SiteScales]:
        """Both."""
        return {site: self[site] for site in self}.items()

    def stacks(self) -> list[SiteScales]:
        """For each group a `SiteScales` that stands for all of its sites, along one more axis of
        its stack: `site` is their names.
        """
        return [
            _checked(array, group, functools.partial(group.node, group.sites))
            for array, group in zip(self.arrays, self.groups, strict=True)
        ]

    def with_stacks(self, nodes: Sequence[SiteScales]) -> "Scales":
        """The same with other numbers, from nodes like those of `stacks`."""
        of_groups = zip(self.arrays, self.groups, nodes, strict=True)
        arrays = (placed_like(group.numbers(node), array) for array, group, node in of_groups)
        return Scales(tuple(arrays), self.groups)


def together(nodes: Sequence[SiteScales]) -> jax.Array:
    """The array of a group, from its sites."""
    # Without their names, which would make each group another case to trace.
    return _together([node.replace(site="") for node in nodes], nodes[0].casts)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _together(nodes: Sequence[SiteScales], casts: tuple) -> jax.Array:
    # Each kind of number first: what reads one alone, as an update does, is then of it alone.
    axis = nodes[0].seal.ndim - 1

    def stacked(*leaves):
        return _xla.joined([jnp.expand_dims(leaf, axis) for leaf in leaves], axis)

    return Group((), casts).numbers(jax.tree.map(stacked, *nodes))


def _view(array: Any, group: Group, index: int) -> SiteScales:
    """What one site of a group has, from the group's array."""

    def node(array):
        if isinstance(array, np.ndarray):
            return group.node(group.sites[index], array[..., index, :])
        # Dynamic, so that where it runs by itself, one program serves all sites.
        numbers = jax.lax.dynamic_index_in_dim(array, index, axis=-2, keepdims=False)
        return group.node(group.sites[index], numbers)

    return _checked(array, group, node)


def _checked(array: Any, group: Group, function: Callable[[Any], SiteScales]) -> SiteScales:
    """`function` of a group's array, or of its shape."""
    check_array(array, group)
    if isinstance(array, np.ndarray):
        return function(array)
    if isinstance(array, jax.Array):
        return function(whole(array))
    return jax.eval_shape(function, jax.ShapeDtypeStruct(array.shape, array.dtype))


def check_array(array: Any, group: Group) -> None:
    """Raises unless an array can be that of a group."""
    shape = getattr(array, "shape", None)
    if shape is None or not hasattr(array, "dtype") or shape[-2:] != group.shape:
        got = type(array).__name__ if shape is None else f"the shape {tuple(shape)}"
        raise ValueError(
            f"arrays of Scales must end in (sites, numbers of each), {group.shape} for the sites "
            f"{', '.join(group.sites[:3])}{', ...' if len(group.sites) > 3 else ''}; got {got}. "
            "Stack scales along their first axis, as variable_axes={'fp8': 0} does, and leave them "
            "in one piece."
        )


register_state_dict(
    Scales,
    children=lambda scales: dict(zip((group.key for group in scales.groups), scales.arrays)),
    replace=lambda scales, **arrays: Scales(tuple(arrays.values()), scales.groups),
)


def _groups_to_bytes(groups: tuple[Group, ...]) -> bytes:
    return json.dumps([[group.sites, *casts_to_json(group.casts)] for group in groups]).encode()


def _groups_from_bytes(data: bytes) -> tuple[Group, ...]:
    return tuple(
        Group(tuple(sites), casts_from_json(casts)) for sites, *casts in json.loads(bytes(data))
    )


jax.export.register_pytree_node_serialization(
    Scales,
    serialized_name="fp8jax.Scales",
    serialize_auxdata=_groups_to_bytes,
    deserialize_auxdata=_groups_from_bytes,
)


def whole(array: jax.Array) -> jax.Array:
    """The array of a group, with each site's numbers in one piece on meshes with explicit axes,
    where they may have been divided as any array's last axes.
    """
    sharding = jax.typeof(array).sharding
    if not any(sharding.spec[-2:]):
        return array
    spec = PartitionSpec(*sharding.spec[:-2], None, None)
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def placed_like(array: jax.Array, other: Any) -> jax.Array:
    """`array`, divided over explicit mesh axes as `other` is."""
    if not isinstance(other, jax.Array) or not any(jax.typeof(other).sharding.spec):
        return array
    return jax.sharding.reshard(array, jax.typeof(other).sharding)


def is_at_hand(leaf: Any) -> bool:
    """Whether the values of a leaf can be read here."""
    return (
        isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        and not isinstance(leaf, Tracer)
        and getattr(leaf, "is_fully_addressable", True)
    )
