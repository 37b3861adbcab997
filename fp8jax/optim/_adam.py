"""Adam and AdamW with FP8 moments: optax's, but for what the moments are held in."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
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


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`.

    Args:
      count: int32 scalar, the number of updates.
      mu: first moments, an `Fp8Moment` for each parameter (or an array, where they are held
        unquantized).
      nu: second moments, likewise.
      key: uint32 `[2]`, what stochastic rounding's randomness comes from; None where rounding is to
        nearest.
    """

    # Named as in optax, over the method of tuples.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any
    key: jax.Array | None


def scale_by_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    rounding: str = "stochastic",
    key: Any = None,
) -> optax.GradientTransformation:
    """Rescales updates as Adam does, with moments held in FP8: about 1.04 bytes each per parameter.

    Moments are read and updated in float32, and an update is computed from them before they are
    rounded again. Both have range expansion, see `fp8jax.optim._moments`: within a block of up to
    128 elements, gradients may differ by 1e9 before small ones lose their updates. Wide blocks have
    coarser steps: an update's error is about 0.05 where a block's gradients are alike, and 0.3 from
    1e6 on.

    To shard them, place the parameters and call `init` on them outside of `jit`: each moment lies
    as its parameter does, and its scales, one for up to 128 elements, as far as they can be
    divided. Flax's partition metadata say one spec for codes and scales, which the latter may not
    be divisible by: place parameters by them and then unbox, ``tx.init(nn.unbox(params))``.

    Args:
      b1, b2, eps, eps_root, nesterov: as in `optax.scale_by_adam`.
      mu_dtype: what first moments are held in: an FP8 format, its name or its dtype, by default
        E4M3; or float32, bfloat16, float16 or float64, for moments that are not quantized.
      nu_dtype: the same of second moments.
      rounding: "stochastic", or "nearest": then changes of less than half a step, such as most that
        `b2` = 0.999 makes, are lost.
      key: for stochastic rounding, a `jax.random` key or a seed; by default seed 0.

    Returns:
      An `optax.GradientTransformation`. Updates are float32, or as wide as the gradients where
      these are wider.

    Raises:
      TypeError: where a parameter or gradient is not real and floating, or `key` is not a key.
      ValueError: where an option is unknown or without effect; from `update`, where gradients and
        moments differ in structure or shape, or the state lacks a key.

    Sources: Adam, arXiv 1412.6980; FP8 moments and range expansion, COAT, arXiv 2410.19313.

    >>> params = {"w": jnp.ones((4, 128))}
    >>> tx = scale_by_adam()
    >>> updates, state = jax.jit(tx.update)(params, tx.init(params))
    >>> round(float(updates["w"][0, 0]), 3), state.mu["w"].data.dtype, state.nu["w"].nbytes
    (1.0, dtype(float8_e4m3fn), 532)
    """
    check_rounding(rounding, key)
    formats = moment_format("mu_dtype", mu_dtype), moment_format("nu_dtype", nu_dtype)

    def init(params) -> Any:
        words = key_words(0 if key is None else key) if rounding == "stochastic" else None
        mu, nu = zeros_moments(params, formats[0]), zeros_moments(params, formats[1])
        return ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu, words)

    def update(updates, state, params=None) -> tuple[Any, Any]:
        del params
        leaves, structure = match_leaves(updates, mu=state.mu, nu=state.nu)
        count = cast(jax.Array, optax.safe_increment(state.count))
        corrections = _corrections(count, b1, b2, nesterov)
        words = words_of(state.key, count, len(leaves), rounding)
        results = [
            one(leaf, drawn, *corrections) for leaf, drawn in zip(leaves, words, strict=True)
        ]
        updates, mu, nu = zip(*results) if results else ((), (), ())
        mu, nu = as_they_came(mu, state.mu, structure), as_they_came(nu, state.nu, structure)
        return structure.unflatten(updates), ScaleByAdamState(count, mu, nu, state.key)

    def one(leaf, words, of_gradient, of_mu, of_nu):
        """A leaf's update and next moments; the last arguments correct for moments that began as
        zeros.
        """
        gradient, *moments = leaf
        leaf = Leaf(gradient, moments, (b1, b2), words)
        g, (first, second) = leaf.gradient, leaf.values
        first = scalar(b1) * first + scalar(1 - b1) * g
        second = scalar(b2) * second + scalar(1 - b2) * (g * g)
        numerator = first * of_mu
        if nesterov:
            numerator = scalar(b1) * numerator + (scalar(1 - b1) * of_gradient) * g
        update = leaf.update(
            numerator / (jnp.sqrt(second * of_nu + scalar(eps_root)) + scalar(eps))
        )
        return update, *leaf.store(first, second)

    return optax.GradientTransformation(init, update)


def _corrections(count, b1, b2, nesterov):
    """Factors by which to correct a gradient, a first and a second moment for the moments' zeros at
    the start.
    """

    def of(decay, steps):
        return np.float32(1) / (np.float32(1) - scalar(decay) ** steps.astype(np.float32))

    return of(b1, count), of(b1, count + 1 if nesterov else count), of(b2, count)


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    rounding: str = "stochastic",
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adam` with moments held in FP8.

    Args:
      learning_rate, b1, b2, eps, eps_root, nesterov: as in `optax.adam`.
      mu_dtype, nu_dtype, rounding, key: as in `scale_by_adam`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: as `scale_by_adam` does.

    >>> tx = adam(0.1)
    >>> updates, state = jax.jit(tx.update)(jnp.ones(3), tx.init(jnp.ones(3)))
    >>> updates.round(3)
    Array([-0.1, -0.1, -0.1], dtype=float32)
    """
    return optax.chain(
        scale_by_adam(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            nesterov=nesterov,
            nu_dtype=nu_dtype,
            rounding=rounding,
            key=key,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    rounding: str = "stochastic",
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with moments held in FP8.

    Args:
      learning_rate, b1, b2, eps, eps_root, weight_decay, mask, nesterov: as in `optax.adamw`.
      mu_dtype, nu_dtype, rounding, key: as in `scale_by_adam`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
      TypeError, ValueError: as `scale_by_adam` does.

    >>> tx = adamw(0.1, weight_decay=0.5)
    >>> updates, state = jax.jit(tx.update)(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))
    >>> updates.round(3)
    Array([-0.15, -0.15, -0.15], dtype=float32)
    """
    return optax.chain(
        scale_by_adam(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            nesterov=nesterov,
            nu_dtype=nu_dtype,
            rounding=rounding,
            key=key,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
