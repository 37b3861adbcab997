"""The state of delayed scaling: per site, the exponents of the scales of its operands, as a pytree
node.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fp8jax.recipe import OPERANDS, CastSpec
from fp8jax.scaling import scale_from_exponent
from fp8jax.state_dicts import register_state_dict

# The leaves of a `SiteScales` that have an element for each operand.
OF_ALL = ("seal", "flushed")
LEAVES = (*OPERANDS, *OF_ALL)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SiteScales:
    """The scales of one site whose operands have delayed scaling; or, as their cotangent, what was
    observed there.

    As state, `lhs`, `rhs` and `grad` hold the base-2 exponents `e` of the scales `2**e`: integers
    in float32, of the shape of the operand's groups (`()` per tensor), behind the lengths of the
    scans that the site's weights are stacked over. `seal` and `flushed` are zero. An operand
    without delayed scaling is None.

    As cotangent (of the gradient that `jax.grad` returns, and of `Fp8Function.observe`), the same
    leaves hold amaxes, float32, 0 where nothing was seen; `seal[..., i]` the seal of operand i's
    amax (see `fp8jax.observe`), and `flushed[..., i]` the largest share of operand i in any use
    that its cast turned into zeros.

    Exponents and not scales, because then `old + (new - old) == new` always holds, and any
    optimizer's plain addition moves a scale exactly. An optimizer that takes them for weights
    leaves exponents that are no integers, and seals that are not zero: such scales raise a
    ValueError where a call or an update has their values at hand, and in compiled programs, where
    nothing can be raised, a scale of such an exponent is NaN, and so is all that is computed by it.

    Args:
      lhs, rhs, grad: float32 arrays, or None.
      seal: float32, `stack + (3,)`, or None where all three are.
      flushed: float32, `stack + (3,)`, or None where no operand's `DelayedScaling` has
        `flushed=True`.
      site: name of the site (static).
      casts: for lhs, rhs and grad its `CastSpec`, or None where its scaling is not delayed
        (static).
    """

    lhs: Any
    rhs: Any
    grad: Any
    seal: Any
    flushed: Any
    site: str
    casts: tuple[CastSpec | None, CastSpec | None, CastSpec | None]

    @classmethod
    def zeros(cls, site: str, casts: tuple, stack: tuple[int, ...] = ()) -> "SiteScales":
        """Scales of 1 (exponents of 0), or no observation, in buffers of their own.

        >>> from fp8jax import recipes
        >>> SiteScales.zeros("mlp/up", recipes.delayed().delayed_casts, (2,)).lhs
        Array([0., 0.], dtype=float32)
        """
        lhs, rhs, grad = (None if cast is None else jnp.zeros(stack, jnp.float32) for cast in casts)
        seal = jnp.zeros((*stack, len(OPERANDS)), jnp.float32)
        flushed = jnp.zeros_like(seal) if observes_flushed(casts) else None
        return cls(lhs, rhs, grad, seal, flushed, site, casts)

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
        """The scales themselves, `2**exponent`, float32, by operand; without those that are not
        state.
        """
        exponents = {name: getattr(self, name) for name in OPERANDS}
        return {
            name: scale_from_exponent(value)
            for name, value in exponents.items()
            if value is not None
        }

    def casts_by_operand(self) -> dict[str, CastSpec]:
        """The casts of those operands whose scales are state."""
        casts = zip(OPERANDS, self.casts, strict=True)
        return {name: cast for name, cast in casts if cast is not None}

    def replace(self, **changes) -> "SiteScales":
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)


register_state_dict(SiteScales, *LEAVES)


def _static_to_bytes(static: tuple) -> bytes:
    site, casts = static
    return json.dumps(
        [site, *(None if cast is None else cast.to_json() for cast in casts)]
    ).encode()


def _static_from_bytes(data: bytes) -> tuple:
    site, *casts = json.loads(bytes(data))
    return site, tuple(None if cast is None else CastSpec.from_json(cast) for cast in casts)


# So that `jax.export` can write functions that take scales or return observations, and read them.
jax.export.register_pytree_node_serialization(
    SiteScales,
    serialized_name="fp8jax.SiteScales",
    serialize_auxdata=_static_to_bytes,
    deserialize_auxdata=_static_from_bytes,
)


def observes_flushed(casts: tuple[CastSpec | None, ...]) -> bool:
    """Whether any of these casts of a site observes what it flushes to zero."""
    return any(
        cast is not None and cast.delayed is not None and cast.delayed.flushed for cast in casts
    )


def is_site_scales(node: Any) -> bool:
    """Whether `node` is a `SiteScales`; for `is_leaf`."""
    return isinstance(node, SiteScales)


def find_site_scales(tree: Any) -> list[SiteScales]:
    """All `SiteScales` in `tree`, wherever they sit, in the order of flattening.

    >>> node = SiteScales(0.0, 0.0, 0.0, 0.0, None, "mlp", ())
    >>> find_site_scales({"params": 1.0, "fp8": {"mlp": node}})[0].site
    'mlp'
    """
    return [node for node in jax.tree.leaves(tree, is_leaf=is_site_scales) if is_site_scales(node)]


def map_site_scales(function, tree: Any, *rest: Any, other=lambda leaf, *rest: leaf) -> Any:
    """`tree` with `function(node, *rest_nodes)` in the place of each `SiteScales` and `other(leaf,
    ...)` elsewhere.
    """

    def visit(node, *others):
        return (function if is_site_scales(node) else other)(node, *others)

    return jax.tree.map(visit, tree, *rest, is_leaf=is_site_scales)


def check_exponents(tree: Any, argument: str) -> None:
    """Raises where `SiteScales` in `tree` hold what only a foreign optimizer can have made of them;
    of values at hand alone, not of tracers.
    """
    concrete = {}
    for node in find_site_scales(tree):
        leaves = {name: getattr(node, name) for name in (*OPERANDS, "seal")}
        concrete[node.site] = {
            name: leaf
            for name, leaf in leaves.items()
            if isinstance(leaf, (jax.Array, np.ndarray, np.generic))
            and not isinstance(leaf, Tracer)
            and getattr(leaf, "is_fully_addressable", True)
        }
    for site, leaves in jax.device_get(concrete).items():
        for name, leaf in leaves.items():
            if np.any(leaf != 0) if name == "seal" else np.any(leaf != np.floor(leaf)):
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
