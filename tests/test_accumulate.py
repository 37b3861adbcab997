"""`accumulate`: gradients add up, observations merge by max."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fp8jax import SiteScales, recipes
from fp8jax._observe import seal_fits, seal_of
from fp8jax.optim import accumulate, delayed_scaling, with_delayed_scaling

CASTS = recipes.delayed().delayed_casts
EIGHT = np.exp2(np.random.default_rng(0).normal(size=(8, 2, 3)) * 4).astype(np.float32)
GRADIENTS = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)


@pytest.fixture(autouse=True)
def optax_promotes():
    """Several of optax's own transformations mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def microbatch(amaxes, gradient):
    amaxes = jnp.asarray(amaxes)
    return {
        "w": jnp.asarray(gradient),
        "none": None,
        "fp8": SiteScales(
            *(amaxes[..., i] for i in range(3)),
            seal_of(amaxes),
            None,
            "dot",
            CASTS,
            jnp.ones_like(amaxes[..., 0]),
        ),
    }


def test_eight_microbatches():
    """By hand and in a scan from zeros: the sum of the gradients, the max of the eight, and a seal
    that still fits.
    """
    batches = [microbatch(a, g) for a, g in zip(EIGHT, GRADIENTS, strict=True)]
    by_hand = functools.reduce(jax.jit(accumulate), batches)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    zeros = jax.tree.map(jnp.zeros_like, batches[0])
    scanned, _ = jax.jit(
        lambda: jax.lax.scan(lambda total, batch: (accumulate(total, batch), None), zeros, stacked)
    )()
    jax.tree.map(np.testing.assert_array_equal, by_hand, scanned)
    np.testing.assert_array_equal(by_hand["w"], functools.reduce(np.add, GRADIENTS))
    for i, operand in enumerate(("lhs", "rhs", "grad")):
        amax = getattr(by_hand["fp8"], operand)
        np.testing.assert_array_equal(amax, EIGHT.max(0)[:, i])
        assert seal_fits(amax, by_hand["fp8"].seal[:, i]).all()


def test_three_ways_give_the_same_history():
    """By hand, in a scan, and by MultiSteps: bitwise the same state of the scales."""
    batches = [microbatch(a, g) for a, g in zip(EIGHT, GRADIENTS, strict=True)]
    params = {"w": jnp.zeros(5), "none": None, "fp8": SiteScales.zeros("dot", CASTS, (2,))}
    plain, multi = (
        with_delayed_scaling(optax.sgd(0.1)),
        with_delayed_scaling(optax.MultiSteps(optax.sgd(0.1), 8)),
    )
    _, at_once = jax.jit(plain.update)(
        functools.reduce(accumulate, batches), plain.init(params), params
    )
    state, moving, update = multi.init(params), params, jax.jit(multi.update)
    for batch in batches:
        updates, state = update(batch, state, moving)
        moving = optax.apply_updates(moving, updates)
    for got, expected in zip(state.scaling.operands, at_once.scaling.operands, strict=True):
        np.testing.assert_array_equal(got.amax_history, expected.amax_history)
    np.testing.assert_array_equal(
        state.scaling.operands[0].amax_history[0], EIGHT.max(0)[:, :2].T.reshape(-1)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_fault_in_one_microbatch_survives_merging(value):
    """So that it is counted, rather than lost beside the others."""
    bad = microbatch(np.full((2, 3), value, np.float32), GRADIENTS[0])
    for a, b in (
        (bad, microbatch(EIGHT[0], GRADIENTS[1])),
        (microbatch(EIGHT[0], GRADIENTS[1]), bad),
    ):
        seen = accumulate(a, b)["fp8"]
        scales = SiteScales.zeros("dot", CASTS, (2,))
        _, state = jax.jit(delayed_scaling().update)(seen, delayed_scaling().init(scales), scales)
        assert all((operand.nonfinite == 1).all() for operand in state.operands)


def test_gradients_of_integers_pass():
    """`jax.grad(..., allow_int=True)` gives them a dtype without values."""
    gradients = jax.grad(lambda p: (p["w"] * p["step"]).sum(), allow_int=True)(
        {"w": jnp.arange(3.0), "step": jnp.int32([1, 2, 3])}
    )
    both = accumulate(gradients, gradients)
    assert both["step"].dtype == jax.dtypes.float0 and both["step"].shape == (3,)
    np.testing.assert_array_equal(both["w"], [2, 4, 6])
    with pytest.raises(
        ValueError,
        match=r"same shapes and dtypes; got int32\[3\] and \[\('float0', 'V'\)\]\[3\] at "
        r"\['step'\]",
    ):
        accumulate(gradients | {"step": jnp.zeros(3, jnp.int32)}, gradients)


@pytest.mark.parametrize(
    "change, text",
    [
        (
            lambda tree: tree | {"w": jnp.zeros(4)},
            r"same shapes and dtypes; got float32\[5\] and float32\[4\] at \['w'\]\. Pass the "
            r"gradients",
        ),
        (
            lambda tree: tree | {"w": jnp.zeros(5, jnp.bfloat16)},
            r"got float32\[5\] and bfloat16\[5\] at \['w'\]",
        ),
        (
            lambda tree: tree | {"v": jnp.zeros(5)},
            r"a and b must be of the same structure; got PyTreeDef.* Pass the gradients",
        ),
        (
            lambda tree: tree | {"fp8": None},
            r"a and b must hold the same sites; got 'dot' at \['fp8'\], which b lacks\. Pass the "
            r"gradients",
        ),
        (
            lambda tree: tree | {"fp8": tree["fp8"].replace(site="other")},
            r"same site at \['fp8'\]; got 'dot' in a and 'other' in b\.",
        ),
    ],
)
def test_errors(change, text):
    tree = microbatch(EIGHT[0], GRADIENTS[0])
    with pytest.raises(ValueError, match=text):
        accumulate(tree, change(tree))
