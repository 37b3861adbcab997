"""Casts a weight once: before the loops that use it, and not for each iteration.

Where a loop around a site does not change its weight - microbatches, steps in time - that is
computed and cast in front of the outermost such loop; over the layers that a scan in between
stacks, by `vmap`. So are, on one device, the layers of a scan that isn't rematerialized, whose
codes would be kept anyway.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from fp8jax._observe import Observed, after, first_lane, has_lanes, with_seen
from fp8jax._site_scales import SiteScales
from fp8jax._transform.analysis import Entered
from fp8jax._transform.control_flow import Kind
from fp8jax._transform.names import PRODUCT, site_scope
from fp8jax._transform.products import product_of
from fp8jax._transform.sharing import ScalesBySite
from fp8jax._transform.sites import Site
from fp8jax._transform.weights import equation_of, is_inside, sites_to_cast, weight_operand
from fp8jax.devices import device_of
from fp8jax.ops._operands import (
    CODES,
    Ahead,
    cast_ahead,
    is_cast_alike,
    is_cast_to_values,
    observation,
    observe_ahead,
    scales_ahead,
    without_state,
)
from fp8jax.ops._product import Product

Aheads = dict[str, Ahead]


def own_ahead(step: Entered, ahead: Aheads) -> Aheads:
    """Of the sites in a step."""
    return {site.name: ahead[site.name] for site in step.sites() if site.name in ahead}


def cast_before(step: Entered, scales: ScalesBySite, operands, ahead: Aheads) -> Aheads:
    """`ahead` of the sites inside a loop, with the weights that the loop doesn't change, and those
    that it has one each of.
    """
    ahead = dict(ahead)
    cast = [name for name in ahead if ahead[name].is_cast]
    for name, site in sites_to_cast(step, cast).items():
        operand = weight_operand(step, operands, name)
        if operand is not None:
            inner = equation_of(step, name)
            lhs, rhs = (atom.aval for atom in inner.invars[:2])
            product = product_of(inner, site, lhs, rhs)
            own = scales.get(name)
            each = step.loop in site.stacked_over
            alike = is_cast_alike(product, site.weight_operand)
            if each and _is_better_cast_again(product, site, operand, operands):
                seen = None if own is None else _observed_ahead(step, site, operand, own)
                made = _scales_of_weight(site, product, operand)
                ahead[name] = Ahead(None, None, seen, is_at_hand=True, scales=made)
            elif alike or not each:
                # Of a weight for each iteration a backward pass keeps one cast, and so are those
                # made here no more.
                ahead[name] = cast_weight(site, product, operand, own)
    return ahead


def _is_better_cast_again(
    product: Product, site: Site, operand: jax.Array, operands: Sequence[Any]
) -> bool:
    """Whether the layers of a stacked weight are best cast at each product, by scales that are made
    for all of them.

    A GPU slices a stack of codes by copying it, and would keep one for the forward and one for the
    backward pass. A TPU's products slice it themselves; but where the two casts of a weight are not
    alike, to write one of them to be kept costs as much as to cast again. And values of codes take
    as much memory as the weight does.

    So it is where the weight itself is what the scan slices, of 16 bits.
    """
    if operand.dtype.itemsize > 2 or not any(operand is one for one in operands):
        return False
    platform, name = device_of(operand).platform, site.weight_operand
    again = platform == "gpu" or platform == "tpu" and not is_cast_alike(product, name)
    layer = jax.ShapeDtypeStruct(operand.shape[1:], operand.dtype)
    return again or is_cast_to_values(product, name, layer)


def _scales_of_weight(site: Site, product: Product, operand: jax.Array) -> dict[str, jax.Array]:
    """The scales of a stacked weight that are no state, by product."""
    name = site.weight_operand
    one = functools.partial(scales_ahead, product, name)
    for _ in range(operand.ndim - product.axes("forward", name)[0]):
        one = jax.vmap(one)
    with jax.named_scope(PRODUCT), jax.named_scope(site_scope(site.name)):
        return one(jax.lax.stop_gradient(operand))


def cast_weight(site: Site, product: Product, operand: jax.Array, own: SiteScales | None) -> Ahead:
    """The weight operand of a site, ahead; its scales may have lanes, of which it has none."""
    name = site.weight_operand
    if own is not None and has_lanes(own, operand.ndim - product.axes("forward", name)[0]):
        own = first_lane(own)
    with jax.named_scope(PRODUCT), jax.named_scope(site_scope(site.name)):
        return _cast_stacked(product, name, operand, own)


def _cast_stacked(
    product: Product, operand_name: str, operand: jax.Array, scales: SiteScales | None
) -> Ahead:
    """`cast_ahead`, for each member along the axes of `operand` before the product's own."""
    one = functools.partial(cast_ahead, product, operand_name, in_memory=True)
    operand = jax.lax.stop_gradient(operand)  # Else JAX would have a derivative of float8 codes.
    for _ in range(operand.ndim - product.axes("forward", operand_name)[0]):
        one = jax.vmap(one, in_axes=(0, None if scales is None else 0))
    # Named like what a site casts itself: under a rematerialization around the loop, policies keep
    # both or neither.
    return checkpoint_name(without_state(one(operand, scales).as_kept()), CODES)


