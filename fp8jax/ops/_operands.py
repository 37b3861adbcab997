"""A product's operands: cast in place, or ahead of several uses; and what is observed of them."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import _xla
from fp8jax._observe import Observed, observed, stacked_observed
from fp8jax._site_exponents import SiteExponents
from fp8jax._site_scales import by_operand
from fp8jax.ops._cast import Codes, ReadyScale, boxes_of, cast, fitting
from fp8jax.ops._execution import Operand
from fp8jax.ops._kernels import block_casts, values_of
from fp8jax.ops._product import Product
from fp8jax.ops._ready import Ready, own_scales

# The name, as of `jax.ad_checkpoint.checkpoint_name`, of all that a backward pass needs of the
# forward one.
CODES = "fp8_codes"
_PRODUCTS_WITH = {"lhs": ("forward", "drhs"), "rhs": ("forward", "dlhs"), "grad": ("dlhs", "drhs")}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operand", "scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Uncast:
    """An operand that is kept for a backward pass as it is, and cast there again by the same scale.

    Attributes:
      operand: itself; None until it is added.
      scale: as its codes had it; None where it is state.
    """

    operand: Any
    scale: jax.Array | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["forward", "backward", "seen", "scales"],
    meta_fields=["is_at_hand"],
)
@dataclasses.dataclass(frozen=True)
class Ahead:
    """An operand that was cast before the product, for several uses of it; or only observed before.

    Attributes:
      forward: the operand of the forward product; None where it was only observed.
      backward: that of the gradient it takes part in; None where it is the same.
      seen: what was observed; None where its scaling is not delayed.
      is_at_hand: whether the operand is in memory anyway until the backward pass, which then casts
        it again: its codes need not be kept (static).
      scales: of an operand that is yet to be cast, by product, where they are known and no state.
    """

    forward: Operand | None
    backward: Operand | None
    seen: Observed | None
    is_at_hand: bool = False
    scales: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def is_cast(self) -> bool:
        """Whether it holds the operand, and not its amax alone."""
        return self.forward is not None

    @property
    def ready(self) -> Operand:
        """The operand of the forward product; ValueError where it was only observed."""
        if self.forward is None:
            raise ValueError("the operand must have been cast ahead; it was only observed.")
        return self.forward

    @property
    def kept(self) -> Operand | Uncast:
        """What a backward pass needs of it; of an operand at hand, all but that."""
        kept = self.ready if self.backward is None else self.backward
        if not self.is_at_hand:
            return kept
        return Uncast(None, kept.scale if isinstance(kept, Codes) else None)

    def as_kept(self) -> "Ahead":
        """With all codes in the dtype to be sliced and kept in."""
        return self.map(Codes.as_kept)

    def map(self, change: Callable[[Codes], Operand]) -> "Ahead":
        """With all codes changed by a function."""
        forward, backward = (
            change(operand) if isinstance(operand, Codes) else operand
            for operand in (self.forward, self.backward)
        )
        return dataclasses.replace(self, forward=forward, backward=backward)


def is_cast(name: str, ahead: dict[str, Ahead]) -> bool:
    """Whether an operand was cast ahead, and not only observed."""
    return name in ahead and ahead[name].is_cast


def casts_of(product: Product, name: str) -> tuple:
    """What an operand's two casts depend on beside the operand and its scale; hashable."""
    return tuple(_how(product, which, name) for which in _PRODUCTS_WITH[name])


def is_cast_alike(product: Product, name: str) -> bool:
    """Whether an operand has one cast, for both products that it takes part in."""
    one, other = casts_of(product, name)
    return one == other


def cast_ahead(
    product: Product,
    name: str,
    operand: jax.Array,
    scales: SiteExponents | Ready | None,
    *,
    known: Mapping[str, jax.Array] = types.MappingProxyType({}),
    in_memory: bool = False,
) -> Ahead:
    """Casts the lhs or the rhs for the forward product and for the gradient it takes part in, by
    the scales of `known` where that has them; observes it, too.

    >>> from fp8jax import recipes
    >>> from fp8jax.ops._dot import dot_product
    >>> lhs, rhs, numbers = jnp.ones((2, 4)), jnp.ones((4, 3)), (((1,), (0,)), ((), ()))
    >>> product = dot_product(lhs, rhs, numbers, recipe=recipes.rowwise())
    >>> ahead = cast_ahead(product, "rhs", rhs, None)
    >>> ahead.forward.scale.shape, ahead.backward.scale.shape
    ((1, 3), (4, 1))
    """
    return _cast_ahead(product, name, operand, nameless(scales), dict(known), in_memory)


