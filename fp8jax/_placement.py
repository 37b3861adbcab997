"""Where FP8 state lies in a tree and in a checkpoint; and how it gets from the one to the other
where that differs.

Scales may lie site by site, or all together, and at any path: sites are known by their names. What
an optimizer holds of them is in their order, and so is moved with them.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax._bank import Scales, together
from fp8jax._site_scales import SiteScales
from fp8jax._state import find_site_scales, find_stacks, is_scales, is_site_scales
from fp8jax.optim._rows import rows_of

Path = tuple[str, ...]


def names_of(path: tuple[Any, ...]) -> Path:
    """A path of keys as Orbax writes it, every key a string."""
    return tuple(
        str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))
        for key in path
    )


@dataclasses.dataclass(frozen=True)
class Places:
    """Where in a tree FP8 state lies, and where optimizers do that `with_delayed_scaling` is
    around.
    """

    scales: tuple[Path, ...]
    scalings: tuple[Path, ...]
    optimizers: tuple[Path, ...]

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> "Places":
        """Those that `fp8jax.checkpoint.describe` names."""
        at = [site["at"] for site in description.get("sites", {}).values()]
        found = (at, description.get("scalings", []), description.get("optimizers", []))
        return cls(*(tuple(map(tuple, places)) for places in found))

    def is_fp8(self, path: Path) -> bool:
        """Whether FP8 state lies at a path."""
        return any(path[: len(place)] == place for place in (*self.scales, *self.scalings))

    def plain(self, path: Path) -> Path:
        """The path that a leaf has in an unquantized state."""
        for place in self.optimizers:
            if path[: len(place) + 1] == (*place, "inner"):
                return (*place, *path[len(place) + 1 :])
        return path


class Moved:
    """The FP8 state of a tree, of the same sites, as a checkpoint has it.

    Args:
      like: the tree; its leaves may be types of arrays.
      here: where its FP8 state lies.
      there: where that of the checkpoint does.
      sites: of the checkpoint, the names of sites in their order, and the place of each.
      saved: the paths of its arrays.
    """

    def __init__(
        self,
        like: Any,
        here: Places,
        there: Places,
        sites: Mapping[str, Path],
        saved: Collection[Path],
    ):
        leaves = jax.tree_util.tree_flatten_with_path(like)[0]
        nodes = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_scales)[0]
        self._here = {names_of(path): node for path, node in nodes if is_scales(node)}
        self._there = _as_saved(find_site_scales(list(self._here.values())), sites, saved)
        self._held = {
            path: leaf
            for path, leaf in ((names_of(keys), leaf) for keys, leaf in leaves)
            if any(path[: len(place)] == place for place in here.scalings)
        }
        self._scalings = dict(zip(here.scalings, there.scalings))

    @property
    def is_moved(self) -> bool:
        """Whether the tree has it in another way."""
        here, there = (
            {path: jax.tree.structure(node) for path, node in nodes.items()}
            for nodes in (self._here, self._there)
        )
        return here != there

    def types(self) -> dict[Path, Any]:
        """By path in the checkpoint, what its arrays are, and where they go."""
        first = next(iter(jax.tree.leaves(list(self._here.values()))))
        sharding = getattr(first, "sharding", None)
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        found = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for path, leaf in _by_path(self._there).items()
        }
        return found | {source: self._held[path] for path, (source, _) in self._rows().items()}

    def arrays(self, values: Mapping[Path, Any]) -> dict[Path, Any]:
        """By path in the tree, its arrays, of those of `types`."""
        nodes = [
            jax.tree.unflatten(
                jax.tree.structure(node), [values[one] for one in _by_path({path: node})]
            )
            for path, node in self._there.items()
        ]
        by_site = {
            node.site: node if node.uses is not None else _of_no_use(node)
            for node in find_site_scales(nodes)
        }
        found = {
            path: by_site[node.site]
            if is_site_scales(node)
            else Scales(
                tuple(together([by_site[site] for site in group.sites]) for group in node.groups),
                node.groups,
            )
            for path, node in self._here.items()
        }
        arrays = _by_path(found) | {
            path: jnp.take(jnp.asarray(values[source]), order, axis=-1)
            for path, (source, order) in self._rows().items()
        }
        likes = _by_path(self._here) | self._held
        return {path: _placed(array, likes[path]) for path, array in arrays.items()}

    def _rows(self) -> dict[Path, tuple[Path, np.ndarray]]:
        """By path of what optimizers hold: its path in the checkpoint, and its rows' places."""
        stacks = [
            list(find_stacks(list(nodes.values())).values()) for nodes in (self._here, self._there)
        ]
        ours, theirs = (
            {
                (one.delayed, one.format): (str(at), one.names(nodes))
                for at, one in enumerate(rows_of(nodes))
            }
            for nodes in stacks
        )
        members = {at: (theirs[kind], names) for kind, (at, names) in ours.items()}
        found = {}
        for path, leaf in self._held.items():
            place = next(place for place in self._scalings if path[: len(place)] == place)
            tail = path[len(place) :]
            before, rest = (tail[:1], tail[1:]) if tail[0] == "operands" else ((), tail)
            (at, saved), names = members.get(rest[0], (("", ()), ()))
            if leaf.shape[-1] != len(names):
                raise ValueError(
                    "a state of delayed scaling must be of all scales in `like`, where the "
                    f"checkpoint has scales elsewhere or in another form; got {leaf.shape[-1]} of "
                    f"{len(names)} rows at {'/'.join(path)}. Pass a `like` with scales as they "
                    "were saved, or fresh_scales=True to keep those that `like` has."
                )
            position = {name: row for row, name in enumerate(saved)}
            order = np.array([position[name] for name in names], np.int32)
            found[path] = (*self._scalings[place], *before, at, *rest[1:]), order
        return found


def _as_saved(
    nodes: Sequence[SiteScales], sites: Mapping[str, Path], saved: Collection[Path]
) -> dict[Path, Any]:
    """By path in a checkpoint, its scales, as types of arrays."""
    own = {node.site: node for node in nodes}
    of_places: dict[Path, list[SiteScales]] = {}
    for site, place in sites.items():
        node = jax.eval_shape(lambda own=own[site]: jax.tree.map(jnp.zeros_like, own))
        of_places.setdefault(place, []).append(node)
    return {
        place: _without_uses(of_place[0], (*place, "uses") in saved)
        if (*place, "seal") in saved
        else jax.eval_shape(lambda nodes=of_place: Scales.of(nodes))
        for place, of_place in of_places.items()
    }


def _without_uses(node: SiteScales, are_saved: bool) -> SiteScales:
    """As scales of one site were before they had that number."""
    return node if are_saved else node.replace(uses=None)


def _of_no_use(node: SiteScales) -> SiteScales:
    return node.replace(uses=jnp.zeros_like(node.seal[..., 0]))


def _by_path(nodes: Mapping[Path, Any]) -> dict[Path, Any]:
    return {
        (*place, *names_of(path)): leaf
        for place, node in nodes.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(node)[0]
    }


def _placed(array: jax.Array, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.asarray(array)
    sharding = getattr(like, "sharding", None)
    return array if sharding is None else jax.device_put(array, sharding)
