"""Numbers that a loop keeps, in one array."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["tree"])
@dataclasses.dataclass(frozen=True)
class Numbers:
    """A pytree of numbers that all have the same shape, along the last axis of one array.

    >>> Numbers.of({"a": jnp.float32(1), "b": None, "c": jnp.float32(2)}, ()).apart()
    {'a': Array(1., dtype=float32), 'b': None, 'c': Array(2., dtype=float32)}
    """

    packed: jax.Array
    tree: Any

    @classmethod
    def of(cls, numbers: Any, shape: tuple[int, ...]) -> "Numbers":
        leaves, tree = jax.tree.flatten(numbers)
        return cls(
            jnp.stack(
                [jnp.broadcast_to(leaf, shape) for leaf in leaves]
                or [jnp.zeros(shape, jnp.float32)],
                axis=-1,
            ),
            tree,
        )

    def apart(self) -> Any:
        return jax.tree.unflatten(
            self.tree, list(jnp.moveaxis(self.packed, -1, 0))[: self.tree.num_leaves]
        )
