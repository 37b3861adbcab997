"""Which format fits: by role, and by measured error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax._formats import E4M3, E5M2
from fp8jax._scaling import PerToken
from fp8jax._select import select_format


def test_select_format_by_role():
    assert [select_format(r) for r in ("forward", "weights", "activations")] == [E4M3] * 3
    assert [select_format(r) for r in ("backward", "gradients")] == [E5M2] * 2


def test_select_format_by_measured_error():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=4096).astype(np.float32)
    wide = np.exp(6 * normal)
    assert (
        select_format(normal) == select_format(normal * 1e6) == select_format(normal * 1e-6) == E4M3
    )
    assert select_format(wide) == select_format(wide * np.float32(1e-9)) == E5M2
    assert select_format(np.zeros(8, np.float32)) == select_format(np.zeros(0, np.float32)) == E4M3
    # What needs E5M2 under one scale may fit E4M3 under many.
    rows = np.exp(6 * rng.normal(size=(64, 1))).astype(np.float32) * rng.normal(
        size=(64, 64)
    ).astype(np.float32)
    assert select_format(rows) == E5M2 and select_format(rows, scaling=PerToken()) == E4M3


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, r"x_or_role must be an array or one of "
                     r"\('forward', .*\); got 'loss'", lambda: select_format("loss")),
        (TypeError, r"x_or_role must have concrete values, .* Call select_format outside of jit",
         lambda: jax.jit(lambda x: select_format(x).max)(jnp.ones(3))),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(error, message, call):
    with pytest.raises(error, match=message):
        call()
