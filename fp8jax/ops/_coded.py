"""Products with a weight that is held as FP8 codes, forward and backward.

The codes are used as they are, in the product and in the gradient of the other operand; they have
no gradient themselves. Between the two passes nothing is kept but the codes, which are there
anyway. `ops.coded_dot` tells what becomes of their scales.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from fp8jax._observe import tap
from fp8jax._site_exponents import SiteExponents
from fp8jax.ops._cast import Codes
from fp8jax.ops._coded_dot import CodedDot
from fp8jax.ops._dot import Dot
from fp8jax.ops._operands import CODES, nameless, observation, observe, operand_of
from fp8jax.ops._product import Product
from fp8jax.ops._ready import Ready, own_scales
from fp8jax.ops._run import (
    check_keeps_rules,
    check_second_order,
    with_numbers,
    without_numbers,
    zero_tangents,
)
from fp8jax.ops._shardings import ShardedLike


def run_coded(
    product: Product,
    lhs: Any,
    rhs: Any,
    extra: Any,
    scales: SiteExponents | Ready | None,
    quantized: bool = True,
    observing: bool = False,
) -> tuple[jax.Array, SiteExponents | None]:
    """`fp8jax.ops._run.run` where an operand is a weight held as codes, which has no gradient and
    needs no cast; and what was seen of the other one, where `observing`.

    The other operand and its gradient are cast as the recipe says; or not, where it has no cast for
    them or `quantized` is False. Of two such weights, the smaller one is decoded.
    """
    if isinstance(lhs, Codes) and isinstance(rhs, Codes):
        if lhs.data.size < rhs.data.size:
            lhs = lhs.dequantize()
        else:
            rhs = rhs.dequantize()
    is_lhs = isinstance(lhs, Codes)
    dense, weight = (rhs, lhs) if is_lhs else (lhs, rhs)
    dense: Any
    # Without its name, by which all traces would differ.
    name, codes = "rhs" if is_lhs else "lhs", dataclasses.replace(weight.as_boxes(), name="")
    if isinstance(product, Dot):
        product = CodedDot.of(product, is_lhs)
        dense, codes = product.folded("forward", dense, codes)
        product = dataclasses.replace(product, **{f"{name}_dtype": dense.dtype})
    out: Any = _run(product, is_lhs, quantized, dense, codes, extra, scales)
    own = own_scales(scales)
    if not observing or own is None:
        return out, None
    return out, observation(own, **_seen(name, dense, own))


def _seen(name: str, operand: jax.Array, scales: SiteExponents | Ready | None) -> dict[str, Any]:
    """What there is to see at a product: of this one operand."""
    return {"lhs": None, "rhs": None, "grad": None} | {name: observe(operand, scales, name)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(product: Product, is_lhs: bool, quantized: bool, dense, codes: Codes, extra, scales):
    return _multiplied_traced_once(
        product, is_lhs, quantized, False, dense, codes, extra, nameless(scales)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _multiplied(
    product, is_lhs, quantized, backward, operand, codes, extra, scales, like: Any = None
):
    """The product, or the other operand's gradient, and in the backward pass what was observed.

    Args:
      product, is_lhs, quantized: as of `_run`.
      backward: whether it is the gradient.
      operand: the other operand, or the gradient of the result.
      codes: of the weight, as bytes.
      extra, scales: as of `_run`.
      like: of what the gradient is shaped and sharded.
    """
    which, name = "forward", "rhs" if is_lhs else "lhs"
    if backward:
        which, name = "drhs" if is_lhs else "dlhs", "grad"
    codes = codes.as_codes()
    if backward and isinstance(product, CodedDot):
        operand, codes = product.folded(which, operand, codes)
    cast = operand_of(product, which, name, operand, scales) if quantized else operand
    with jax.named_scope(which):
        if not backward:
            both = (codes, cast) if is_lhs else (cast, codes)
            return product.forward(*both, extra)
        if is_lhs:
            gradient = product.gradient_of_rhs(codes, cast, like, extra)
        else:
            gradient = product.gradient_of_lhs(cast, codes, like, extra)
    return gradient, None if scales is None else observe(operand, scales, "grad")


@_multiplied.defjvp
def _(product, is_lhs, quantized, backward, primals, tangents):
    check_second_order(product)
    operand, codes, extra, scales, *like = primals
    of_operand, _, _, of_scales, *_ = tangents
    run = functools.partial(_multiplied.fun, product, is_lhs, False, backward)

    def straight_through(operand, scales):
        out = run(operand, codes, extra, None, *like)
        if backward:
            return out[0]
        # As of `run`: what comes back through here is not observed, and what was is not lost.
        name = "rhs" if is_lhs else "lhs"
        return (
            out
            if scales is None
            else tap(out, own_scales(scales), observation(scales, **_seen(name, operand, scales)))
        )

    _, of_out = jax.jvp(straight_through, (operand, scales), (of_operand, of_scales))
    out = _multiplied(product, is_lhs, quantized, backward, *primals)
    if not backward:
        return out, of_out
    return out, (of_out, zero_tangents(out[1]))


# As of `ops.run`.
_multiplied_traced_once = jax.jit(_multiplied, static_argnums=(0, 1, 2, 3), inline=True)


def _forward_rule(product, is_lhs, quantized, dense, codes, extra, scales):
    check_keeps_rules(product)
    out = _run(product, is_lhs, quantized, dense, codes, extra, scales)
    own = nameless(scales)
    seen = _seen("rhs" if is_lhs else "lhs", dense, own)
    del seen["grad"]
    numbers, rest = without_numbers(product, seen, scales)
    return out, (codes, checkpoint_name(numbers, CODES), rest, extra, ShardedLike.of(dense))


def _backward_rule(product, is_lhs, quantized, residuals, grad):
    codes, numbers, rest, extra, like = residuals
    seen, scales = with_numbers(numbers, rest)
    gradient, of_grad = _multiplied_traced_once(
        product, is_lhs, quantized, True, grad, codes, extra, nameless(scales), like
    )
    observed = None
    if scales is not None:
        observed = jax.lax.stop_gradient(observation(scales, **seen, grad=of_grad))
    if isinstance(rest, Ready):
        observed = dataclasses.replace(rest, scales=observed, rows=None)
    return gradient, None, None, observed


_run.defvjp(_forward_rule, _backward_rule)
