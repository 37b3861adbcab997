"""What XLA made of a program: `report` tells for each site which engine multiplies it, in FP8 or
fallen back.
"""

from fp8jax.hlo._report import Report, report
from fp8jax.hlo._traffic import added, minimum_bytes, traffic

__all__ = ["Report", "added", "minimum_bytes", "report", "traffic"]
