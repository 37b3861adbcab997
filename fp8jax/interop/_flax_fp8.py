"""Scales from the state of Flax's own FP8 operations: the collection "_overwrite_with_gradient"."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax._scaling import exponent_from_amax
from fp8jax._site_scales import SiteScales
from fp8jax._state import find_site_scales, map_site_scales

# What Flax calls the three operands of a product, and we.
_OPERANDS = {"lhs": "input", "rhs": "kernel", "grad": "output_grad"}


def from_flax_fp8(state: Mapping[str, Any], scales: Any) -> Any:
    """`scales` with the exponents that fit what Flax's FP8 operations had observed.

    For a model whose layers had `dot_general_cls=Fp8DirectDotGeneralOp` (or another of Flax's
    operations that keep the same state), and that is now wrapped in `fp8jax.linen.Fp8` without it.
    Each of Flax's scales is `max(amax_history) / max of the format`; ours is the next power of two.
    Histories that something non-finite came into, which Flax would not recover from before they are
    through, count without it.

    Args:
      state: the collection "_overwrite_with_gradient": nested by module, float32 amax histories
        `[..., length]` and scales `[..., 1]`.
      scales: those of the wrapped model, from its `init`; any tree that holds `SiteScales`.

    Returns:
      A tree like `scales`. Operands whose history is empty keep their exponents, as do sites that
      `state` does not have.

    Raises:
      ValueError: where `state` holds no such operation; or one whose module has no site, or layers
        of another number.

    >>> from fp8jax import recipes
    >>> scales = {"mlp": SiteScales.zeros("mlp", recipes.delayed().delayed_casts)}
    >>> names = [f"{name}_amax_history" for name in ("input", "kernel", "output_grad")]
    >>> history = {name: jnp.array([0.0, 448.0, 900.0]) for name in names}
    >>> state = {"mlp": {"Fp8DirectDotGeneralOp_0": history}}
    >>> from_flax_fp8(state, scales)["mlp"].lhs
    Array(2., dtype=float32)
    """
    found = dict(_operations(state, ()))
    if not found:
        raise ValueError(
            "state must be the collection '_overwrite_with_gradient' of a model with Flax's FP8 "
            "operations; got none of "
            f"them in {sorted(state)}. Pass variables['_overwrite_with_gradient']."
        )
    sites = {node.site: node for node in find_site_scales(scales)}
    missing = sorted(site for site in found if site not in sites)
    if missing:
        raise ValueError(
            "scales must have the sites of all operations in state; got none for "
            f"{', '.join(missing)}. The sites are: "
            f"{', '.join(sites) or 'none'}. Take what they were renamed from, or left out by, out "
            "of state."
        )
    return map_site_scales(
        lambda node: _with_history(node, found[node.site]) if node.site in found else node, scales
    )


def _operations(state: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The operations in a collection, by the path of the module that each is in."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            if f"{_OPERANDS['lhs']}_amax_history" in value:
                yield "/".join(path), value
            else:
                yield from _operations(value, (*path, name))


def _with_history(node: SiteScales, operation: Mapping[str, Any]) -> SiteScales:
    changes = {}
    for (operand, name), cast in zip(_OPERANDS.items(), node.casts, strict=True):
        if cast is None or cast.delayed is None:
            continue
        history, exponent = (
            jnp.asarray(operation[f"{name}_amax_history"], jnp.float32),
            getattr(node, operand),
        )
        if history.shape[:-1] != jnp.shape(exponent):
            raise ValueError(
                "state must have the layers of scales; got amax histories "
                f"{list(history.shape[:-1])} for {operand} of site "
                f"{node.site!r}, whose scales are {list(jnp.shape(exponent))}. Make scales with "
                "init of the same model."
            )
        amax = jnp.max(jnp.where(jnp.isfinite(history), history, 0), axis=-1)
        changes[operand] = jnp.where(
            amax > 0, exponent_from_amax(amax, cast.format, cast.delayed.margin), exponent
        )
    return jax.tree.map(jnp.asarray, node.replace(**changes))
