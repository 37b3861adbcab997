"""Products of which hardware has an FP8 form for some or none: operands are cast all the same, and
multiplied decoded where it has none.

JAX knows the transposition of each of its linear operations. The two gradients here are programs
that it derives - a convolution's are convolutions, with the kernel reversed here and groups
regrouped there - run on decoded values.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from fp8jax import _shims
from fp8jax.ops._cast import Codes, halves
from fp8jax.ops._execution import Operand, is_exact_in_bfloat16
from fp8jax.ops._product import Product


@dataclasses.dataclass(frozen=True)
class Transposed(Product):
    """A product by one of JAX's primitives.

    Args:
      primitive: of two operands that are floats, and any number of others.
      params: of the primitive, as items; what is said there of precision and result dtype is not
        read.
      lhs_shape, rhs_shape: of the operands.
    """

    primitive: core.Primitive
    params: tuple[tuple[str, Any], ...]
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]

    def native_on(self, first: Operand, second: Operand) -> tuple[str, ...]:
        """The platforms that run the forward product, or what sends a gradient back to the lhs, on
        the codes of these operands: of "cuda" and "tpu".
        """
        return ()

    def forward(self, lhs, rhs, extra):
        native = self.native_on(lhs, rhs)
        return self._run(self._bind, lhs, rhs, extra, self.out_dtype, native)

    def gradient_of_lhs(self, grad, rhs, lhs, extra):
        def program(grad, rhs, extra):
            return jax.linear_transpose(
                lambda lhs: self._bind(lhs, rhs, extra), _float32(self.lhs_shape)
            )(grad)[0]

        native = self.native_on(grad, rhs)
        return self._run(program, grad, rhs, extra, self.lhs_dtype, native)

    def gradient_of_rhs(self, lhs, grad, rhs, extra):
        def program(lhs, grad, extra):
            return jax.linear_transpose(
                lambda rhs: self._bind(lhs, rhs, extra), _float32(self.rhs_shape)
            )(grad)[0]

        return self._run(program, lhs, grad, extra, self.rhs_dtype, native=())

    def _bind(self, lhs, rhs, extra):
        params = dict(self.params) | {"precision": None, "preferred_element_type": None}
        return self.primitive.bind(lhs, rhs, *extra, **params)

    def _run(
        self, program, first: Operand, second: Operand, extra, out_dtype, native: tuple[str, ...]
    ) -> jax.Array:
        """A program of two arrays run on operands' values, or natively on their codes; what it
        sums, it sums in float32.
        """
        # Traced in float32, which says nothing of the values' dtype: all that is in it moves them
        # or multiplies them.
        jaxpr = jax.make_jaxpr(program)(_float32(first.shape), _float32(second.shape), extra)
        exact = is_exact_in_bfloat16(first) and is_exact_in_bfloat16(second)

        def run(dtype, first, second, extra):
            values = [
                operand.values(dtype, scaled=True)
                if isinstance(operand, Codes)
                else operand.astype(dtype)
                for operand in (first, second)
            ]
            return _evaluate(jaxpr, [*values, *extra])

        def on_codes(first, second, extra):
            product = _evaluate(jaxpr, [first.data, second.data, *extra])
            one, other = halves(first.scale, second.scale)
            return product * one * other

        in_float32 = functools.partial(run, jnp.float32)
        elsewhere = functools.partial(run, jnp.bfloat16) if exact else in_float32
        natively = dict.fromkeys(native, on_codes)
        return jax.lax.platform_dependent(
            first, second, extra, cpu=in_float32, default=elsewhere, **natively
        ).astype(out_dtype)


def _float32(shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _evaluate(jaxpr, arguments) -> jax.Array:
    opened, consts = _shims.open_jaxpr(jaxpr)
    values = dict(zip((*opened.constvars, *opened.invars), (*consts, *arguments), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in opened.eqns:
        operands, params = [read(atom) for atom in equation.invars], dict(equation.params)
        if "preferred_element_type" in params:
            wide = all(operand.dtype == jnp.float32 for operand in operands[:2])
            params |= {
                "preferred_element_type": jnp.float32,
                "precision": jax.lax.Precision.HIGHEST if wide else None,
            }
        (out,) = (
            equation.outvars
        )  # So it is with all that convolutions and ragged products are transposed to.
        values[out] = equation.primitive.bind(*operands, **params)
    return read(opened.outvars[0])


def check_execution(recipe, name: str) -> None:
    """Raises ValueError where a recipe asks for what no hardware has."""
    if recipe.execution == "native":
        raise ValueError(
            f"execution of a {name} must be 'auto' or 'emulated'; got 'native', and no hardware "
            f"has an FP8 form of all three products of a {name}. Give its sites a recipe of their "
            "own by a Rule."
        )
