"""`dot_general` whose three products run in FP8, and whose backward pass returns what it observed.

    forward   out  = cast(lhs)  . cast(rhs)
    dlhs      dlhs = cast(grad) . cast(rhs)^T
    drhs      drhs = cast(lhs)^T . cast(grad)

The casts' scales are arguments. In the place of their cotangents the backward pass returns the amaxes of lhs, rhs and
grad - the gradient with respect to a scale is the amax that was observed - and so `jax.grad` itself carries the
observations out, with no hidden state. Between forward and backward pass the operands are kept as codes, a byte each.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fp8jax.codec import encode_bits
from fp8jax.observe import observed_amax, seal_of
from fp8jax.ops.execution import DimensionNumbers, multiply_codes, sharding_of_product
from fp8jax.recipe import CastSpec, Recipe
from fp8jax.scaling import PerTensor, exponent_from_amax, group_amax, scale_from_exponent
from fp8jax.state import SiteScales

# Hopper's tensor cores sum faster with fewer bits under DEFAULT; the gradients want the full sum.
_FORWARD, _BACKWARD = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class _Dot:
    """What is static about a product: enough for all three, and hashable."""

    recipe: Recipe
    dimension_numbers: DimensionNumbers
    out_dtype: Any
    lhs_dtype: Any
    rhs_dtype: Any
    out_sharding: NamedSharding | None
    seeding: bool


@dataclasses.dataclass(frozen=True)
class _Codes:
    """A cast operand: `values = decode(data) * 2**exponent`."""

    data: jax.Array
    exponent: jax.Array


jax.tree_util.register_dataclass(_Codes, ["data", "exponent"], [])


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    scales: SiteScales | None = None,
    *,
    recipe: Recipe,
    preferred_element_type: Any = None,
    out_sharding: NamedSharding | None = None,
    seeding: bool = False,
) -> jax.Array:
    """`jax.lax.dot_general` in FP8, forward and backward, as `recipe` says.

    Args:
      lhs, rhs: arrays of float32, bfloat16 or float16 (float64 where enabled), any rank.
      dimension_numbers: as `jax.lax.dot_general`'s: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`.
      scales: the exponents of the operands with delayed scaling; None where the recipe has none. Their gradient is the
        amaxes observed, with their seals.
      recipe: the casts and the execution.
      preferred_element_type: dtype of the result; by default the operands' common one. Sums are float32 always.
      out_sharding: of the result, on meshes with explicit axes, where JAX can't infer it.
      seeding: scale each operand by its own amax and not by `scales`, for first scales; observations as usual.

    Returns:
      The product, of `preferred_element_type`. Reverse mode only.

    Raises:
      TypeError: operands that are not floats; scales missing, surplus or of another recipe.

    >>> from fp8jax import recipes
    >>> x, w = jnp.ones((2, 4)), jnp.full((4, 3), 0.5)
    >>> recipe = recipes.delayed()
    >>> scales = SiteScales.zeros("dot", recipe.delayed_casts)
    >>> def loss(scales, w):
    ...     return dot_general(x, w, (((1,), (0,)), ((), ())), scales, recipe=recipe).sum()
    >>> amax, dw = jax.grad(loss, argnums=(0, 1))(scales, w)
    >>> float(amax.rhs), dw[0, 0]
    (0.5, Array(2., dtype=float32))
    """
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if not jnp.issubdtype(jnp.result_type(operand), jnp.floating):
            raise TypeError(f"{name} must hold floats; got {jnp.result_type(operand)}. "
                            "Integer and complex products stay with jax.lax.dot_general.")
    casts = recipe.delayed_casts
    expected = None if not any(casts) else casts
    got = None if scales is None else scales.casts
    if got != expected:
        raise TypeError(f"scales must be those of the recipe's operands with delayed scaling; got casts {got} and the "
                        f"recipe has {expected}. Make them with SiteScales.zeros(site, recipe.delayed_casts), or pass "
                        "None where there are none.")
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    dot = _Dot(
        recipe=recipe,
        dimension_numbers=((_axes(lhs_contracting, lhs), _axes(rhs_contracting, rhs)),
                           (_axes(lhs_batch, lhs), _axes(rhs_batch, rhs))),
        out_dtype=jnp.dtype(preferred_element_type or jnp.result_type(lhs, rhs)),
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs.dtype,
        out_sharding=out_sharding,
        seeding=seeding,
    )
    return _product(dot, lhs, rhs, scales)


def _axes(axes, operand) -> tuple[int, ...]:
    return tuple(int(axis) % operand.ndim for axis in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dot: _Dot, lhs, rhs, scales):
    return _primal(dot, lhs, rhs, scales)


# Inlined jits: their traces are cached, so the many sites of a model with the same shapes are traced once.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _primal(dot: _Dot, lhs, rhs, scales):
    casts = dot.recipe.forward
    return _multiply(dot, _cast(lhs, casts.lhs, _exponent(scales, "lhs"), dot.seeding),
                     _cast(rhs, casts.rhs, _exponent(scales, "rhs"), dot.seeding))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _forward(dot: _Dot, lhs, rhs, scales):
    recipe = dot.recipe
    kept: dict[str, Any] = {}
    for name, operand, gradient in (("lhs", lhs, recipe.drhs), ("rhs", rhs, recipe.dlhs)):
        spec = getattr(recipe.forward, name)
        codes = _cast(operand, spec, _exponent(scales, name), dot.seeding)
        kept[name] = codes
        backward_spec = getattr(gradient, name)
        kept[f"{name}_backward"] = codes if backward_spec == spec else _cast(operand, backward_spec, None, dot.seeding)
        kept[f"{name}_amax"] = _observe(operand, scales, name)
    out = _multiply(dot, kept.pop("lhs"), kept.pop("rhs"))
    return out, (jax.tree.map(_as_bytes, kept), scales)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _backward(dot: _Dot, residuals, grad):
    kept, scales = residuals
    recipe = dot.recipe
    for name, spec in (("lhs_backward", recipe.drhs.lhs), ("rhs_backward", recipe.dlhs.rhs)):
        codes = jax.lax.bitcast_convert_type(kept[name].data, spec.format.dtype)
        kept[name] = dataclasses.replace(kept[name], data=codes)
    grad_for_lhs = _cast(grad, recipe.dlhs.grad, _exponent(scales, "grad"), dot.seeding)
    same = recipe.dlhs.grad == recipe.drhs.grad
    grad_for_rhs = grad_for_lhs if same else _cast(grad, recipe.drhs.grad, None, dot.seeding)
    dlhs = _gradient_of_lhs(dot, grad_for_lhs, kept["rhs_backward"], kept["lhs_backward"].data)
    drhs = _gradient_of_rhs(dot, kept["lhs_backward"], grad_for_rhs, kept["rhs_backward"].data)
    if scales is None:
        return dlhs, drhs, None
    amaxes = {"lhs": kept["lhs_amax"], "rhs": kept["rhs_amax"], "grad": _observe(grad, scales, "grad")}
    return dlhs, drhs, observation(scales, **amaxes)


def _refuse(dot: _Dot, primals, tangents):
    # Codes have no tangents: what came out would lack all terms that go through them, in silence.
    raise NotImplementedError(
        "a product in FP8 has first derivatives only; got a second one, as of jax.grad(jax.grad(...)) or jax.hessian. Take the "
        "inner derivative inside the function that fp8jax.fp8 transforms: its products are sites, too.")


_forward.defjvp(_refuse)
_backward.defjvp(_refuse)
_product.defvjp(_forward, _backward)


def _as_bytes(leaf: jax.Array) -> jax.Array:
    """Codes as uint8, the form they are kept in: XLA has no float8 slices on CPUs, and would widen what a scan stacks."""
    return jax.lax.bitcast_convert_type(leaf, jnp.uint8) if leaf.dtype.itemsize == 1 else leaf


def observation(scales: SiteScales, lhs, rhs, grad) -> SiteScales:
    """The cotangent of `scales` that carries these amaxes (None where not observed) and their seals."""
    # Zeros like the seal, and not plain ones, since they must vary over the same mesh axes.
    unseen = jnp.zeros_like(scales.seal[..., 0])
    amaxes = {name: unseen if amax is None else amax for name, amax in (("lhs", lhs), ("rhs", rhs), ("grad", grad))}
    seal = jnp.stack([seal_of(amax) for amax in amaxes.values()], axis=-1)
    kept = {name: None if getattr(scales, name) is None else amax for name, amax in amaxes.items()}
    return scales.replace(**kept, seal=seal)


def observe_operands(lhs: jax.Array, rhs: jax.Array, scales: SiteScales) -> SiteScales:
    """What a forward pass sees: the amaxes of `lhs` and `rhs`, and none of the gradient, as `observation` packs them."""
    return observation(scales, _observe(lhs, scales, "lhs"), _observe(rhs, scales, "rhs"), None)


def _exponent(scales, name):
    """The exponent of an operand's scale, whole: an average of states, as of an EMA, is at worst another valid scale."""
    exponent = None if scales is None else getattr(scales, name)
    return None if exponent is None else jnp.round(exponent)


