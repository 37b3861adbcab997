"""Walks through jaxprs."""

from fp8jax import shims


def bodies_on_one_platform(equation) -> list:
    """The jaxprs inside an equation; of those that are there for one platform each, one."""
    if equation.params.get("branches_platforms"):
        return list(equation.params["branches"][:1])
    return list(shims.jaxprs_in(equation.params))
