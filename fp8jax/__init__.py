"""fp8jax: FP8 training and inference as a JAX transformation, with explicit state."""

import importlib

from fp8jax import recipes
from fp8jax.codec import decode, encode
from fp8jax.formats import (
    E3M4, E4M3, E4M3B11FNUZ, E4M3FNUZ, E4M3IEEE, E5M2, E5M2FNUZ, E8M0, FORMATS, Format, get_format,
)
from fp8jax.recipe import CastSpec, DelayedScaling, ProductCasts, Recipe
from fp8jax.scaling import BlockWise, PerChannel, PerTensor, PerToken
from fp8jax.state import SiteScales
from fp8jax.transform import Explanation, Fp8Function, Rule, Site, calibrate, fp8


def __getattr__(name: str):
    """Loads `fp8jax.linen` and the like on first use, so that `import fp8jax` stays light."""
    if name in ("linen", "metrics", "ops", "optim", "plots"):
        return importlib.import_module(f"fp8jax.{name}")
    raise AttributeError(f"module 'fp8jax' has no attribute {name!r}")
