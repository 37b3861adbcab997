"""Gradients and observations of several microbatches as one."""

from typing import Any

import jax
import jax.numpy as jnp

from fp8jax._state import is_scales
from fp8jax.optim._checks import check_alike, check_sites


def accumulate(a: Any, b: Any) -> Any:
    """Adds gradients and takes the maxima of observations, which a sum of whole trees would
    corrupt.

    Args:
      a: pytree of gradients, any `SiteScales` in it with observations; or zeros, to begin with.
      b: one of the same structure, shapes and dtypes.

    Returns:
      The same. Divide its gradients (not its observations) where a mean is wanted, or scale each
      microbatch's loss.

    Raises:
      ValueError: where structures, sites, shapes or dtypes differ.

    >>> from fp8jax import SiteScales, recipes
    >>> seen = SiteScales.zeros("dot", recipes.delayed().delayed_casts)
    >>> a = {"w": jnp.float32(1.0), "fp8": seen.replace(lhs=jnp.float32(3.0))}
    >>> b = {"w": jnp.float32(1.0), "fp8": seen.replace(lhs=jnp.float32(2.0))}
    >>> both = accumulate(a, b)
    >>> both["w"], both["fp8"].lhs
    (Array(2., dtype=float32), Array(3., dtype=float32))
    """
    remedy = "Pass the gradients of one function with respect to the same arguments."
    check_alike(check_sites(a, "a"), check_sites(b, "b"), ("a", "b"), remedy)
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            f"a and b must be of the same structure; got {jax.tree.structure(a)} and "
            f"{jax.tree.structure(b)}. " + remedy
        )

    def merge(path, x, y):
        if is_scales(x):
            return jax.tree.map(jnp.maximum, x, y)
        x, y = _as_array(x), _as_array(y)
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(
                f"a and b must have the same shapes and dtypes; got {x.dtype}{list(x.shape)} and "
                f"{y.dtype}{list(y.shape)} at {jax.tree_util.keystr(path)}. {remedy}"
            )
        return x if x.dtype == jax.dtypes.float0 else x + y

    return jax.tree_util.tree_map_with_path(merge, a, b, is_leaf=is_scales)


def _as_array(leaf: Any) -> Any:
    """A leaf as an array; the gradient of integers (`allow_int=True`), which is of a dtype without
    values, as it is.
    """
    return leaf if getattr(leaf, "dtype", None) == jax.dtypes.float0 else jnp.asarray(leaf)