def _observe(operand, scales, name):
    exponent = _exponent(scales, name)
    return None if exponent is None else observed_amax(operand, exponent)


def _cast(operand: jax.Array, spec: CastSpec, exponent: jax.Array | None, seeding: bool) -> _Codes:
    if exponent is None or seeding:
        margin = 1.0 if spec.delayed is None else spec.delayed.margin
        exponent = exponent_from_amax(group_amax(operand, PerTensor()), spec.format, margin)
    # Scaled in float32 whatever the operand is: a float16 would overflow, and a power of two changes no bits.
    scaled = operand.astype(jnp.float32) * scale_from_exponent(-exponent)
    return _Codes(encode_bits(scaled, spec.format, rounding=spec.rounding), exponent)


@jax.named_scope("forward")
def _multiply(dot: _Dot, lhs: _Codes, rhs: _Codes) -> jax.Array:
    return _scaled_product(dot, lhs, rhs, dot.dimension_numbers, dot.out_dtype, _FORWARD, dot.out_sharding)


def _scaled_product(dot, lhs, rhs, dimension_numbers, out_dtype, precision, out_sharding) -> jax.Array:
    narrow = out_dtype == jnp.bfloat16
    product = multiply_codes(
        lhs.data, rhs.data, dimension_numbers, out_dtype=jnp.bfloat16 if narrow else jnp.float32,
        precision=precision, execution=dot.recipe.execution, out_sharding=out_sharding)
    # Half of the exponents' sum twice: neither factor can overflow or vanish where their product doesn't.
    exponent = lhs.exponent + rhs.exponent
    half = jnp.floor(exponent * 0.5)
    first, second = (scale_from_exponent(part).astype(product.dtype) for part in (half, exponent - half))
    return (product * first * second).astype(out_dtype)


