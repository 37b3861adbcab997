#!/usr/bin/env bash
# np.copysign of a zero in the "fnuz" formats is NaN; so is the step up from the smallest negative number.
#
# Rounding code takes the sign off, works on the absolute value, and puts the sign back with copysign. One
# would guess that a zero stays one: the formats without a negative zero have only one to offer, and -1 times
# zero, or its negative, are zero.
#
# With ml_dtypes 0.6.0 and NumPy 2.5.5 copysign sets the sign bit, and a zero with it is the one code that the
# fnuz formats have for NaN. All zeros beside negative numbers become NaN, as does the result of
# jax.lax.nextafter (JAX 0.12.0.1) from the negative number next to zero; np.nextafter there gives 0. In
# float8_e4m3fn and float8_e5m2 both are -0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "ml_dtypes==0.6.0" "numpy==2.5.5" "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import jax
import ml_dtypes
import numpy as np

FNUZ = ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz")
print("ml_dtypes", version("ml_dtypes"), "numpy", np.__version__, "jax", jax.__version__)
for name in (*FNUZ, "float8_e4m3fn", "float8_e5m2"):
    dtype = getattr(ml_dtypes, name)
    x, one = np.array([0, 0.5, -0.5], dtype), np.array([1], dtype)
    floors = np.copysign(np.floor(np.abs(x)), x)  # round towards zero
    last = -np.nextafter(0 * one, one)
    by_numpy, by_jax = np.nextafter(last, one), np.asarray(jax.lax.nextafter(last, one))
    print(f"{name}: {x} without fractions {floors}, copysign(0, -1) {np.copysign(0 * one, -one)}; "
          f"up from {last}: {by_numpy} by NumPy, {by_jax} by JAX")
    assert by_numpy == 0 and (np.negative(0 * one) == 0).all() and floors[0] == floors[1] == 0
    for result in (floors[2:], np.copysign(0 * one, -one), by_jax):
        assert np.isnan(result).all() if name in FNUZ else (result == 0).all()
PYTHON
