"""Checkpoints by Orbax: the state of training, and beside it a description of its FP8 state that a
restore is held against.

A step of an `orbax.checkpoint.CheckpointManager` gets two items. "state" is the tree as it is,
which Orbax alone can read too. "fp8" is JSON: the version of the description, each site with the
casts and shapes of its scales, and where in the tree FP8 state lies. `restore` reads it first, so
that a state of another recipe or model is refused with a list of what differs, and so that states
go from unquantized models to FP8 ones and back.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fp8jax._formats import Format
from fp8jax._placement import Moved, Path, Places, names_of
from fp8jax._recipe import Recipe
from fp8jax._state import is_scales, is_site_scales
from fp8jax._transform import Explanation
from fp8jax.optim import ScalingState, WithDelayedScalingState

VERSION = 1
_SHOWN = 8  # differences in an error's text


def describe(state: Any, explanation: Explanation | None = None) -> dict[str, Any]:
    """The FP8 state in a tree, as data for JSON.

    Args:
      state: pytree; `Scales`, `SiteScales` and the states of `delayed_scaling` and
        `with_delayed_scaling` are found wherever they sit.
      explanation: what `explain` returned, to have the whole recipe of each selected site
        described, the casts without delayed scaling and the execution included.

    Returns:
      A dict: "version"; "sites", by name the casts and shapes of the scales; "recipes", by site,
      where there is an explanation; and the places ("scalings", "optimizers") of states of the
      optimizer.

    Raises:
      ValueError: where a site is in `state` twice.

    >>> from fp8jax import SiteScales, recipes
    >>> scales = {"dot": SiteScales.zeros("dot", recipes.delayed().delayed_casts)}
    >>> describe({"scales": scales})["sites"]["dot"]["lhs"]["cast"]["format"]
    'E4M3'
    """
    description: dict[str, Any] = {
        "version": VERSION,
        "sites": {},
        "scalings": [],
        "optimizers": [],
    }
    sites = description["sites"]
    for keys, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_fp8_node)[0]:
        at = list(names_of(keys))
        if isinstance(node, ScalingState):
            description["scalings"].append(at)
        elif isinstance(node, WithDelayedScalingState):
            description["optimizers"].append(at)
            description["scalings"] += [[*at, part] for part in ("scaling", "pending")]
        elif is_scales(node):
            for site, described in _described(node):
                if site in sites:
                    raise ValueError(
                        f"state must hold each site once; got site {site!r} at "
                        f"{_text(sites[site]['at'])} and at "
                        f"{_text(at)}. Save the states of several functions as checkpoints of "
                        "their own."
                    )
                sites[site] = {"at": at} | described
    if explanation is not None:
        description["recipes"] = {
            site.name: _data(site.recipe) for site in explanation.sites if site.selected
        }
    return description


def _described(node: Any):
    """For each site of a `SiteScales` or `Scales` its name, and the casts and shapes of its
    operands.
    """
    for one in [node] if is_site_scales(node) else node.stacks():
        several = isinstance(one.site, tuple)
        stack = list(np.shape(one.seal)[: -2 if several else -1])
        casts = {name: _data(cast) for name, cast in one.casts_by_operand().items()}
        described = {name: {"cast": cast, "shape": stack} for name, cast in casts.items()}
        yield from ((site, described) for site in (one.site if several else (one.site,)))


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    *,
    explanation: Explanation | None = None,
    others: Mapping[str, ocp.args.CheckpointArgs] | None = None,
) -> bool:
    """Saves a state and its description as one step of a manager.

    Orbax writes into a folder of another name and renames it when all is there: a process that is
    killed leaves the steps before whole, and the manager's `latest_step` is one of those. It copies
    the arrays before this returns, so the next training step may be given (donated) their buffers;
    they reach the disk later, unless the manager is synchronous. Call
    `manager.wait_until_finished()` at the end.

    Args:
      manager: the manager; its options say how many steps it keeps, and how often it saves.
      step: number of the step.
      state: pytree of arrays; sharded ones are written by the processes that hold them.
      explanation: of the function trained, for `restore` to compare whole recipes.
      others: further items by name, as `ocp.args.JsonSave(...)`.

    Returns:
      Whether the manager saved it.
    """
    return manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            fp8=ocp.args.JsonSave(describe(state, explanation)),
            **(others or {}),
        ),
    )


def restore(
    manager: ocp.CheckpointManager,
    like: Any,
    step: int | None = None,
    *,
    explanation: Explanation | None = None,
    fresh_scales: bool = False,
    item: str = "state",
) -> Any:
    """A state from a checkpoint, on the devices and with the shardings of `like`.

    Args:
      manager: the manager.
      like: a state of the same structure, shapes and dtypes, as a new training would begin with:
        arrays, or `jax.ShapeDtypeStruct`s (without a sharding, for the first device). On another
        mesh than the one it was saved from, the arrays are divided anew. Without FP8 state in it,
        the state of an FP8 model goes into the unquantized one. Scales may be at other places, and
        in another form, than they were saved: as `SiteScales` or as `Scales`. They are found by
        their sites' names, and the amaxes that the optimizer holds follow them.
      step: number of the step; by default the latest.
      explanation: of the function that goes on, to hold against that of `save`, where it was given
        one.
      fresh_scales: keep the FP8 state of `like` (its scales, and what the optimizer holds of them)
        whatever the checkpoint has of it: to go on from an unquantized checkpoint, or with another
        recipe. The rest comes from the checkpoint.
      item: name of the state's item in the checkpoint, for one that was not written by `save`.

    Returns:
      A tree like `like`.

    Raises:
      FileNotFoundError: where there is no such step, or item.
      ValueError: where state, sites or recipes differ; the text lists how. Nothing is read into
        `like`.
    """
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise FileNotFoundError(
            f"step must be one that was saved in {manager.directory}; got {step}, and there are "
            f"{list(manager.all_steps())}. Save one before, or start anew."
        )
    where = f"step {step} of {manager.directory}"
    folder = next(
        path
        for path in ocp.path.step.checkpoint_steps_paths(manager.directory)
        if ocp.path.step.step_from_checkpoint_name(path.name) == step
    )
    items = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if item not in items:
        raise FileNotFoundError(
            f"item must be one of {where}; got {item!r}, and there are {items}. Pass the name of "
            "the state's."
        )
    written = _description(folder / "fp8", where) if "fp8" in items else {}
    if not fresh_scales:
        _check_description(written, describe(like, explanation), where)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return _restored(reader, folder / item, like, written, fresh_scales, where)


def _restored(
    reader: ocp.Checkpointer, folder: Any, like: Any, written: dict, fresh_scales: bool, where: str
) -> Any:
    metadata: Any = reader.metadata(folder).item_metadata
    tree = metadata.tree
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    own = {names_of(path): leaf for path, leaf in leaves}
    here, there, saved = Places.of(describe(like)), Places.of(written), _arrays(tree)
    moved = None if fresh_scales else _moved(like, here, there, written, saved, where)
    leaves = own
    if moved is not None:  # What is FP8 state is then read as it is there.
        others = {path: leaf for path, leaf in own.items() if not here.is_fp8(path)}
        leaves = others | moved.types()
        here = dataclasses.replace(there, optimizers=here.optimizers)
    sources = _sources(leaves, here, saved, there, fresh_scales, where)
    asked = {source: leaves[path] for path, source in sources.items()}
    shaped = jax.tree_util.tree_map_with_path(
        lambda path, leaf: asked.get(names_of(path), ocp.PLACEHOLDER) if _is_array(leaf) else leaf,
        tree,
        is_leaf=_is_array,
    )
    restored = reader.restore(
        folder, args=ocp.args.PyTreeRestore(shaped, jax.tree.map(_restore_arguments, shaped))
    )
    values = {
        names_of(path): value for path, value in jax.tree_util.tree_flatten_with_path(restored)[0]
    }
    # What a key's numbers are for is not in the metadata that were compared, but comes with them.
    kinds = {
        path: (values[source].dtype, leaves[path].dtype)
        for path, source in sources.items()
        if _is_array(leaves[path])
    }
    _raise_problems(
        [
            f"{_text(path)}: {got} in the checkpoint, not {want}"
            for path, (got, want) in kinds.items()
            if got != want
        ],
        where,
    )
    found = {path: values[source] for path, source in sources.items()}
    if moved is not None:
        found |= moved.arrays(found)
    return structure.unflatten([found.get(path, leaf) for path, leaf in own.items()])


def _moved(
    like: Any, here: Places, there: Places, written: dict, saved: dict[Path, Any], where: str
) -> Moved | None:
    """The FP8 state of a checkpoint that has it elsewhere, or in another form."""
    sites = {site: tuple(described["at"]) for site, described in written.get("sites", {}).items()}
    if not sites or not here.scales:
        return None
    moved = Moved(like, here, there, sites, saved)
    if not moved.is_moved:
        return None
    if len(here.scalings) != len(there.scalings):
        raise ValueError(
            f"the states of delayed scaling in {where} must be as many as in `like`; got "
            f"{len(there.scalings)}, not {len(here.scalings)}. Pass a `like` of the optimizer that "
            "it was saved from, or fresh_scales=True to keep the scales that `like` has."
        )
    return moved


def _data(value: Any) -> Any:
    """Frozen dataclasses of the library as JSON data, with the name of their type where several fit
    a place.
    """
    if isinstance(value, Format):
        return value.name
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: _data(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return (
            {"kind": type(value).__name__} | fields
            if type(value).__module__ != Recipe.__module__
            else fields
        )
    return [_data(item) for item in value] if isinstance(value, tuple) else value


def _text(path: Path | list[str]) -> str:
    return "/".join(path) or "the root"


def _is_fp8_node(node: Any) -> bool:
    return is_scales(node) or isinstance(node, (ScalingState, WithDelayedScalingState))


def _description(folder: Any, where: str) -> dict[str, Any]:
    """What `describe` said of a step."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        written = reader.restore(folder, args=ocp.args.JsonRestore())
    if written.get("version") != VERSION:
        raise ValueError(
            f"the description of FP8 state must be of version {VERSION}; got "
            f"{written.get('version')!r} in {where}. "
            "Read it with the version of fp8jax that wrote it."
        )
    return written


