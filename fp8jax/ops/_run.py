"""A bilinear product whose forward and backward pass run in FP8, and whose backward pass returns
what it observed.

    forward   out  = cast(lhs)  . cast(rhs)
    dlhs      dlhs = cast(grad) . cast(rhs)^T
    drhs      drhs = cast(lhs)^T . cast(grad)

The casts' scales are arguments. In the place of their cotangents the backward pass returns the
amaxes of lhs, rhs and grad - the gradient with respect to a scale is the amax that was observed -
and so `jax.grad` itself carries the observations out, with no hidden state. Between forward and
backward pass the operands are kept as codes, a byte each.

Which product it is, a `Product` says: `ops.dot`, `ops.conv` and `ops.ragged` have one each.
`ops.operands` casts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fp8jax import _shims
from fp8jax._observe import Observed, after, site_exponents, tap
from fp8jax._recipe import OPERANDS, Recipe
from fp8jax._site_exponents import SiteExponents
from fp8jax._site_scales import SiteScales, observes_flushed
from fp8jax.ops._cast import Codes
from fp8jax.ops._execution import Operand
from fp8jax.ops._numbers import Numbers
from fp8jax.ops._operands import (
    CODES,
    Ahead,
    Uncast,
    as_codes,
    completed,
    is_cast,
    nameless,
    observation,
    observe,
    observe_operands,
    operand_of,
    operands_of,
    with_state,
    with_states,
    without_state,
)
from fp8jax.ops._product import Product
from fp8jax.ops._ready import Ready, own_scales


def checked_scales(
    recipe: Recipe, scales: SiteScales | None, **operands: jax.Array
) -> SiteExponents | None:
    """The exponents of a product's scales; TypeError where operands are no floats, or the scales
    are not the recipe's.
    """
    for name, operand in operands.items():
        if not jnp.issubdtype(jnp.result_type(operand), jnp.floating):
            raise TypeError(
                f"{name} must hold floats; got {jnp.result_type(operand)}. "
                "Integer and complex products stay with jax.lax."
            )
    casts = recipe.delayed_casts
    expected = None if not any(casts) else casts
    got = None if scales is None else scales.casts
    if got != expected:
        raise TypeError(
            f"scales must be those of the recipe's operands with delayed scaling; got casts {got} "
            "and the "
            f"recipe has {expected}. Make them with SiteScales.zeros(site, recipe.delayed_casts), "
            "or pass "
            "None where there are none."
        )
    return None if scales is None else site_exponents(scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(
    product: Product,
    lhs: jax.Array,
    rhs: jax.Array,
    extra: Any,
    scales: SiteExponents | Ready | None,
    ahead: dict[str, Ahead],
) -> jax.Array:
    """The product of `lhs` and `rhs`, in FP8.

    Args:
      product: which one (static).
      lhs, rhs: float arrays; where `ahead` has the operand, it takes the gradient and is not read.
      extra: arrays of integers that the product depends on; none of them is ().
      scales: exponents of the operands with delayed scaling, or None; with what products read of
        them, where that was made before.
      ahead: operands cast before, by name.
    """
    return _primal(product, lhs, rhs, extra, nameless(scales), ahead)


# Inlined jits: their traces are cached, so the many sites of a model with the same shapes are
# traced once. As calls they would be lowered once, too; but with calls, CPU processes that train
# together have hung in their collectives.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _primal(product, lhs, rhs, extra, scales, ahead):
    with jax.named_scope("forward"):
        return product.forward(*_forward_operands(product, lhs, rhs, scales, ahead), extra)


def _forward_operands(product, lhs, rhs, scales, ahead):
    return [
        as_codes(with_state(name, ahead[name], scales).ready)
        if is_cast(name, ahead)
        else operand_of(product, "forward", name, operand, scales, _known(name, ahead))
        for name, operand in (("lhs", lhs), ("rhs", rhs))
    ]


def _known(name: str, ahead: dict[str, Ahead]) -> jax.Array | None:
    """The scale of an operand of the forward product, where it was made before."""
    return ahead[name].scales.get("forward") if name in ahead else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(product, lhs, rhs, extra, scales, ahead):
    whole = {
        name: completed(product, name, operand, scales, ahead.get(name))
        for name, operand in (("lhs", lhs), ("rhs", rhs))
    }
    with jax.named_scope("forward"):
        out = product.forward(
            _after_observation(whole["lhs"]), _after_observation(whole["rhs"]), extra
        )
    kept = {
        name: without_state(cast).as_kept().kept
        for name, cast in whole.items()
        if not is_cast(name, ahead)
    }
    return out, kept, {name: cast.seen for name, cast in whole.items()}


def _after_observation(cast: Ahead) -> Operand:
    """An operand as the forward product reads it: on CPUs not before it was observed, see
    `fp8jax._observe.after`.
    """
    operand = as_codes(cast.ready)
    if not isinstance(operand, Codes) or cast.seen is None or cast.seen.amax.ndim:
        return operand
    scale, ready = operand.scale, operand.ready
    if ready is None:
        return dataclasses.replace(operand, scale=after(scale, cast.seen.amax))
    row = after(ready.row, jnp.broadcast_to(cast.seen.amax, ready.row.shape))
    return dataclasses.replace(operand, ready=dataclasses.replace(ready, row=row))


_packed = jax.jit(Numbers.of, static_argnums=1, inline=True)


def without_numbers(
    product: Product, seen: dict[str, Observed | None], scales: SiteExponents | Ready | None
) -> tuple[Any, Any]:
    """What a backward pass needs beside the operands; in a loop in few arrays, since each is
    stacked by a kernel of its own.

    For a number that is all launch and no work. So what was seen and the exponents are kept in one
    array there; of exponents that a scan has sliced from one, that one, which is no new one. Scales
    that are no state stay with their operand: under `vmap` each member may have its own, and what
    is observed must not.
    """
    own = own_scales(scales)
    if own is None:
        return None, None
    if (
        not product.looped or own.ndim
    ):  # Lanes are divided over devices, and would be gathered to be put together.
        return seen, scales
    if isinstance(scales, Ready):
        return _packed(seen, ()), dataclasses.replace(scales, scales=None)
    exponents = {name: own.of_operand(name) for name in OPERANDS}
    return _packed((seen, exponents), ()), own.replace(values=None)


def with_numbers(numbers: Any, scales: SiteExponents | Ready | None) -> tuple[Any, Any]:
    """What `without_numbers` took: what was seen of lhs and rhs, and the scales."""
    if scales is None:
        return {"lhs": None, "rhs": None}, None
    if not isinstance(numbers, Numbers):
        return numbers, scales
    if isinstance(scales, Ready):
        return numbers.apart(), dataclasses.replace(scales, scales=scales.restored())
    seen, exponents = numbers.apart()
    zero = jnp.zeros_like(numbers.packed[0])
    values = [zero if exponents[name] is None else exponents[name] for name in OPERANDS]
    values += [zero] * len(values) if observes_flushed(scales.casts) else []
    return seen, scales.replace(values=jnp.stack(values))


@_forward.defjvp
def _(product, primals, tangents):
    check_second_order(product)
    lhs, rhs, extra, scales, ahead = primals
    of_lhs, of_rhs, _, of_scales, _ = tangents

    def straight_through(lhs, rhs, scales):
        cast = _forward_operands(product, lhs, rhs, scales, ahead)
        out = product.forward(*map(_with_derivative_of, (lhs, rhs), cast), extra)
        # What comes back through here is no gradient of the site, whose scale it would not fit: it
        # is not cast, nor observed.
        return (
            out
            if scales is None
            else tap(out, own_scales(scales), observe_operands(lhs, rhs, scales))
        )

    _, of_out = jax.jvp(straight_through, (lhs, rhs, scales), (of_lhs, of_rhs, of_scales))
    out, *kept = _forward(product, *primals)
    return (out, *kept), (of_out, *zero_tangents(kept))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(product, residuals, grad):
    kept, seen, scales, extra, _ = residuals
    kept = {name: as_codes(operand) for name, operand in with_states(product, kept, scales).items()}
    grads = operands_of(product, "grad", grad, scales)
    grad_for_lhs, grad_for_rhs = grads[0], grads[-1]
    with jax.named_scope("dlhs"):
        dlhs = product.gradient_of_lhs(grad_for_lhs, kept["rhs"], kept["lhs"], extra)
    with jax.named_scope("drhs"):
        drhs = product.gradient_of_rhs(kept["lhs"], grad_for_rhs, kept["rhs"], extra)
    observed = (
        None if scales is None else observation(scales, **seen, grad=observe(grad, scales, "grad"))
    )
    return dlhs, drhs, observed


@_backward.defjvp
def _(product, primals, tangents):
    check_second_order(product)
    (*_, operands), grad = residuals, _ = primals
    (*_, of_operands), of_grad = tangents
    gradients = functools.partial(_straight_through, product, residuals)
    _, (of_dlhs, of_drhs) = jax.jvp(gradients, (operands, grad), (of_operands, of_grad))
    dlhs, drhs, observed = _backward(product, *primals)
    return (dlhs, drhs, observed), (of_dlhs, of_drhs, zero_tangents(observed))


def _straight_through(product, residuals, operands, grad):
    """Both gradients in float32, of the very values that `_backward` multiplies, as if casts were
    the identity.

    So second derivatives are products of these values with tangents in full precision.
    """
    kept, _, scales, extra, _ = residuals
    kept = with_states(product, kept, scales)
    lhs, rhs = (
        _with_derivative_of(operand, kept[name]) for name, operand in zip(("lhs", "rhs"), operands)
    )
    for_lhs, for_rhs = (
        _with_derivative_of(grad, operand_of(product, which, "grad", grad, scales))
        for which in ("dlhs", "drhs")
    )
    return product.gradient_of_lhs(for_lhs, rhs, lhs, extra), product.gradient_of_rhs(
        lhs, for_rhs, rhs, extra
    )


def _with_derivative_of(array: jax.Array, operand: Operand) -> jax.Array:
    """The values of a cast operand, with the derivative of what was cast."""
    array = array.astype(jnp.float32)
    if not isinstance(operand, Codes):
        return array
    return array + jax.lax.stop_gradient(
        operand.as_codes().values(jnp.float32, scaled=True) - array
    )


def check_second_order(product: Product) -> None:
    """NotImplementedError, from a second derivative, where the recipe has none."""
    # Codes have no tangents: without the operands, what came out would lack all terms that go
    # through them, in silence.
    if not product.recipe.second_order:
        raise NotImplementedError(
            "a product in FP8 has first derivatives only, unless its recipe says "
            "second_order=True; got a second one, as of "
            "jax.grad(jax.grad(...)). Use dataclasses.replace(recipe, second_order=True), which "
            "keeps operands beside their "
            "codes; or take the inner derivative inside the function that fp8jax.fp8 transforms: "
            "its products are sites, too."
        )


def zero_tangents(tree: Any) -> Any:
    """Tangents of what has no derivative."""
    return jax.tree.map(
        lambda leaf: (
            jnp.zeros_like(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        tree,
    )


def check_keeps_rules(product: Product) -> None:
    """NotImplementedError where the recipe has second derivatives and this JAX loses them."""
    if product.recipe.second_order and not _shims.KEEPS_RULES:
        raise NotImplementedError(
            f"second_order=True needs JAX 0.12 or newer; got {jax.__version__}, which loses the "
            "rules of functions "
            "inside a scan when it differentiates twice. Use second_order=False, or a newer JAX."
        )


# Around their rules of derivatives, so that these are one function for all sites alike.
_forward_traced_once = jax.jit(_forward, static_argnums=0, inline=True)
_backward_traced_once = jax.jit(_backward, static_argnums=0, inline=True)


def _forward_rule(product, lhs, rhs, extra, scales, ahead):
    check_keeps_rules(product)
    out, kept, seen = _forward_traced_once(product, lhs, rhs, extra, nameless(scales), ahead)
    numbers, rest = without_numbers(product, seen, scales)
    # Named out here: policies of `jax.checkpoint` don't look into rules.
    kept, numbers = checkpoint_name((kept, numbers), CODES)
    # What was cast before, or is at hand, is kept as it came in: of a stack that a scan slices, it
    # then is that stack, and no other is made.
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if is_cast(name, ahead):
            kept[name] = without_state(ahead[name]).kept
        elif isinstance(kept[name], Uncast):
            kept[name] = dataclasses.replace(kept[name], operand=operand)
    return out, (kept, numbers, rest, extra, (lhs, rhs) if product.recipe.second_order else None)


def _backward_rule(product, residuals, grad):
    kept, numbers, rest, extra, operands = residuals
    seen, scales = with_numbers(numbers, rest)
    dlhs, drhs, observed = _backward_traced_once(
        product, (kept, seen, nameless(scales), extra, operands), grad
    )
    own = own_scales(scales)
    if observed is not None and own is not None:
        observed = jax.lax.stop_gradient(observed.replace(site=own.site))
    if isinstance(rest, Ready):
        observed = dataclasses.replace(rest, scales=observed, rows=None)
    return dlhs, drhs, None, observed, None


run.defvjp(_forward_rule, _backward_rule)
