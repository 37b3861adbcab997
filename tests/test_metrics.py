"""`metrics`: what happened, by the names of sites."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fp8jax import SiteScales, metrics, recipes
from fp8jax._observe import seal_of
from fp8jax.optim import delayed_scaling, with_delayed_scaling

CASTS = recipes.delayed(history_window=3).delayed_casts
SCALES = {
    "x": SiteScales.zeros("mlp/up", CASTS),
    "y": [SiteScales.zeros("blocks/out", CASTS, (2,))],
}
TX = with_delayed_scaling(optax.sgd(1.0))


def seen(node: SiteScales, amaxes, seal_factor=1.0) -> SiteScales:
    amaxes = jnp.asarray(amaxes, jnp.float32)
    return node.replace(
        lhs=amaxes[..., 0],
        rhs=amaxes[..., 1],
        grad=amaxes[..., 2],
        seal=seal_of(amaxes) * jnp.float32(seal_factor),
        uses=jnp.ones_like(amaxes[..., 0]),
    )


def state_after(*steps):
    state = TX.init(SCALES)
    for x, y, factor in steps:
        grads = {"x": seen(SCALES["x"], x), "y": [seen(SCALES["y"][0], y, factor)]}
        _, state = jax.jit(TX.update)(grads, state, SCALES)
    return state


STATE = state_after(
    ([1, 449, 1], [[1, 1, 1], [1, np.inf, 57345]], 1),
    ([2, 0, 2], [[1, 1, 1], [1, 1, 1]], 3),
    ([3, 0, np.nan], [[1, 1, 1], [1, 1, 1]], 1),
    ([4, 0, 4], [[1, 1, 1], [1, 1, 1]], 1),
)


def test_summary_names_what_went_wrong():
    """Totals always; of the operands, those alone that something happened to, by layer where layers
    are stacked.
    """
    assert metrics.summary(STATE, SCALES) == {
        "fp8/observed": 4 + 1 + 3 + 3 * 6 - 1,
        "fp8/saturated": 2,
        "fp8/nonfinite": 2,
        "fp8/unsealed": 6,
        "fp8/saturated_share": 2 / 25,
        "fp8/saturated/mlp/up/rhs": 1,
        "fp8/saturated/blocks/out/grad[1]": 1,
        "fp8/nonfinite/mlp/up/grad": 1,
        "fp8/nonfinite/blocks/out/rhs[1]": 1,
        "fp8/unsealed/blocks/out/lhs[0]": 1,
        "fp8/unsealed/blocks/out/lhs[1]": 1,
        "fp8/unsealed/blocks/out/rhs[0]": 1,
        "fp8/unsealed/blocks/out/rhs[1]": 1,
        "fp8/unsealed/blocks/out/grad[0]": 1,
        "fp8/unsealed/blocks/out/grad[1]": 1,
    }


def test_saturated_shares_are_by_operand():
    found = metrics.saturated_shares(STATE, SCALES)
    assert {name: share for name, share in found.items() if share} == {
        "mlp/up/rhs": 1.0,
        "blocks/out/grad[1]": 1 / 3,
    }
    assert len(found) == 9


def test_histories_are_in_order_of_time():
    found = metrics.histories(STATE, SCALES)
    assert len(found) == 9
    assert {
        name: found[name].tolist()
        for name in ("mlp/up/lhs", "mlp/up/rhs", "mlp/up/grad", "blocks/out/rhs[1]")
    } == {
        "mlp/up/lhs": [2, 3, 4],
        "mlp/up/rhs": [449],
        "mlp/up/grad": [1, 2, 4],
        "blocks/out/rhs[1]": [1, 1],
    }


def test_reset_clears_counters_alone():
    """Jitted or not; afterwards, scales move as they would have."""
    after = jax.jit(metrics.reset)(STATE)
    assert not any(metrics.summary(after, SCALES).values())
    assert jax.tree.structure(after) == jax.tree.structure(STATE)
    for got, before in zip(after.scaling.operands, STATE.scaling.operands, strict=True):
        np.testing.assert_array_equal(got.amax_history, before.amax_history)
        np.testing.assert_array_equal(got.stored, before.stored)


def test_without_sites_all_is_zero():
    assert set(
        metrics.summary(with_delayed_scaling(optax.sgd(1.0)).init({"w": jnp.ones(2)}), {}).values()
    ) == {0}


@pytest.mark.parametrize(
    "state, scales, text",
    [
        (
            optax.adam(1.0).init(jnp.ones(2)),
            SCALES,
            r"state must hold one ScalingState; got 0 in a tuple\. Pass the state of "
            r"fp8jax\.delayed_scaling",
        ),
        (
            (STATE, delayed_scaling().init(SCALES)),
            SCALES,
            r"state must hold one ScalingState; got 2",
        ),
        (
            STATE,
            SCALES["x"],
            r"state must be that of the same scales: .*\[\(3, 2\), \(3, 1\)\]; got \[\(3, 6\), "
            r"\(3, 3\)\]\. Make a new",
        ),
    ],
)
def test_errors(state, scales, text):
    for function in (metrics.summary, metrics.histories):
        with pytest.raises(ValueError, match=text):
            function(state, scales)