def _check_description(written: dict, expected: dict, where: str) -> None:
    """Raises unless the FP8 state of a checkpoint is of the sites and casts that the state has it
    is to go into.
    """
    if expected["sites"] and not written.get("sites"):
        raise ValueError(
            f"the checkpoint must hold the FP8 state of {len(expected['sites'])} site(s); got none "
            f"in {where}. Pass "
            "fresh_scales=True to go on from an unquantized model, with the scales that `like` has "
            "from its init."
        )
    differences = []
    for part in ("sites", "recipes"):
        if written.get(part) and expected.get(
            part
        ):  # An unquantized model leaves the FP8 state where it is.
            got, want = (
                {name: _without_place(value) for name, value in of[part].items()}
                for of in (written, expected)
            )
            differences += [f"site {name!r}: {text}" for name, text in _differences(got, want)]
    if differences:
        raise ValueError(
            f"the FP8 state in {where} must be that of the model it is restored into; "
            f"{len(differences)} difference(s), checkpoint "
            f"first:\n{_listed(differences)}\nRestore into a model of that recipe and these rules, "
            "or pass fresh_scales=True to keep the "
            "scales that `like` has."
        )


def _without_place(site: dict) -> dict:
    return {name: value for name, value in site.items() if name != "at"}


def _differences(got: dict, want: dict):
    """For each name what differs below it: (name, "lhs.cast.format is 'E4M3', not 'E5M2'")."""
    for name in sorted(got.keys() | want.keys()):
        if name not in want or name not in got:
            yield name, "only in the checkpoint" if name in got else "not in the checkpoint"
        else:
            for path, a, b in _unequal(got[name], want[name]):
                yield name, f"{'.'.join(path)} is {a!r}, not {b!r}"


