"""Shardings of products and their gradients, on meshes with explicit axes, whose types tell."""

import dataclasses

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax import _shims
from fp8jax.ops._cast import Codes


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ShardedLike:
    """In the place of an operand that is needed for the sharding of its gradient alone.

    Args:
      sharding: its own; None where no mesh axis is explicit.
    """

    sharding: NamedSharding | None

    @classmethod
    def of(cls, operand: Codes | jax.Array) -> "ShardedLike":
        """An operand's."""
        array = operand.data if isinstance(operand, Codes) else operand
        return cls(jax.typeof(array).sharding if _shims.is_explicit(array) else None)


def sharding_of_product(
    operand: Codes | jax.Array | ShardedLike, order: tuple[int, ...]
) -> NamedSharding | None:
    """The sharding to give a product whose axes are `operand`'s in `order`; None where no mesh axis
    is explicit.

    A gradient is sharded like the operand it belongs to, which JAX can't infer once a contracted
    axis is sharded.
    """
    like = operand if isinstance(operand, ShardedLike) else ShardedLike.of(operand)
    sharding = like.sharding
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[axis] for axis in order)))


def divided_like(factor: jax.Array, product: jax.Array) -> jax.Array:
    """A factor, divided over explicit mesh axes as `product` is: those of an operand may be
    another's in the product.
    """
    if not factor.ndim or not _shims.is_explicit(product):
        return factor
    sharding, before = (jax.typeof(array).sharding for array in (product, factor))
    spec = PartitionSpec(
        *(names if size > 1 else None for names, size in zip(sharding.spec, factor.shape))
    )
    return (
        factor
        if tuple(before.spec) == tuple(spec)
        else jax.sharding.reshard(factor, NamedSharding(sharding.mesh, spec))
    )
