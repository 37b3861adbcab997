"""The scales of one site, as a pytree node."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from fp8jax._recipe import OPERANDS, CastSpec
from fp8jax._scaling import scale_from_exponent
from fp8jax._state_dicts import register_state_dict

# The leaves of a `SiteScales`: those with one number for a site, and those with one for each of its
# operands.
OF_SITE = (*OPERANDS, "uses")
OF_ALL = ("seal", "flushed")
LEAVES = (*OPERANDS, "seal", "uses", "flushed")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SiteScales:
    """The scales of one site whose operands have delayed scaling; or, as their cotangent, what was
    observed there.

    As state, `lhs`, `rhs` and `grad` hold the base-2 exponents `e` of the scales `2**e`: integers
    in float32, of the shape of the operand's groups (`()` per tensor), behind the lengths of the
    scans that the site's weights are stacked over. `seal`, `uses` and `flushed` are zero. An
    operand without delayed scaling is None.

    As cotangent (of the gradient that `jax.grad` returns, and of `Fp8Function.observe`), the same
    leaves hold amaxes, float32, 0 where nothing was seen; `seal[..., i]` the seal of operand i's
    amax, and `uses` 1, by which an update tells what it was given (see `fp8jax._observe`); and
    `flushed[..., i]` the largest share of operand i in any use that its cast turned into zeros.

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
      site: name of the site (static); a tuple of names where it stands for several sites, along the
        last axis of its operands' leaves (see `Scales.stacks`).
      casts: for lhs, rhs and grad its `CastSpec`, or None where its scaling is not delayed
        (static).
      uses: float32, `stack`, or None where all three are.
    """

    lhs: Any
    rhs: Any
    grad: Any
    seal: Any
    flushed: Any
    site: Any
    casts: tuple[CastSpec | None, CastSpec | None, CastSpec | None]
    uses: Any = None

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
        uses = jnp.zeros(stack, jnp.float32)
        return cls(lhs, rhs, grad, seal, flushed, site, casts, uses)

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
        site, casts = static
        return cls(**dict(zip(LEAVES, children, strict=True)), site=site, casts=casts)

    def scales(self) -> dict[str, Any]:
        """The scales themselves, `2**exponent`, float32, by operand; without those that are not
        state.
        """
        return scales_of({name: getattr(self, name) for name in OPERANDS})

    def casts_by_operand(self) -> dict[str, CastSpec]:
        """The casts of those operands whose scales are state."""
        return by_operand(self.casts)

    def replace(self, **changes) -> "SiteScales":
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)


register_state_dict(SiteScales, *LEAVES)


def scales_of(exponents: Mapping[str, Any]) -> dict[str, Any]:
    """The scales of these exponents, `2**exponent`, float32, by operand; without those that are
    None.
    """
    return {
        name: scale_from_exponent(value) for name, value in exponents.items() if value is not None
    }


def by_operand(casts: tuple[CastSpec | None, ...]) -> dict[str, CastSpec]:
    """The casts of a site by operand, without those whose scales are no state."""
    return {name: cast for name, cast in zip(OPERANDS, casts, strict=True) if cast is not None}


def casts_to_json(casts: tuple[CastSpec | None, ...]) -> list[str | None]:
    """For JSON."""
    return [None if cast is None else cast.to_json() for cast in casts]


def casts_from_json(casts: Sequence[str | None]) -> tuple:
    """The inverse."""
    return tuple(None if cast is None else CastSpec.from_json(cast) for cast in casts)


def _static_to_bytes(static: tuple) -> bytes:
    site, casts = static
    return json.dumps([site, *casts_to_json(casts)]).encode()


def _static_from_bytes(data: bytes) -> tuple:
    site, *casts = json.loads(bytes(data))
    return tuple(site) if isinstance(site, list) else site, casts_from_json(casts)


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
