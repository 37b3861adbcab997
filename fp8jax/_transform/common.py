"""What several sites read is cast and observed once: query, key and value of the same activations,
a weight that is used twice.

Of the sites of one scope whose casts of it are alike, the first one's scale is taken. All observe
the same amax, each into its own state, so that the scale of each fits whichever calls are to come,
those that lead through it alone too.
"""

import dataclasses
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from fp8jax import _shims
from fp8jax._observe import first_lane, has_lanes, led_alone
from fp8jax._recipe import OPERANDS
from fp8jax._site_exponents import SiteExponents
from fp8jax._site_scales import observes_flushed
from fp8jax._transform.names import PRODUCT, site_scope
from fp8jax._transform.products import product_of
from fp8jax._transform.sharing import ScalesBySite
from fp8jax._transform.sites import Site
from fp8jax.ops._operands import CODES, Ahead, cast_ahead, casts_of, is_cast, without_state
from fp8jax.ops._ready import Ready, own_scales

# What they give has the values of what they get, or is it in another shape.
_VIEWS = ("convert_element_type", "reshape", "squeeze", "transpose", "broadcast_in_dim")


class Readers:
    """The sites of one jaxpr, as they come, by what they read and how they cast it."""

    def __init__(self):
        self._origins: dict[Any, Hashable] = {}
        self._first: dict[Hashable, str] = {}

    def pass_by(self, equation) -> None:
        """Takes note of an equation without a site."""
        if equation.primitive.name in _VIEWS and len(equation.invars) == 1:
            (atom,), (out,) = equation.invars, equation.outvars
            if _shims.is_variable(atom):
                params = tuple(sorted(equation.params.items()))
                self._origins[out] = equation.primitive.name, params, self._origin(atom)

    def leaders(self, equation, site: Site) -> tuple[tuple[str, str], ...]:
        """For each operand of a site that an earlier one read and cast alike: its name, and that
        site's.
        """
        product = product_of(equation, site, *(atom.aval for atom in equation.invars[:2]))
        place = (
            type(product).__name__,
            product.recipe.execution,
            site.stacked_over,
            site.device_axes,
            observes_flushed(site.delayed_casts),
        )
        found = []
        for name, atom in zip(("lhs", "rhs"), equation.invars[:2]):
            casts = casts_of(product, name)
            # Of ragged rows, each site reads those in its own groups.
            ragged = site.product == "ragged_dot_general" and name == "lhs"
            if casts == (None, None) or ragged or not _shims.is_variable(atom):
                continue
            first = self._first.setdefault((self._origin(atom), name, casts, place), site.name)
            if first != site.name:
                found.append((name, first))
        return tuple(found)

    def _origin(self, atom) -> Hashable:
        return self._origins.get(atom, atom)


def sources_of(sites: Sequence[Site], names: Sequence[str]) -> tuple[tuple[int, ...], ...] | None:
    """For each of some sites in one array, and for lhs, rhs and grad, whose scale there it takes:
    its own, or that of the one that reads the same. None where all take their own.

    As a rule the two are the same. But scales move with what their site has seen, and a call may
    lead through the one alone.
    """
    at = {name: index for index, name in enumerate(names)}
    sources = [[index] * len(OPERANDS) for index in range(len(names))]
    for site in sites:
        for operand, first in site.cast_with:
            if site.name in at and first in at:
                sources[at[site.name]][OPERANDS.index(operand)] = at[first]
    own = all(set(row) == {index} for index, row in enumerate(sources))
    return None if own else tuple(map(tuple, sources))


def with_leaders(
    sites: Sequence[Site], scales: ScalesBySite, kinds: Sequence[Collection[str]]
) -> ScalesBySite:
    """`scales`, where a site takes those of another one that is not of its kind, which is the names
    in one array.
    """
    led = {}
    for site in sites:
        own = scales.get(site.name)
        of_kind = next((names for names in kinds if site.name in names), ())
        others = {operand: first for operand, first in site.cast_with if first not in of_kind}
        if own is None or not others:
            continue
        leaders = [scales[others.get(name, site.name)] for name in OPERANDS]
        leaders = [one if _vary_alike(own, one) else own for one in leaders]
        led[site.name] = led_alone(own, jax.lax.stop_gradient(leaders))
    return {**scales, **led}


def _vary_alike(own: SiteExponents, first: SiteExponents) -> bool:
    """Whether two sites' scales differ over the same devices; else each keeps its own."""
    return _shims.varying_axes(own.values) == _shims.varying_axes(first.values)


class Casts:
    """What the sites of one jaxpr have in common, cast where the first one reads it."""

    def __init__(self, sites: Sequence[Site]):
        self._shared = {(first, name) for site in sites for name, first in site.cast_with}
        self._made: dict[Hashable, Ahead] = {}

    def of(
        self,
        equation,
        site: Site,
        operands: Sequence[Any],
        scales: SiteExponents | Ready | None,
        ahead: dict[str, Ahead],
    ) -> dict[str, Ahead]:
        """`ahead`, the operands of a site that were cast or observed before, and those that other
        sites read too.
        """
        found = dict(ahead)
        for name, operand in zip(("lhs", "rhs"), operands):
            key = dict(site.cast_with).get(name, site.name), name
            if key not in self._shared or is_cast(name, ahead):
                continue
            own = own_scales(scales)
            made = key, None if own is None else _shims.varying_axes(own.values)
            if made not in self._made:
                product = product_of(equation, site, *operands[:2])
                self._made[made] = _cast(site, product, name, operand, scales)
            cast = self._made[made]
            found[name] = (
                dataclasses.replace(cast, seen=ahead[name].seen) if name in ahead else cast
            )
        return found


def _cast(site: Site, product, name: str, operand: jax.Array, scales) -> Ahead:
    own = own_scales(scales)
    if name == site.weight and own is not None and has_lanes(own, 0):
        scales = first_lane(own)  # Weights have no lanes.
    operand = jax.lax.stop_gradient(operand)  # Else JAX would have a derivative of float8 codes.
    with jax.named_scope(PRODUCT), jax.named_scope(site_scope(site.name)):
        cast = cast_ahead(product, name, operand, scales)
        # Named like what a site casts itself: policies of rematerialization keep both or neither.
        return checkpoint_name(without_state(cast.as_kept()), CODES)
