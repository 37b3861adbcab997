"""Trees that hold the state of delayed scaling: finding it, changing it, checking it.

`fp8jax.SiteScales` is what one site has. `fp8jax.Scales` holds those of all sites of a function in
few arrays. Both are pytree nodes, and may sit anywhere in a tree.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax._bank import Scales, is_at_hand
from fp8jax._recipe import OPERANDS
from fp8jax._site_scales import SiteScales


def is_site_scales(node: Any) -> bool:
    """Whether `node` is a `SiteScales`; for `is_leaf`."""
    return isinstance(node, SiteScales)


def is_scales(node: Any) -> bool:
    """Whether `node` is a `SiteScales` or a `Scales`; for `is_leaf`."""
    return isinstance(node, (SiteScales, Scales))


def find_site_scales(tree: Any) -> list[SiteScales]:
    """All `SiteScales` in `tree`, wherever they sit, those in a `Scales` too, in the order of
    flattening.

    >>> node = SiteScales(0.0, 0.0, 0.0, 0.0, None, "mlp", ())
    >>> find_site_scales({"params": 1.0, "fp8": {"mlp": node}})[0].site
    'mlp'
    """
    nodes = filter(is_scales, jax.tree.leaves(tree, is_leaf=is_scales))
    return [one for node in nodes for one in ([node] if is_site_scales(node) else node.values())]


def map_site_scales(function, tree: Any, *rest: Any, other=lambda leaf, *rest: leaf) -> Any:
    """`tree` with `function(node, *rest_nodes)` in the place of each `SiteScales` and `other(leaf,
    ...)` elsewhere.

    In a `Scales` it must return a `SiteScales` of the same site.
    """

    def visit(node, *others):
        if isinstance(node, Scales):
            return Scales.of(map(function, node.values(), *(one.values() for one in others)))
        return (function if is_site_scales(node) else other)(node, *others)

    return jax.tree.map(visit, tree, *rest, is_leaf=is_scales)


def find_stacks(tree: Any) -> dict[str, SiteScales]:
    """All that `tree` has of scales, by path, in the order of flattening: each `SiteScales`, and
    the stacks of each `Scales`.
    """
    found = {}
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_scales)[0]:
        at = jax.tree_util.keystr(path)
        if is_site_scales(node):
            found[at] = node
        elif is_scales(node):
            found |= {f"{at}[{index}]": stack for index, stack in enumerate(node.stacks())}
    return found


def with_stacks(
    tree: Any, nodes: Iterable[SiteScales], *rest: Any, other=lambda leaf, *rest: leaf
) -> Any:
    """`tree` with `nodes`, which are like those of `find_stacks`, in their places; `other(leaf,
    ...)` elsewhere.
    """
    nodes = iter(nodes)

    def visit(node, *others):
        if isinstance(node, Scales):
            return node.with_stacks([next(nodes) for _ in node.groups])
        return next(nodes) if is_site_scales(node) else other(node, *others)

    return jax.tree.map(visit, tree, *rest, is_leaf=is_scales)


def check_exponents(tree: Any, argument: str) -> None:
    """Raises where `SiteScales` in `tree` hold what only a foreign optimizer can have made of them;
    of values at hand alone, not of tracers.
    """
    nodes = list(filter(is_scales, jax.tree.leaves(tree, is_leaf=is_scales)))
    # Fetched whole, and all at once.
    leaves, structure = jax.tree.flatten(nodes)
    at_hand = [index for index, leaf in enumerate(leaves) if is_at_hand(leaf)]
    fetched = dict(zip(at_hand, jax.device_get([leaves[index] for index in at_hand])))
    nodes = structure.unflatten([fetched.get(index) for index in range(len(leaves))])
    for node in nodes:
        for one in [node] if is_site_scales(node) else _at_hand(node).stacks():
            _check_values(one, argument)


def _at_hand(scales: Scales) -> Scales:
    """Without the arrays that aren't."""
    pairs = zip(scales.arrays, scales.groups, strict=True)
    found = [(array, group) for array, group in pairs if array is not None]
    return Scales(tuple(array for array, _ in found), tuple(group for _, group in found))


def _check_values(node: SiteScales, argument: str) -> None:
    for name in (*OPERANDS, "seal", "uses"):
        leaf = getattr(node, name)
        if leaf is None:
            continue
        wrong = leaf != np.floor(leaf) if name in OPERANDS else leaf != 0
        if np.any(wrong):
            site = node.site
            if isinstance(site, tuple):  # of several sites, along the last axis of their stack
                axis = np.ndim(leaf) - 1 - (name == "seal")
                first = np.argwhere(wrong)[0][axis]
                site, leaf = site[first], np.take(leaf, first, axis)
            raise ValueError(
                f"{argument} must hold exponents as integers, and seals of zero; got {name} of "
                f"{leaf} at site {site!r}. An "
                "optimizer took them for weights, or they were averaged: wrap it, "
                "fp8jax.with_delayed_scaling(tx), make the "
                "scales anew with init, and leave SiteScales out of weight decay and averages."
            )


def migrate_scales(old: Any, new: Any) -> Any:
    """`new`, with the exponents of `old` at every site that both have: for a model that grew or was
    renamed in part.

    Args:
      old: any tree that holds the `SiteScales` to carry over.
      new: scales of the model as it is now, from its `init`; a tree like it comes back.

    Returns:
      `new` with the old exponents at the sites of the same name, casts and shapes; the others stay
      as `init` made them.

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
            "old must share a site of the same name, casts and shapes with new; got the sites "
            f"{sorted(found)} "
            f"and {sorted(node.site for node in find_site_scales(new))}. Use new as it is."
        )
    return map_site_scales(lambda node: found[node.site] if matches(node) else node, new)


def _shapes(node: SiteScales) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(node)]
