"""What is static about a product: which one it is, and how its operands are cast."""

import dataclasses
from typing import Any, ClassVar

import jax

from fp8jax._recipe import Recipe
from fp8jax.ops._cast import Codes
from fp8jax.ops._execution import Operand


@dataclasses.dataclass(frozen=True)
class Product:
    """What is static about a product: enough for all three, and hashable.

    Args:
      recipe: the casts and the execution.
      out_dtype, lhs_dtype, rhs_dtype: of the result and the gradients.
      looped: whether it may be in a loop, which stacks what its iterations keep for their backward
        pass.

    Attributes:
      reads_values: whether an operand that is cast may be an array of the values of its codes.
    """

    recipe: Recipe
    out_dtype: Any
    lhs_dtype: Any
    rhs_dtype: Any
    looped: bool = dataclasses.field(default=True, kw_only=True)
    reads_values: ClassVar[bool] = False

    def axes(self, product: str, operand: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Of an operand in one of the three products: its rank, its kept axes, and its contracted
        axes.
        """
        raise NotImplementedError

    def placed(self, codes: Codes, contracted: tuple[int, ...]) -> Codes:
        """Codes that were just made of an operand, in memory as the product wants them."""
        return codes

    def engines(self, lhs: Any, rhs: Any, out: Any) -> dict[str, str]:
        """What multiplies each product whose scales are within its sum, in words."""
        return {}

    def forward(self, lhs: Operand, rhs: Operand, extra: Any) -> jax.Array:
        """The product of two operands."""
        raise NotImplementedError

    def gradient_of_lhs(self, grad: Operand, rhs: Operand, lhs: Operand, extra: Any) -> jax.Array:
        """What sends `grad` back to the lhs; that is given for its shape and sharding."""
        raise NotImplementedError

    def gradient_of_rhs(self, lhs: Operand, grad: Operand, rhs: Operand, extra: Any) -> jax.Array:
        """What sends `grad` back to the rhs; that is given for its shape and sharding."""
        raise NotImplementedError