@functools.partial(jax.jit, static_argnums=(0, 1, 5), inline=True)
def _cast_ahead(product, name, operand, scales, known, in_memory):
    forward, *backward = operands_of(product, name, operand, scales, known, in_memory)
    return Ahead(forward, backward[0] if backward else None, observe(operand, scales, name))


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def scales_ahead(product: Product, name: str, operand: jax.Array) -> dict[str, jax.Array]:
    """The scales of an operand in memory that are no state, by product, for `cast_ahead`."""
    found, alike = {}, is_cast_alike(product, name)
    if is_cast_to_values(product, name, operand):
        return found
    for which in _PRODUCTS_WITH[name]:
        how = _how(product, which, name)
        if how is not None and how[0].delayed is None and not (alike and which != "forward"):
            found[which] = fitting(operand, *how, in_memory=True)
    return found


def _how(product: Product, which: str, name: str):
    """An operand's cast in one of the three products, and which elements share a scale there."""
    spec = getattr(getattr(product.recipe, which), name)
    return None if spec is None else (spec, boxes_of(spec.scaling, *product.axes(which, name)))


def operands_of(
    product: Product,
    name: str,
    operand: jax.Array,
    scales: Ready | None,
    known: Mapping[str, jax.Array] = types.MappingProxyType({}),
    in_memory: bool = False,
) -> Sequence[Operand]:
    """An operand as both products read it that it takes part in; one alone, where they read the
    same.
    """
    which = _PRODUCTS_WITH[name][: 1 if is_cast_alike(product, name) else 2]
    casts = _casts_to_values(product, which, name)
    values = values_of(operand, casts) if casts else None
    if values is not None:
        # A backward pass reads the last one, of one or two.
        return [*values[:-1], _xla.written_apart(values[-1])]
    return [
        operand_of(product, one, name, operand, scales, known.get(one), in_memory=in_memory)
        for one in which
    ]


def is_cast_to_values(product: Product, name: str, operand: Any) -> bool:
    """Whether an operand, or one of an abstract value, is cast to values and not to codes."""
    casts = _casts_to_values(product, _PRODUCTS_WITH[name], name)
    return bool(casts) and block_casts(operand, casts) is not None


def _casts_to_values(product: Product, which: Sequence[str], name: str) -> list:
    """Of an operand for some products, as a kernel may have them that makes values of codes; none
    where it may not.
    """
    recipe, hows = product.recipe, [_how(product, one, name) for one in which]
    # A second derivative asks for the codes.
    if not product.reads_values or recipe.execution != "auto" or recipe.second_order:
        return []
    casts = [(*how, product.axes(one, name)[2]) for one, how in zip(which, hows) if how]
    return casts if len(casts) == len(hows) else []


def operand_of(
    product: Product,
    which: str,
    name: str,
    operand: jax.Array,
    scales: Ready | None,
    scale: jax.Array | None = None,
    *,
    in_memory: bool = False,
) -> Operand:
    """An operand as one of the three products reads it: cast, or as it is where the recipe casts it
    not; by `scale`, where that is known and no state.
    """
    how = _how(product, which, name)
    if how is None:
        return operand
    if casts := _casts_to_values(product, (which,), name):
        values = values_of(operand, casts)
        if values is not None:
            return values[0]
    spec, boxes = how
    given = scale if spec.delayed is None else _ready(scales, name)
    codes = cast(operand, spec, boxes, given, in_memory=in_memory)
    return product.placed(codes, product.axes(which, name)[2])


def completed(
    product: Product, name: str, operand: jax.Array, scales: Ready | None, ahead: Ahead | None
) -> Ahead:
    """The lhs or the rhs for all uses of it, of which `ahead` may have some or all."""
    if ahead is not None and ahead.is_cast:
        return with_state(name, ahead, scales)
    if ahead is not None and ahead.is_at_hand and is_cast_to_values(product, name, operand):
        # One that isn't kept need not be made.
        forward = operand_of(product, "forward", name, operand, scales)
        return dataclasses.replace(ahead, forward=forward)
    known = {} if ahead is None else ahead.scales
    own = cast_ahead(product, name, operand, scales, known=known)
    if ahead is None:
        return own
    return dataclasses.replace(own, seen=ahead.seen, is_at_hand=ahead.is_at_hand)


