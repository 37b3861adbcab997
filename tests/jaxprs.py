"""Walks through jaxprs."""

import math

import jax.numpy as jnp

from fp8jax import _shims


def bodies_on_one_platform(equation) -> list:
    """The jaxprs inside an equation; of those that are there for one platform each, one."""
    if equation.params.get("branches_platforms"):
        return list(equation.params["branches"][:1])
    return list(_shims.jaxprs_in(equation.params))


def products_in(equation) -> int:
    """How many matrix products an equation runs, at most."""
    inner = [equation for body in bodies_on_one_platform(equation) for equation in body.eqns]
    return (equation.primitive.name == "dot_general") + sum(map(products_in, inner))


def kept_copies(jaxpr, elements: int) -> list[str]:
    """The wide floating arrays of as many elements or more that outlive a product: what a body
    returns, as a residual or a layer's part of a stack is; what is read behind the product that
    reads it first; and what holds twice as many.
    """
    last, found = {}, []
    for index, equation in enumerate(jaxpr.eqns):
        last.update((var, index) for var in equation.invars if not hasattr(var, "val"))
    for index, equation in enumerate(jaxpr.eqns):
        for var in equation.outvars:
            dtype, shape = getattr(var.aval, "dtype", None), getattr(var.aval, "shape", ())
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
                continue
            lives = jaxpr.eqns[index + 1 : last.get(var, index) + 1]
            size = math.prod(shape)
            outlives = var in jaxpr.outvars or sum(map(products_in, lives)) > 1
            if size >= 2 * elements or size >= elements and outlives:
                found.append(f"{equation.primitive.name}: {var.aval}")
        for body in bodies_on_one_platform(equation):
            found += kept_copies(body, elements)
    return found