@jax.named_scope("dlhs")
def _gradient_of_lhs(dot: _Dot, grad: _Codes, rhs: _Codes, lhs_like: jax.Array) -> jax.Array:
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dot.dimension_numbers
    batch, lhs_kept, rhs_kept = _axes_of_product(dot, lhs_like, rhs.data)
    # Axes of the product: batch, the lhs's kept ones, and the contracted ones in the order of the rhs's axes.
    contracted = tuple(lhs_contracting[i] for i in _ascending(rhs_contracting))
    order = lhs_batch + _kept(lhs_like, lhs_contracting, lhs_batch) + contracted
    product = _scaled_product(
        dot, grad, rhs, ((rhs_kept, _kept(rhs.data, rhs_contracting, rhs_batch)), (batch, rhs_batch)),
        dot.lhs_dtype, _BACKWARD, sharding_of_product(lhs_like, order))
    return jnp.transpose(product, _ascending(order))


@jax.named_scope("drhs")
def _gradient_of_rhs(dot: _Dot, lhs: _Codes, grad: _Codes, rhs_like: jax.Array) -> jax.Array:
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dot.dimension_numbers
    batch, lhs_kept, rhs_kept = _axes_of_product(dot, lhs.data, rhs_like)
    contracted = tuple(rhs_contracting[i] for i in _ascending(lhs_contracting))
    order = rhs_batch + contracted + _kept(rhs_like, rhs_contracting, rhs_batch)
    product = _scaled_product(
        dot, lhs, grad, ((_kept(lhs.data, lhs_contracting, lhs_batch), lhs_kept), (lhs_batch, batch)),
        dot.rhs_dtype, _BACKWARD, sharding_of_product(rhs_like, order))
    return jnp.transpose(product, _ascending(order))


def _axes_of_product(dot: _Dot, lhs, rhs):
    """The axes of the forward product that are batch, kept from the lhs, and kept from the rhs."""
    (lhs_contracting, _), (lhs_batch, _) = dot.dimension_numbers
    batch, contracted = len(lhs_batch), len(lhs_contracting)
    middle = lhs.ndim - contracted
    return tuple(range(batch)), tuple(range(batch, middle)), tuple(range(middle, middle + rhs.ndim - contracted - batch))


def _kept(operand, contracting, batch) -> tuple[int, ...]:
    return tuple(axis for axis in range(operand.ndim) if axis not in contracting + batch)


def _ascending(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The order that sorts `axes`; of a permutation, its inverse."""
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))
