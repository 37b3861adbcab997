"""What XLA made of a program: `report` tells for each site which engine multiplies it, in FP8 or
fallen back.
"""

from fp8jax.hlo.report import Report, report
from fp8jax.hlo.traffic import added, minimum_bytes, traffic

__all__ = ["Report", "added", "minimum_bytes", "report", "traffic"]