def without_state(ahead: Ahead) -> Ahead:
    """Codes alone, where their scale is state: it is a number of its own, which a scan would slice
    by a kernel of its own.
    """
    return ahead.map(
        lambda codes: (
            dataclasses.replace(codes, scale=None, ready=None) if codes.is_state else codes
        )
    )


def with_state(name: str, ahead: Ahead, scales: Ready | None) -> Ahead:
    """What `without_state` was, where it may have been."""
    return ahead.map(lambda operand: _with_own_scale(name, operand, scales))


def with_states(
    product: Product, kept: dict[str, Operand | Uncast], scales: Ready | None
) -> dict[str, Operand]:
    """Operands that are kept for a backward pass, with their scales; cast again, if they weren't
    kept as codes.
    """
    found = {}
    for name, operand in kept.items():
        if isinstance(operand, Uncast):
            which = _PRODUCTS_WITH[name][1]
            found[name] = operand_of(product, which, name, operand.operand, scales, operand.scale)
        else:
            found[name] = _with_own_scale(name, operand, scales)
    return found


def _with_own_scale(name: str, operand: Operand, scales: Ready | None) -> Operand:
    if not isinstance(operand, Codes) or not operand.is_state:
        return operand
    ready = _ready(scales, name)
    return dataclasses.replace(operand, scale=ready.scale, ready=ready)


def _ready(scales: Ready | None, name: str) -> ReadyScale:
    if scales is None:
        raise ValueError(f"scales must be given for an operand with delayed scaling, {name}.")
    return scales.of_operand(name)


def as_codes(operand: Operand) -> Operand:
    """With codes again, if it was kept as bytes."""
    return operand.as_codes() if isinstance(operand, Codes) else operand


def nameless(scales: SiteExponents | Ready | None) -> Ready | None:
    """A site's scales made ready, without its name, which would make each site another case to
    trace.
    """
    if scales is None:
        return None
    return (scales if isinstance(scales, Ready) else Ready.of(scales)).alone()


def observation(
    scales: SiteExponents | Ready,
    lhs: Observed | None,
    rhs: Observed | None,
    grad: Observed | None,
) -> SiteExponents:
    """The cotangent of `scales` that carries what was seen (None: not observed)."""
    scales = own_scales(scales)
    # Zeros like the exponents, and not plain ones, since they must vary over the same mesh axes.
    zero = jnp.zeros_like(scales.values[..., 0])

    def measures(name):
        # Without lanes, if there are any: the same in each.
        found = (getattr(one, name, None) for one in (lhs, rhs, grad))
        return [
            zero
            if one is None
            else jnp.broadcast_to(
                jnp.expand_dims(one, tuple(range(one.ndim, zero.ndim))), zero.shape
            )
            for one in found
        ]

    numbers = measures("amax")
    numbers += measures("flushed") if scales.values.shape[-1] > len(numbers) else []
    whole = None if scales.whole is None else jnp.zeros_like(scales.whole)
    return scales.replace(values=jnp.stack(numbers, axis=-1), whole=whole)


def observe_operands(
    lhs: jax.Array, rhs: jax.Array, scales: SiteExponents | Ready
) -> SiteExponents:
    """What a forward pass sees of `lhs` and `rhs`, and nothing of the gradient, as `observation`
    packs it.
    """
    return observation(scales, observe(lhs, scales, "lhs"), observe(rhs, scales, "rhs"), None)


def observe(operand: jax.Array, scales: SiteExponents | Ready | None, name: str) -> Observed | None:
    """What is to be known of an operand of a site; None where its scaling is not delayed."""
    scales = own_scales(scales)
    if scales is None or (exponent := scales.of_operand(name)) is None:
        return None
    return observed(operand, exponent, by_operand(scales.casts)[name])


def observe_ahead(operand: jax.Array, scales: SiteExponents, name: str) -> Ahead | None:
    """The same of an operand that several products share, or that is stacked over the loops that
    its scales are stacked over.
    """
    exponent = scales.of_operand(name)
    if exponent is None:
        return None
    cast = by_operand(scales.casts)[name]
    return Ahead(None, None, stacked_observed(operand, exponent, cast))
