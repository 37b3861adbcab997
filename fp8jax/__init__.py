"""fp8jax: FP8 training and inference as a JAX transformation, with explicit state."""

import importlib
import typing

from fp8jax import devices, recipes
from fp8jax._bank import Scales
from fp8jax._codec import decode, encode
from fp8jax._formats import (
    E3M4,
    E4M3,
    E4M3B11FNUZ,
    E4M3FNUZ,
    E4M3IEEE,
    E5M2,
    E5M2FNUZ,
    E8M0,
    FORMATS,
    Format,
    get_format,
)
from fp8jax._params import WeightRule, dequantize_params, quantize_params
from fp8jax._recipe import CastSpec, DelayedScaling, ProductCasts, Recipe
from fp8jax._scaling import BlockWise, PerChannel, PerTensor, PerToken
from fp8jax._select import select_format
from fp8jax._site_scales import SiteScales
from fp8jax._state import migrate_scales
from fp8jax._tensor import Fp8Tensor, QuantizationError, dequantize, quantization_error, quantize
from fp8jax._transform import Explanation, Fp8Function, Rule, Site, calibrate, fp8
from fp8jax.optim import ScalingState, accumulate, delayed_scaling, with_delayed_scaling

if typing.TYPE_CHECKING:  # Loaded on first use, by `__getattr__` below.
    from fp8jax import (
        checkpoint,
        checkpoint_policies,
        hlo,
        interop,
        kv_cache,
        linen,
        metrics,
        nnx,
        ops,
        optim,
        plots,
        quality,
        report,
    )

__version__ = "0.2.0"

__all__ = [
    "BlockWise",
    "CastSpec",
    "DelayedScaling",
    "E3M4",
    "E4M3",
    "E4M3B11FNUZ",
    "E4M3FNUZ",
    "E4M3IEEE",
    "E5M2",
    "E5M2FNUZ",
    "E8M0",
    "Explanation",
    "FORMATS",
    "Format",
    "Fp8Function",
    "Fp8Tensor",
    "PerChannel",
    "PerTensor",
    "PerToken",
    "ProductCasts",
    "QuantizationError",
    "Recipe",
    "Rule",
    "Scales",
    "ScalingState",
    "Site",
    "SiteScales",
    "WeightRule",
    "accumulate",
    "calibrate",
    "checkpoint",
    "checkpoint_policies",
    "decode",
    "delayed_scaling",
    "dequantize",
    "dequantize_params",
    "devices",
    "encode",
    "fp8",
    "get_format",
    "hlo",
    "interop",
    "kv_cache",
    "linen",
    "metrics",
    "migrate_scales",
    "nnx",
    "ops",
    "optim",
    "plots",
    "quality",
    "quantization_error",
    "quantize",
    "quantize_params",
    "recipes",
    "report",
    "select_format",
    "with_delayed_scaling",
]

_ON_FIRST_USE = (
    "checkpoint",
    "checkpoint_policies",
    "hlo",
    "interop",
    "kv_cache",
    "linen",
    "metrics",
    "nnx",
    "ops",
    "optim",
    "plots",
    "quality",
    "report",
)


def __getattr__(name: str):
    """Loads `fp8jax.linen` and the like on first use, so that `import fp8jax` stays light."""
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"fp8jax.{name}")
    raise AttributeError(f"module 'fp8jax' has no attribute {name!r}")
