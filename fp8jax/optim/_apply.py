"""Updates added to parameters, with bfloat16 ones rounded stochastically: no float32 master copy is
needed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax.optim._noise import key_words, leaf_words, random_bits


def apply_updates(params: Any, updates: Any, *, key: Any = None) -> Any:
    """`optax.apply_updates`, with sums rounded to bfloat16 stochastically, so that small updates
    count on average.

    To nearest, an update below a 256th of its parameter is lost, however often it is repeated. Sums
    are float32, and each becomes one of the two bfloat16 values around it, up with the probability
    ``(sum - below) / (above - below)``. Parameters of other dtypes are treated as optax does.

    Args:
      params: pytree of arrays.
      updates: pytree of the same structure and shapes, of any floating dtype; float32 serves best.
      key: a `jax.random` key or a seed, another one at each step, such as ``jax.random.fold_in(key,
        step)``; needed where there are bfloat16 parameters.

    Returns:
      The parameters with the updates added, dtypes as before.

    Raises:
      ValueError: where a parameter is bfloat16 and there is no key; where structures or shapes
        differ.
      TypeError: where a parameter is float16, for which there is no stochastic rounding here.

    Source: N. Wang et al., arXiv 1812.08011, section 3 (stochastic rounding of weight updates).

    >>> weights = jnp.ones(1000, jnp.bfloat16)
    >>> added = apply_updates(weights, jnp.full(1000, 1e-3), key=0)
    >>> mean = added.astype(jnp.float32).mean()
    >>> float(weights[0] + jnp.bfloat16(1e-3)), bool(abs(mean - 1.001) < 3e-4)
    (1.0, True)
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    theirs = jax.tree.structure(updates)
    if theirs != structure:
        raise ValueError(
            f"params and updates must be of the same structure; got {structure} and {theirs}. Pass "
            "what the optimizer's "
            "update returns for these parameters."
        )
    words = [None] * len(paths)
    for path, param in paths:
        if jnp.result_type(param) == jnp.bfloat16 and key is None:
            raise ValueError(
                f"key is needed to round bfloat16 params stochastically; got None, and bfloat16 at "
                f"{jax.tree_util.keystr(path)}. Pass key=jax.random.fold_in(key, step)."
            )
        if jnp.result_type(param) == jnp.float16:
            raise TypeError(
                f"params must be bfloat16 or wider; got float16 at {jax.tree_util.keystr(path)}. "
                "Use bfloat16, or float32 with "
                "optax.apply_updates."
            )
    if key is not None and paths:
        words = leaf_words(key_words(key), np.uint32(0), len(paths))
    return structure.unflatten(
        [
            _add(*path_and_param, update, drawn)
            for path_and_param, update, drawn in zip(
                paths, jax.tree.leaves(updates), words, strict=True
            )
        ]
    )


def _add(path, param, update, words):
    param, update = jnp.asarray(param), jnp.asarray(update)
    if param.shape != update.shape:
        raise ValueError(
            f"params and updates must have the same shapes; got {param.shape} and {update.shape} "
            "at "
            f"{jax.tree_util.keystr(path)}. Pass what the optimizer's update returns for these "
            "parameters."
        )
    if param.dtype != jnp.bfloat16:
        wide = jnp.promote_types(param.dtype, update.dtype)
        return (param.astype(wide) + update.astype(wide)).astype(param.dtype)
    total = param.astype(np.float32) + update.astype(np.float32)
    bits = lax.bitcast_convert_type(total, np.uint32)
    # Magnitudes are ordered like their bits, so the carry of noise below the upper half is a step
    # away from zero.
    rounded = bits + (random_bits(param.shape, words) >> np.uint32(16))
    finite = (bits & np.uint32(0x7FFFFFFF)) < np.uint32(0x7F800000)
    upper = lax.convert_element_type(lax.shift_right_logical(rounded, np.uint32(16)), np.uint16)
    return jnp.where(
        finite, lax.bitcast_convert_type(upper, jnp.bfloat16), total.astype(jnp.bfloat16)
    )
