"""First scales: what `init` and `calibrate` make of the amaxes of real passes."""

import functools
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import _xla
from fp8jax._bank import Scales
from fp8jax._progress import arguments_of, progress_bar
from fp8jax._recipe import OPERANDS
from fp8jax._scaling import exponent_from_amax
from fp8jax._site_scales import SiteScales
from fp8jax._state import find_stacks, with_stacks
from fp8jax._transform.analysis import Plan
from fp8jax._transform.arguments import is_coded
from fp8jax._transform.interpreter import evaluate
from fp8jax._transform.mode import Mode

# What JAX raises where a function has no gradient, and this library where it has none in FP8.
WITHOUT_GRADIENT = (NotImplementedError, TypeError, ValueError)

# Where a function's output is no scalar there is no loss to differentiate, and the gradients' first
# scales come from cotangents such as the mean of a loss over all but the last axis would send.
# Their size is a guess, so E5M2's wide range is given this much headroom over it.
_GUESS_HEADROOM = 16.0

# In the place of an exponent where only zeros were seen: above all exponents of float32's scales,
# and finite, for jax_debug_infs.
_UNSEEN = 2.0**20


def is_loss(outputs: Any) -> bool:
    """Whether a function's outputs, or their shapes, are a scalar float, or a pair whose first half
    is one.
    """
    first: Any = outputs[0] if isinstance(outputs, tuple | list) and len(outputs) == 2 else outputs
    return (
        hasattr(first, "dtype") and first.shape == () and jnp.issubdtype(first.dtype, jnp.floating)
    )


def has_gradient(jaxpr: Any, weights: Sequence[int], arrays: Sequence[Any]) -> bool:
    """Whether a function has one itself, with respect to those of its arrays that are weights.

    With a while loop behind them it has none, or with a kernel without a rule for it. Weights held
    as codes count as the arrays that they stand for.
    """
    arrays = [
        jax.ShapeDtypeStruct(array.shape, array.data.dtype) if is_coded(array) else array
        for array in arrays
    ]
    floats = [index for index in weights if jnp.issubdtype(arrays[index].dtype, jnp.floating)]

    def plain(values):
        given = dict(zip(floats, values))
        outputs, _ = evaluate(
            jaxpr,
            Plan({}),
            {},
            [given.get(index, array) for index, array in enumerate(arrays)],
            Mode(),
        )
        return [output for output in outputs if jnp.issubdtype(output.dtype, jnp.floating)]

    def backward(values):
        outputs, pull = jax.vjp(plain, values)
        return pull(jax.tree.map(jnp.ones_like, outputs))

    try:
        jax.eval_shape(backward, [arrays[index] for index in floats])
    except WITHOUT_GRADIENT:
        return False
    return True


def cotangents_of(leaves: Sequence[jax.Array], has_loss: bool) -> list[jax.Array]:
    """What to send back through float outputs: 1 to a loss, else what a loss over them might."""
    if has_loss:
        return [
            jnp.ones_like(leaf) if index == 0 else jnp.zeros_like(leaf)
            for index, leaf in enumerate(leaves)
        ]
    # Signs at random: a constant cotangent would vanish behind a normalization or a softmax.
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    return [
        jax.random.rademacher(key, leaf.shape, leaf.dtype)
        * (leaf.shape or (1,))[-1]
        / max(leaf.size, 1)
        for key, leaf in zip(keys, leaves)
    ]


def with_headroom(node: SiteScales) -> SiteScales:
    """Amaxes with those of the gradient, which come from guessed cotangents, taken larger."""
    return node if node.grad is None else node.replace(grad=node.grad * _GUESS_HEADROOM)


def _exponents_of_site(scales: SiteScales, amax: SiteScales) -> SiteScales:
    """`scales` with the exponents that fit these amaxes; as they were where an amax is 0 or not
    finite.
    """
    changes = {}
    for operand, cast in zip(OPERANDS, scales.casts):
        if cast is not None and cast.delayed is not None:
            seen = getattr(amax, operand)
            fitting = exponent_from_amax(seen, cast.format, cast.delayed.margin)
            changes[operand] = jnp.where(
                (seen > 0) & jnp.isfinite(seen), fitting, getattr(scales, operand)
            )
    return scales.replace(**changes)


