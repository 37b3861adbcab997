"""The transform: a function's matrix products, found in its jaxpr and run in FP8 with explicit
state.
"""

from fp8jax._transform.explain import Explanation
from fp8jax._transform.function import Fp8Function, fp8
from fp8jax._transform.seeding import calibrate
from fp8jax._transform.sites import Rule, Site

__all__ = ["Explanation", "Fp8Function", "Rule", "Site", "calibrate", "fp8"]
