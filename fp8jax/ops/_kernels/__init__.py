"""Products whose scales differ along what is summed over, by kernels that read the codes as they
are.

XLA has FP8 products for scales outside of the sum alone. For one scale per block of the sum there
are engines of some devices, a module each, with what it can do on top; `choose` says which one a
product gets, or why none. The product on decoded values, in `fp8jax.ops._execution`, is what each
is held against.
"""

from fp8jax.devices import device_of, division_of
from fp8jax.ops._kernels.choice import Choice, choose, has_engine
from fp8jax.ops._kernels.values import block_casts, values_of

__all__ = [
    "Choice",
    "block_casts",
    "choose",
    "device_of",
    "division_of",
    "has_engine",
    "values_of",
]