@jax.jit
def first_exponents(scales: Scales, amaxes: Scales) -> Scales:
    """The exponents that fit these amaxes; for operands that saw only zeros, as the gradients
    behind a layer that starts at zero do, the smallest one found for the same operand anywhere.

    A first step on too small a scale saturates, is counted, and passes; one on too large a scale
    would flush everything to zero in silence.
    """
    unseen = jax.tree.map(lambda leaf: jnp.full_like(leaf, _UNSEEN), scales)
    fitted = _xla.made_once(list(map(_exponents_of_site, unseen.stacks(), amaxes.stacks())))
    filled = [{} for _ in fitted]
    for operand in OPERANDS:
        found = [getattr(node, operand) for node in fitted]
        lowest = functools.reduce(
            jnp.minimum,
            (jnp.min(leaf, initial=_UNSEEN) for leaf in found if leaf is not None),
            _UNSEEN,
        )
        lowest = jnp.where(lowest == _UNSEEN, 0.0, lowest)
        for leaf, changes in zip(found, filled):
            if leaf is not None:
                changes[operand] = jnp.where(leaf == _UNSEEN, lowest, leaf)
    return scales.with_stacks(
        [node.replace(**changes) for node, changes in zip(scales.stacks(), filled)]
    )


def calibrate(fp8_fn: Any, scales: Any, batches: Iterable[tuple], *, progress: bool = True) -> Any:
    """Scales from real forward and backward passes, in full precision.

    Args:
      fp8_fn: the function; one that returns a loss, for the gradients' scales to be those of
        training.
      scales: from `init`; a tree like it comes back.
      batches: for each pass the tuple of `fp8_fn`'s arguments behind `scales`.
      progress: whether to show a bar, on stderr.

    Returns:
      `scales` with each operand's exponent fitting its largest amax over all passes. What no pass
      saw, or saw only non-finite values of, keeps its exponent.

    Raises:
      ValueError: where `batches` is empty.
      TypeError: where `fp8_fn` is no such function, or `batches` holds anything but tuples.

    >>> import fp8jax
    >>> fp8_loss = fp8jax.fp8(lambda w, x: (x @ w).sum(), fp8jax.recipes.delayed())
    >>> w, batches = jnp.ones((4, 4)), [jnp.ones((2, 4)), jnp.full((2, 4), 448.0)]
    >>> scales = fp8_loss.init(w, batches[0])
    >>> calibrate(fp8_loss, scales, [(w, x) for x in batches], progress=False)["dot"].lhs
    Array(0., dtype=float32)
    """
    if not hasattr(fp8_fn, "amaxes"):
        raise TypeError(
            f"fp8_fn must be what fp8jax.fp8 returns; got {type(fp8_fn).__name__}. Wrap the loss, "
            "fp8jax.fp8(loss, recipe); of a Flax model it is model.as_function(loss)."
        )
    if not isinstance(batches, Iterable) or hasattr(batches, "shape"):
        raise TypeError(
            f"batches must be tuples of arguments; got {type(batches).__name__}. Write [(params, "
            "x)]."
        )
    largest = None
    total = len(batches) if isinstance(batches, Sized) else None
    with progress_bar(progress, "calibrating", total) as advance:
        for batch in batches:
            amax = jax.tree.map(
                lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0.0),
                fp8_fn.amaxes(scales, *arguments_of(batch)),
            )
            largest = amax if largest is None else jax.tree.map(jnp.maximum, largest, amax)
            advance(1)
    if largest is None:
        raise ValueError(
            "batches must hold at least one tuple of arguments; got none. A generator that was "
            "used up before "
            "is empty: pass a list."
        )
    fitting = map(_exponents_of_site, *(find_stacks(tree).values() for tree in (scales, largest)))
    return with_stacks(scales, fitting)
