"""Checks of the trees that hold scales or observations: errors that say what differs, and where."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from fp8jax._recipe import OPERANDS
from fp8jax._site_scales import LEAVES, SiteScales, observes_flushed
from fp8jax._state import find_stacks, is_scales
from fp8jax.optim._rows import Rows
from fp8jax.optim._rule import OperandState

# Where `optax.tree_utils.tree_map_params` asks for a state, it stands for what holds no copy of the
# parameters.
OF_NO_PARAMS = 0

Sites = dict[str, SiteScales]


def is_placeholder(params: Any) -> bool:
    """Whether `params` stands for a tree of parameters of any structure, as
    `optax.tree_utils.tree_map_params` has it.
    """
    kinds: list[type] = []

    def init(stand_in: Any) -> Any:
        kinds.append(type(stand_in))
        return ()

    optax.tree_utils.tree_map_params(init, lambda leaf: leaf, ())
    return isinstance(params, tuple(kinds))


def check_sites(tree: Any, argument: str) -> Sites:
    """What `fp8jax._state.find_stacks` finds in `tree`; its leaves are checked."""
    sites = find_stacks(tree)
    for path, node in sites.items():
        _check_node(node, f"{argument}{path}")
    return sites


def check_scales_alone(tree: Any, argument: str) -> Sites:
    """The `SiteScales` in `tree`, which must hold some, and nothing else."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_scales)[0]:
        if not is_scales(leaf):
            raise TypeError(
                f"{argument} of delayed_scaling must hold SiteScales alone; got "
                f"{type(leaf).__name__} at "
                f"{argument}{jax.tree_util.keystr(path)}. Use with_delayed_scaling(tx), which "
                "leaves the rest to tx."
            )
    sites = check_sites(tree, argument)
    if not sites:
        raise ValueError(
            f"{argument} of delayed_scaling must hold SiteScales; got none in "
            f"{jax.tree.structure(tree)}. Pass the "
            "scales that fp8jax.fp8(...).init returns, or the collection 'fp8' of fp8jax.linen.Fp8."
        )
    return sites


def check_alike(
    observations: Sites,
    scales: Sites,
    names: tuple[str, str] = ("updates", "params"),
    remedy: str = "Observations are the gradient with respect to the very scales that are updated: "
    "pass both of one step.",
) -> None:
    """Raises unless both trees, called by `names`, have the same sites at the same places, of the
    same shapes.
    """
    both = " and ".join(names)
    for path in sorted(scales.keys() ^ observations.keys()):
        node, lacking = (
            (scales[path], names[0]) if path in scales else (observations[path], names[1])
        )
        raise ValueError(
            f"{both} must hold the same sites; got {node.site!r} at {path}, which {lacking} lacks. "
            f"{remedy}"
        )
    for path, node in scales.items():
        seen = observations[path]
        for what in ("site", "casts"):
            got, expected = getattr(seen, what), getattr(node, what)
            if got != expected:
                raise ValueError(
                    f"{both} must be of the same {what} at {path}; got {got!r} in {names[0]} and "
                    f"{expected!r} in "
                    f"{names[1]}. {remedy}"
                )
        for name in LEAVES:
            got, expected = getattr(seen, name), getattr(node, name)
            if any(node.casts) and got is not None and got.shape != expected.shape:
                raise ValueError(
                    f"{both} must have the same shapes; got {tuple(got.shape)} and "
                    f"{tuple(expected.shape)} for "
                    f".{name} of site {node.site!r}. {remedy}"
                )


def check_state(operands: Sequence[OperandState], rows: Sequence[Rows]) -> None:
    """Raises unless the state was made for these scales, as far as its shapes tell."""
    expected = jax.eval_shape(lambda: [OperandState.zeros(row.count, row.delayed) for row in rows])
    for field in OperandState._fields:
        needed, got = (
            [jax.tree.map(lambda leaf: tuple(leaf.shape), getattr(one, field)) for one in those]
            for those in (expected, operands)
        )
        if got != needed:
            raise ValueError(
                f"state must be that of the same scales: for these, {field} has the shapes "
                f"{needed}; got {got}. "
                "Make a new state by init(params) where sites or recipe have changed."
            )


def _check_node(node: SiteScales, where: str) -> None:
    for name, needed in zip(
        LEAVES,
        (*node.casts, any(node.casts), any(node.casts), observes_flushed(node.casts)),
        strict=True,
    ):
        leaf = getattr(node, name)
        if leaf is None and needed:
            raise ValueError(
                f"{where}.{name} of site {node.site!r} must be an array; got None. Keep the leaves "
                "as "
                "SiteScales.zeros makes them."
            )
        if leaf is None:
            continue
        if not hasattr(leaf, "shape") or leaf.dtype != np.float32:
            got = f"{leaf.dtype}" if hasattr(leaf, "dtype") else type(leaf).__name__
            raise TypeError(
                f"{where}.{name} of site {node.site!r} must be a float32 array; got {got}. Leave "
                "scales out of "
                "casts of the parameters."
            )
    if any(node.casts):
        stack = node.seal.shape[:-1]
        for name in OPERANDS:
            leaf = getattr(node, name)
            if leaf is not None and leaf.shape[: len(stack)] != stack:
                raise ValueError(
                    f"{where}.{name} of site {node.site!r} must begin with the axes of its seal, "
                    f"{tuple(stack)}; got "
                    f"the shape {tuple(leaf.shape)}. Slice or stack all leaves of a SiteScales "
                    "alike."
                )
