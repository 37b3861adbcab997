"""What a compiled program does beside its matrix products, to hold a program in FP8 against the
same one without.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fp8jax._transform.sites import Site
from fp8jax.hlo._products import products_in
from fp8jax.hlo._program import Leaf, must_match
from fp8jax.hlo._report import program_of


class Traffic(NamedTuple):
    """Work beside the matrix products.

    Args:
      launches: kernels that one run of the program launches, those in loops as often as they run.
      bytes: what these read and write, in one run of the program.
    """

    launches: int
    bytes: int


class Added(NamedTuple):
    """What FP8 adds beside the matrix products.

    Args:
      launches_per_site: kernels, for the three products of one site together.
      bytes: read and written by all of them.
      minimum: what they would at the least, of `minimum_bytes`.
    """

    launches_per_site: float
    bytes: int
    minimum: int


def traffic(compiled: Any) -> Traffic:
    """What a compiled program launches, reads and writes beside its matrix products.

    Args:
      compiled: a `jax.stages.Compiled`, or its text.

    >>> import jax, jax.numpy as jnp
    >>> traffic(jax.jit(lambda x: x + 1).lower(jnp.ones(256)).compile())
    Traffic(launches=1, bytes=2048)
    """
    program = program_of(compiled)
    kernels = [kernel for kernel in program.kernels() if not products_in(program, kernel)]
    moved = sum(
        kernel.runs * (program.bytes_read(kernel) + program.bytes_written(kernel))
        for kernel in kernels
    )
    return Traffic(sum(kernel.runs for kernel in kernels), moved)


def added(compiled: Any, without: Any, sites: Sequence[Site]) -> Added:
    """What a program in FP8 does beside its matrix products that the same program without FP8
    doesn't.

    Args:
      compiled: a `jax.stages.Compiled` of a training step in FP8, or its text.
      without: the same of the step without FP8.
      sites: the step's sites, of `explain`.
    """
    here, there = traffic(compiled), traffic(without)
    selected = [site for site in sites if site.selected]
    runs = sum(math.prod(length for _, length in site.loops) for site in selected)
    return Added(
        (here.launches - there.launches) / max(runs, 1),
        here.bytes - there.bytes,
        sum(minimum_bytes(site) for site in selected),
    )


def minimum_bytes(site: Site) -> int:
    """What casting must read and write at the least for a site's three products, in one run of the
    program.

    Each of lhs, rhs and grad is read once, and its codes and its transposed codes written once.

    >>> from fp8jax import recipes
    >>> avals = "bfloat16[8,4]", "float32[4,2]", "bfloat16[8,2]"
    >>> minimum_bytes(Site("mlp", "dot_general", *avals, 128, recipes.current(), ""))
    240
    """
    once = 0
    for dtype, shape in (
        must_match(re.match(r"(\w+)\[([\d,]*)", aval)).groups()
        for aval in (site.lhs, site.rhs, site.out)
    ):
        leaf = Leaf(dtype, tuple(int(size) for size in shape.split(",") if size))
        once += leaf.bytes + 2 * math.prod(leaf.shape)
    return once * math.prod(length for _, length in site.loops)
