"""A bilinear product whose forward and backward pass run in FP8, and whose backward pass returns what it observed.

    forward   out  = cast(lhs)  . cast(rhs)
    dlhs      dlhs = cast(grad) . cast(rhs)^T
    drhs      drhs = cast(lhs)^T . cast(grad)

The casts' scales are arguments. In the place of their cotangents the backward pass returns the amaxes of lhs, rhs and
grad - the gradient with respect to a scale is the amax that was observed - and so `jax.grad` itself carries the
observations out, with no hidden state. Between forward and backward pass the operands are kept as codes, a byte each.

Which product it is, a `Product` says: `ops.dot`, `ops.conv` and `ops.ragged` have one each.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fp8jax import shims
from fp8jax.observe import Observed, observed, seal_of, stacked_observed, tap
from fp8jax.ops.cast import Codes, boxes_of, cast
from fp8jax.ops.execution import Operand
from fp8jax.recipe import OPERANDS, Recipe
from fp8jax.scaling import scale_from_exponent
from fp8jax.state import LEAVES, SiteScales, observes_flushed

# The name, as of `jax.ad_checkpoint.checkpoint_name`, of all that a backward pass needs of the forward one.
CODES = "fp8_codes"


@dataclasses.dataclass(frozen=True)
class Product:
    """What is static about a product: enough for all three, and hashable.

    Args:
      recipe: the casts and the execution.
      out_dtype, lhs_dtype, rhs_dtype: of the result and the gradients.
      seeding: scale each operand by its own amax and not by `scales`.
    """

    recipe: Recipe
    out_dtype: Any
    lhs_dtype: Any
    rhs_dtype: Any
    seeding: bool

    def axes(self, product: str, operand: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Of an operand in one of the three products: its rank, its kept axes, and its contracted axes."""
        raise NotImplementedError

    def forward(self, lhs: Operand, rhs: Operand, extra: Any) -> jax.Array:
        """The product of two operands."""
        raise NotImplementedError

    def gradient_of_lhs(self, grad: Operand, rhs: Operand, lhs: Operand, extra: Any) -> jax.Array:
        """What sends `grad` back to the lhs; that is given for its shape and sharding."""
        raise NotImplementedError

    def gradient_of_rhs(self, lhs: Operand, grad: Operand, rhs: Operand, extra: Any) -> jax.Array:
        """What sends `grad` back to the rhs; that is given for its shape and sharding."""
        raise NotImplementedError


