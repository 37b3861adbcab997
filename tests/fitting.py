"""Scales of one product, of what it observed."""

from fp8jax._scaling import exponent_from_amax
from fp8jax._site_scales import SiteScales


def fitting(scales: SiteScales, amaxes: SiteScales) -> SiteScales:
    """`scales` with the exponents that fit these amaxes."""
    return scales.replace(
        **{
            name: exponent_from_amax(getattr(amaxes, name), cast.format)
            for name, cast in scales.casts_by_operand().items()
        }
    )
