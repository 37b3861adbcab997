"""Policies for `jax.checkpoint` that keep FP8 codes, a byte each, and recompute the rest.

What a site's backward pass needs of its forward pass - the codes of both operands, their scales and
amaxes - carries a checkpoint name. Kept, the products of the forward pass need not run a second
time for the products behind them.
"""

from collections.abc import Callable
from typing import Any

import jax

from fp8jax.ops._operands import CODES

Policy = Callable[..., Any]


def save_codes() -> Policy:
    """Keeps what the sites' backward passes need, as codes, and nothing else.

    For `jax.checkpoint(policy=...)`, `flax.linen.remat(policy=...)`, inside the function that is
    transformed.

    >>> import jax, jax.numpy as jnp, fp8jax
    >>> def layer(w, x):
    ...     return jnp.tanh(x @ w)
    >>> w, x = jnp.full((4, 4), 0.3), jnp.ones((2, 4))
    >>> def gradient(policy):
    ...     f = fp8jax.fp8(jax.checkpoint(layer, policy=policy), fp8jax.recipes.current())
    ...     return jax.grad(lambda w: f({}, w, x).sum())(w)
    >>> everything_again, codes_kept = None, fp8jax.checkpoint_policies.save_codes()
    >>> bool((gradient(everything_again) == gradient(codes_kept)).all())
    True
    """
    return jax.checkpoint_policies.save_only_these_names(CODES)


def save_codes_and(policy: Policy) -> Policy:
    """Keeps the codes, and what another policy keeps.

    Args:
      policy: for instance one of `jax.checkpoint_policies`.

    >>> policy = save_codes_and(jax.checkpoint_policies.save_only_these_names("attention"))
    """
    return jax.checkpoint_policies.save_from_both_policies(save_codes(), policy)