@functools.partial(jax.tree_util.register_dataclass, data_fields=["forward", "backward", "seen"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Ahead:
    """An operand that was cast before the product, for several uses of it; or only observed before.

    Attributes:
      forward: the operand of the forward product; None where it was only observed.
      backward: that of the gradient it takes part in; None where it is the same.
      seen: what was observed; None where its scaling is not delayed.
    """

    forward: Operand | None
    backward: Operand | None
    seen: Observed | None

    @property
    def is_cast(self) -> bool:
        """Whether it holds the operand, and not its amax alone."""
        return self.forward is not None

    def as_bytes(self) -> "Ahead":
        """With all codes as uint8, to be sliced and kept."""
        return self._with(Codes.as_bytes)

    def as_codes(self) -> "Ahead":
        """With codes again."""
        return self._with(Codes.as_codes)

    def _with(self, change) -> "Ahead":
        forward, backward = (change(operand) if isinstance(operand, Codes) else operand for operand in (self.forward, self.backward))
        return Ahead(forward, backward, self.seen)


def check_operands(recipe: Recipe, scales: SiteScales | None, **operands: jax.Array) -> None:
    """Raises TypeError where operands are no floats, or the scales are not the recipe's."""
    for name, operand in operands.items():
        if not jnp.issubdtype(jnp.result_type(operand), jnp.floating):
            raise TypeError(f"{name} must hold floats; got {jnp.result_type(operand)}. "
                            "Integer and complex products stay with jax.lax.")
    casts = recipe.delayed_casts
    expected = None if not any(casts) else casts
    got = None if scales is None else scales.casts
    if got != expected:
        raise TypeError(f"scales must be those of the recipe's operands with delayed scaling; got casts {got} and the "
                        f"recipe has {expected}. Make them with SiteScales.zeros(site, recipe.delayed_casts), or pass "
                        "None where there are none.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(product: Product, lhs: jax.Array, rhs: jax.Array, extra: Any, scales: SiteScales | None, ahead: dict[str, Ahead]) -> jax.Array:
    """The product of `lhs` and `rhs`, in FP8.

    Args:
      product: which one (static).
      lhs, rhs: float arrays; where `ahead` has the operand, it takes the gradient and is not read.
      extra: arrays of integers that the product depends on; none of them is ().
      scales: exponents of the operands with delayed scaling, or None.
      ahead: operands cast before, by name.
    """
    return _primal(product, lhs, rhs, extra, _nameless(scales), ahead)


def _nameless(scales: SiteScales | None) -> SiteScales | None:
    return None if scales is None else scales.replace(site="")


# Inlined jits: their traces are cached, so the many sites of a model with the same shapes are traced once. Scales lose their
# site's name on the way in, since that would make each site another case.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _primal(product, lhs, rhs, extra, scales, ahead):
    operands = (ahead[name].forward if name in ahead and ahead[name].is_cast else _operand(product, "forward", name, operand, scales)
                for name, operand in (("lhs", lhs), ("rhs", rhs)))
    with jax.named_scope("forward"):
        return product.forward(*operands, extra)


def casts_of(product: Product, name: str) -> tuple:
    """What `cast_ahead` depends on beside the operand and its scale; hashable."""
    return tuple(_how(product, which, name) for which in ("forward", {"lhs": "drhs", "rhs": "dlhs"}[name])), product.seeding


def cast_ahead(product: Product, name: str, operand: jax.Array, scales: SiteScales | None) -> Ahead:
    """Casts the lhs or the rhs for the forward product and for the gradient it takes part in; observes it, too.

    >>> from fp8jax import recipes
    >>> from fp8jax.ops.dot import dot_product
    >>> product = dot_product(jnp.ones((2, 4)), jnp.ones((4, 3)), (((1,), (0,)), ((), ())), recipe=recipes.rowwise())
    >>> ahead = cast_ahead(product, "rhs", jnp.ones((4, 3)), None)
    >>> ahead.forward.scale.shape, ahead.backward.scale.shape
    ((1, 3), (4, 1))
    """
    return _cast_ahead(product, name, operand, _nameless(scales))


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _cast_ahead(product, name, operand, scales):
    gradient = {"lhs": "drhs", "rhs": "dlhs"}[name]
    forward = _operand(product, "forward", name, operand, scales)
    same = _how(product, "forward", name) == _how(product, gradient, name)
    return Ahead(forward, None if same else _operand(product, gradient, name, operand, scales), observe(operand, scales, name))


def _how(product: Product, which: str, name: str):
    """The cast of an operand in one of the three products, and which elements share a scale there."""
    spec = getattr(getattr(product.recipe, which), name)
    return None if spec is None else (spec, boxes_of(spec.scaling, *product.axes(which, name)))


def _operand(product: Product, which: str, name: str, operand: jax.Array, scales: SiteScales | None) -> Operand:
    how = _how(product, which, name)
    if how is None:
        return operand
    spec, boxes = how
    delayed = spec.delayed is not None and not product.seeding
    return cast(operand, spec, boxes, scale_from_exponent(_exponent(scales, name)) if delayed else None)


def _completed(product: Product, name: str, operand: jax.Array, scales: SiteScales | None, ahead: Ahead | None) -> Ahead:
    if ahead is not None and ahead.is_cast:
        return ahead
    own = cast_ahead(product, name, operand, scales)
    return own if ahead is None else dataclasses.replace(own, seen=ahead.seen)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _forward(product, lhs, rhs, extra, scales, ahead):
    ahead = {name: _completed(product, name, operand, scales, ahead.get(name)) for name, operand in (("lhs", lhs), ("rhs", rhs))}
    with jax.named_scope("forward"):
        out = product.forward(ahead["lhs"].forward, ahead["rhs"].forward, extra)
    operands = {name: cast.forward if cast.backward is None else cast.backward for name, cast in ahead.items()}
    kept = {name: operand.as_bytes() if isinstance(operand, Codes) else operand for name, operand in operands.items()}
    seen = {name: cast.seen for name, cast in ahead.items()}
    if scales is not None and scales.seal.ndim > 1:  # Lanes are divided over devices, and would be gathered to be put together.
        return out, (kept, seen), (extra, scales)
    kept, numbers = _without_numbers(product, kept, seen, scales)
    return out, (kept, numbers), (extra, None if scales is None else scales.replace(**dict.fromkeys(LEAVES)))


def _without_numbers(product: Product, kept: dict[str, Operand], seen: dict[str, Observed | None], scales: SiteScales | None):
    """What a backward pass needs, with the single numbers that belong to the state in one array of their own.

    A scan stacks each array that is kept by a kernel of its own, which for one number is all launch and no work. Scales of
    the operand itself stay with it: under `vmap` each member may have its own, and what is observed must not.
    """
    if scales is None:
        return kept, None
    numbers = jax.tree.leaves(seen)
    for name, operand in kept.items():
        if _has_state(product, operand):
            numbers.append(operand.scale)
            kept = kept | {name: dataclasses.replace(operand, scale=None)}
    numbers += [exponent for exponent in (scales.grad,) if exponent is not None]
    return kept, jnp.stack([jnp.broadcast_to(number, scales.seal.shape[:-1]) for number in numbers], axis=-1)


def _with_numbers(product: Product, kept: dict[str, Operand], numbers: jax.Array | None, scales: SiteScales | None):
    """What `_without_numbers` took apart: the operands, what was seen of lhs and rhs, and the scales."""
    if scales is None:
        return kept, {"lhs": None, "rhs": None}, None
    if isinstance(numbers, dict):  # of lanes, which stay apart
        return kept, numbers, scales
    left = iter(jnp.moveaxis(numbers, -1, 0))
    cast_of = dict(zip(OPERANDS, scales.casts, strict=True))
    seen = {name: None if cast_of[name] is None else Observed(next(left), next(left) if cast_of[name].delayed.flushed else None)
            for name in kept}
    kept = {name: dataclasses.replace(operand, scale=next(left)) if _has_state(product, operand) else operand
            for name, operand in kept.items()}
    # In the place of an exponent that is not read any more, something of its shape.
    exponents = {name: None if observed is None else observed.amax for name, observed in seen.items()}
    grad = None if cast_of["grad"] is None else next(left)
    zeros = jnp.zeros_like(numbers[..., :1])
    return kept, seen, scales.replace(**exponents, grad=grad, seal=zeros, flushed=zeros if observes_flushed(scales.casts) else None)


def _has_state(product: Product, operand: Operand) -> bool:
    return isinstance(operand, Codes) and operand.spec.delayed is not None and not product.seeding


@_forward.defjvp
def _(product, primals, tangents):
    _check_second_order(product)
    lhs, rhs, extra, scales, ahead = primals
    of_lhs, of_rhs, _, of_scales, _ = tangents

    def straight_through(lhs, rhs, scales):
        cast = (ahead[name].forward if name in ahead and ahead[name].is_cast else _operand(product, "forward", name, operand, scales)
                for name, operand in (("lhs", lhs), ("rhs", rhs)))
        out = product.forward(*map(_with_derivative_of, (lhs, rhs), cast), extra)
        # What comes back through here is no gradient of the site, whose scale it would not fit: it is not cast, nor observed.
        return out if scales is None else tap(out, scales, observe_operands(lhs, rhs, scales))

    _, of_out = jax.jvp(straight_through, (lhs, rhs, scales), (of_lhs, of_rhs, of_scales))
    out, *kept = _forward(product, *primals)
    return (out, *kept), (of_out, *_zero_tangents(kept))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _backward(product, residuals, grad):
    (kept, numbers), (extra, scales), _ = residuals
    kept, seen, scales = _with_numbers(product, kept, numbers, scales)
    kept = {name: operand.as_codes() if isinstance(operand, Codes) else operand for name, operand in kept.items()}
    grad_for_lhs = _operand(product, "dlhs", "grad", grad, scales)
    same = _how(product, "dlhs", "grad") == _how(product, "drhs", "grad")
    grad_for_rhs = grad_for_lhs if same else _operand(product, "drhs", "grad", grad, scales)
    with jax.named_scope("dlhs"):
        dlhs = product.gradient_of_lhs(grad_for_lhs, kept["rhs"], kept["lhs"], extra)
    with jax.named_scope("drhs"):
        drhs = product.gradient_of_rhs(kept["lhs"], grad_for_rhs, kept["rhs"], extra)
    observed = None if scales is None else observation(scales, **seen, grad=observe(grad, scales, "grad"))
    return dlhs, drhs, observed


@_backward.defjvp
def _(product, primals, tangents):
    _check_second_order(product)
    (_, _, operands), grad = residuals, _ = primals
    (_, _, of_operands), of_grad = tangents
    gradients = functools.partial(_straight_through, product, residuals)
    _, (of_dlhs, of_drhs) = jax.jvp(gradients, (operands, grad), (of_operands, of_grad))
    dlhs, drhs, observed = _backward(product, *primals)
    return (dlhs, drhs, observed), (of_dlhs, of_drhs, _zero_tangents(observed))


def _straight_through(product, residuals, operands, grad):
    """Both gradients in float32, of the very values that `_backward` multiplies, as if casts were the identity.

    So second derivatives are products of these values with tangents in full precision.
    """
    (kept, numbers), (extra, scales), _ = residuals
    kept, _, scales = _with_numbers(product, kept, numbers, scales)
    lhs, rhs = (_with_derivative_of(operand, kept[name]) for name, operand in zip(("lhs", "rhs"), operands))
    for_lhs, for_rhs = (_with_derivative_of(grad, _operand(product, which, "grad", grad, scales)) for which in ("dlhs", "drhs"))
    return product.gradient_of_lhs(for_lhs, rhs, lhs, extra), product.gradient_of_rhs(lhs, for_rhs, rhs, extra)


def _with_derivative_of(array: jax.Array, operand: Operand) -> jax.Array:
    """The values of a cast operand, with the derivative of what was cast."""
    array = array.astype(jnp.float32)
    if not isinstance(operand, Codes):
        return array
    codes = operand.as_codes() if operand.data.dtype == jnp.uint8 else operand
    return array + jax.lax.stop_gradient(codes.values(jnp.float32, scaled=True) - array)


def _check_second_order(product: Product) -> None:
    # Codes have no tangents: without the operands, what came out would lack all terms that go through them, in silence.
    if not product.recipe.second_order:
        raise NotImplementedError(
            "a product in FP8 has first derivatives only, unless its recipe says second_order=True; got a second one, as of "
            "jax.grad(jax.grad(...)). Use dataclasses.replace(recipe, second_order=True), which keeps operands beside their "
            "codes; or take the inner derivative inside the function that fp8jax.fp8 transforms: its products are sites, too.")


def _zero_tangents(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating)
                        else np.zeros(leaf.shape, jax.dtypes.float0), tree)


def _forward_rule(product, lhs, rhs, extra, scales, ahead):
    if product.recipe.second_order and not shims.KEEPS_RULES:
        raise NotImplementedError(f"second_order=True needs JAX 0.12 or newer; got {jax.__version__}, which loses the rules of functions "
                                  "inside a scan when it differentiates twice. Use second_order=False, or a newer JAX.")
    out, kept, (extra, rest) = _forward(product, lhs, rhs, extra, _nameless(scales), ahead)
    rest = None if scales is None else rest.replace(site=scales.site)
    # Named out here: policies of `jax.checkpoint` don't look into rules.
    return out, (checkpoint_name(kept, CODES), (extra, rest), (lhs, rhs) if product.recipe.second_order else None)


def _backward_rule(product, residuals, grad):
    kept, (extra, scales), operands = residuals
    dlhs, drhs, observed = _backward(product, (kept, (extra, _nameless(scales)), operands), grad)
    observed = None if observed is None else jax.lax.stop_gradient(observed.replace(site=scales.site))
    return dlhs, drhs, None, observed, None


run.defvjp(_forward_rule, _backward_rule)


def observation(scales: SiteScales, lhs: Observed | None, rhs: Observed | None, grad: Observed | None) -> SiteScales:
    """The cotangent of `scales` that carries what was seen (None where not observed) and the seals."""
    # Zeros like the seal, and not plain ones, since they must vary over the same mesh axes.
    zero = jnp.zeros_like(scales.seal[..., 0])

    def measures(name):
        found = (getattr(one, name, None) for one in (lhs, rhs, grad))
        return [zero if one is None else jnp.broadcast_to(one, zero.shape) for one in found]

    amaxes = measures("amax")
    kept = {name: None if getattr(scales, name) is None else amax for name, amax in zip(OPERANDS, amaxes)}
    flushed = None if scales.flushed is None else jnp.stack(measures("flushed"), axis=-1)
    return scales.replace(**kept, seal=jnp.stack([seal_of(amax) for amax in amaxes], axis=-1), flushed=flushed)


def observe_operands(lhs: jax.Array, rhs: jax.Array, scales: SiteScales) -> SiteScales:
    """What a forward pass sees of `lhs` and `rhs`, and nothing of the gradient, as `observation` packs it."""
    return observation(scales, observe(lhs, scales, "lhs"), observe(rhs, scales, "rhs"), None)


def _exponent(scales: SiteScales, name: str) -> jax.Array:
    """The exponent of an operand's scale, whole: an average of states, as of an EMA, is at worst another valid scale."""
    exponent = getattr(scales, name)
    return jnp.round(exponent[0] if exponent.ndim else exponent)  # lanes are copies


def observe(operand: jax.Array, scales: SiteScales | None, name: str) -> Observed | None:
    """What is to be known of an operand of a site; None where its scaling is not delayed."""
    exponent = None if scales is None else getattr(scales, name)
    return None if exponent is None else observed(operand, jnp.round(exponent), scales.casts[OPERANDS.index(name)])


def observe_ahead(operand: jax.Array, scales: SiteScales, name: str) -> Ahead | None:
    """The same of an operand that several products share, or that is stacked over the loops that its scales are stacked over."""
    exponent = getattr(scales, name)
    return None if exponent is None else Ahead(
        None, None, stacked_observed(operand, jnp.round(exponent), scales.casts[OPERANDS.index(name)]))