def depth(step: Entered, name: str) -> int:
    """Over how many scans, from this one inwards, the scales of a site are stacked."""
    site = next(site for site in step.sites() if site.name == name)
    loops = [loop for loop, _ in site.loops]
    inner = itertools.dropwhile(lambda loop: loop != step.loop, loops)
    return sum(loop in site.stacked_over for loop in inner)


def observe_before(step: Entered, scales: ScalesBySite, operands, ahead: Aheads) -> Aheads:
    """`ahead` of the sites inside a scan, with the amaxes of the weights that are stacked over it:
    in one go for all layers.
    """
    found = {}
    for site in step.sites():
        if (
            site.weight is None
            or site.name in ahead
            or step.loop not in site.stacked_over
            or not site.has_scales
        ):
            continue
        operand = weight_operand(step, operands, site.name)
        if operand is not None:
            seen = _observed_ahead(step, site, operand, scales[site.name])
            found |= {} if seen is None else {site.name: Ahead(None, None, seen)}
    return ahead | found


def _observed_ahead(
    step: Entered, site: Site, operand: jax.Array, own: SiteScales
) -> Observed | None:
    """What is seen of a stacked weight; None where its scaling is not delayed."""
    own = first_lane(own) if has_lanes(own, depth(step, site.name)) else own
    with jax.named_scope(PRODUCT), jax.named_scope(site_scope(site.name)):
        ahead = observe_ahead(operand, own, site.weight_operand)
    return None if ahead is None else ahead.seen


def with_seen_before(
    step: Entered, scales: ScalesBySite, ahead: Aheads
) -> tuple[ScalesBySite, Aheads]:
    """`scales` that carry out what was seen of weights in front of a loop, and `ahead` without it:
    no iteration needs it.

    But a branch does, which must not have seen what it has not taken.
    """
    scales, ahead = dict(scales), dict(ahead)
    for site in step.sites():
        seen = ahead[site.name].seen if site.name in ahead else None
        if seen is not None and not is_inside((Kind.BRANCHES,), step, site.name):
            own = scales[site.name]
            operands = {"lhs": None, "rhs": None, "grad": None, site.weight_operand: seen}
            observations = observation(own, **operands)
            # Not where scales have lanes, which would no longer be copies of one, to the compiler.
            own = own if has_lanes(own, depth(step, site.name)) else after(own, observations)
            scales[site.name] = with_seen(own, observations)
            ahead[site.name] = dataclasses.replace(ahead[site.name], seen=None)
    return scales, ahead
