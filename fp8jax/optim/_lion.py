"""Lion with an FP8 moment: optax's, but for what the moment is held in."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from fp8jax.optim._leaves import (
    Leaf,
    as_they_came,
    check_rounding,
    match_leaves,
    scalar,
    words_of,
    zeros_moments,
)
from fp8jax.optim._moments import moment_format
from fp8jax.optim._noise import key_words

# The update of a combination of moment and gradient, and of `smooth_beta`.
MODES = {
    "hard": lambda x, beta: jnp.sign(x),
    "smooth": lambda x, beta: jnp.tanh(beta * x),
    "refined": lambda x, beta: jnp.where(jnp.abs(x) < 1, x, jnp.sign(x)),
}


class ScaleByLionState(NamedTuple):
    """State of `scale_by_lion`.

    Args:
      count: int32 scalar, the number of updates.
      mu: moments, an `Fp8Moment` for each parameter (or an array, where they are held unquantized).
      key: uint32 `[2]`, what stochastic rounding's randomness comes from; None where rounding is to
        nearest.
    """

    # Named as in optax, over the method of tuples.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    key: jax.Array | None


def scale_by_lion(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: Any = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: float = 1.0,
    rounding: str = "stochastic",
    key: Any = None,
) -> optax.GradientTransformation:
    """Rescales updates as Lion does, with its moment held in FP8.

    Args:
      b1, b2, mode, smooth_beta: as in `optax.scale_by_lion`.
      mu_dtype, rounding, key: as in `fp8jax.optim.scale_by_adam`.

    Returns:
      An `optax.GradientTransformation`. Updates are float32, or as wide as the gradients where
      these are wider.

    Raises:
      TypeError, ValueError: as `fp8jax.optim.scale_by_adam` does.

    Source: arXiv 2302.06675.

    >>> tx = scale_by_lion()
    >>> updates, state = tx.update(jnp.array([3.0, -2.0]), tx.init(jnp.ones(2)))
    >>> updates, state.mu.dequantize()
    (Array([ 1., -1.], dtype=float32), Array([ 0.03125 , -0.015625], dtype=float32))
    """
    check_rounding(rounding, key)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {tuple(MODES)}; got {mode!r}.")
    fmt = moment_format("mu_dtype", mu_dtype)

    def init(params) -> Any:
        words = key_words(0 if key is None else key) if rounding == "stochastic" else None
        return ScaleByLionState(jnp.zeros([], jnp.int32), zeros_moments(params, fmt), words)

    def update(updates, state, params=None) -> tuple[Any, Any]:
        del params
        leaves, structure = match_leaves(updates, mu=state.mu)
        count = cast(jax.Array, optax.safe_increment(state.count))
        words = words_of(state.key, count, len(leaves), rounding)
        results = [one(leaf, drawn) for leaf, drawn in zip(leaves, words, strict=True)]
        updates, mu = zip(*results) if results else ((), ())
        return structure.unflatten(updates), ScaleByLionState(
            count, as_they_came(mu, state.mu, structure), state.key
        )

    def one(leaf, words):
        gradient, *moments = leaf
        leaf = Leaf(gradient, moments, (b2,), words)
        g, (old,) = leaf.gradient, leaf.values
        update = leaf.update(
            MODES[mode](scalar(b1) * old + scalar(1 - b1) * g, scalar(smooth_beta))
        )
        return update, *leaf.store(scalar(b2) * old + scalar(1 - b2) * g)

    return optax.GradientTransformation(init, update)


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    rounding: str = "stochastic",
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.lion` with its moment held in FP8.

    Args:
      learning_rate, b1, b2, weight_decay, mask: as in `optax.lion`.
      mu_dtype, rounding, key: as in `fp8jax.optim.scale_by_adam`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
      TypeError, ValueError: as `fp8jax.optim.scale_by_adam` does.

    >>> tx = lion(0.1, weight_decay=0.5)
    >>> tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))[0]
    Array([-0.15, -0.15, -0.15], dtype=float32)
    """
    return optax.chain(
        scale_by_lion(b1, b2, mu_dtype, rounding=rounding, key=key),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