def _unequal(a: Any, b: Any, path: Path = ()):
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from _unequal(a.get(name), b.get(name), (*path, name))
    elif a != b:
        yield path, a, b


def _listed(lines: list[str]) -> str:
    more = len(lines) - _SHOWN
    return "\n".join(f"  {line}" for line in lines[:_SHOWN]) + (
        f"\n  and {more} more" if more > 0 else ""
    )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _arrays(tree: Any) -> dict[Path, Any]:
    """What a checkpoint's metadata tell of its arrays, by path."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_array)[0]
    return {names_of(path): leaf for path, leaf in found if _is_array(leaf)}


def _sources(
    leaves: dict[Path, Any],
    ours: Places,
    saved: dict[Path, Any],
    theirs: Places,
    fresh_scales: bool,
    where: str,
) -> dict[Path, Path]:
    """For each leaf that is to be restored, by path, its path in the checkpoint; ValueError where
    the two don't fit.
    """
    plain = {theirs.plain(path): path for path in saved if not theirs.is_fp8(path)}
    sources, problems = {}, []
    for path, leaf in leaves.items():
        if fresh_scales and ours.is_fp8(path):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise TypeError(
                    "like must hold arrays for its FP8 state, since fresh_scales keeps it; got a "
                    "jax.ShapeDtypeStruct at "
                    f"{_text(path)}. Make it with init."
                )
            continue
        source = path if ours.is_fp8(path) else plain.pop(ours.plain(path), None)
        metadata = None if source is None else saved.get(source)
        if metadata is None:
            problems.append(f"{_text(path)}: not in the checkpoint")
        elif not _is_scalar(leaf) and (tuple(metadata.shape), metadata.dtype) != _as_written(leaf):
            problems.append(
                f"{_text(path)}: {metadata.dtype}{list(metadata.shape)} in the checkpoint, not "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
        else:
            sources[path] = source
    problems += [f"{_text(path)}: only in the checkpoint" for path in plain.values()]
    _raise_problems(problems, where)
    return sources


def _raise_problems(problems: list[str], where: str) -> None:
    if problems:
        raise ValueError(
            f"the state in {where} must be of the structure, shapes and dtypes of `like`; "
            f"{len(problems)} difference(s):\n"
            f"{_listed(problems)}\nPass a `like` of the model and optimizer that it was saved from."
        )


def _as_written(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of an array as Orbax writes it: of a typed key (`jax.random.key`) the numbers
    that it is made of.
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return tuple(leaf.shape), leaf.dtype


def _is_scalar(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float))


def _restore_arguments(leaf: Any) -> ocp.RestoreArgs:
    if leaf is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    if isinstance(leaf, np.ndarray) or _is_scalar(leaf):
        return ocp.RestoreArgs(restore_type=type(leaf))
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shape, dtype = _as_written(
        leaf
    )  # The sharding of keys fits their numbers, which have their axis behind those of the keys.
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype, strict=True)
