#!/usr/bin/env bash
# gfloat rounds to E8M0, and gives numbers that E8M0 hasn't; halfway cases alternate.
#
# gfloat describes the formats of the OCP text and is a reference to hold codecs against. One would guess that
# round_float(fi, x) is a value of the format `fi`, the nearest, so that encoding and decoding it changes
# nothing; and that 1.5 and 3, each halfway between two powers of two, go the same way.
#
# With gfloat 0.5.2 round_float to ocp_e8m0 gives 0 for 0, -1 for -1, and 2^-130 for 2^-130. E8M0 has no zero,
# no sign and nothing below 2^-127, and encode_float then makes NaN of all three without a word. 1.5 becomes
# 2 and 3 becomes 2 as well: without mantissa bits "to even" is to the even exponent. ml_dtypes 0.6.0 gives 2
# and 4. To multiply by 2 before the cast isn't to multiply by 2 after it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "gfloat==0.5.2" "ml_dtypes==0.6.0" "numpy==2.5.5"
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import gfloat
import ml_dtypes
import numpy as np
from gfloat.formats import format_info_ocp_e8m0 as e8m0

values = {gfloat.decode_float(e8m0, code).fval for code in range(255)}
assert values == {2.0**k for k in range(-127, 128)}
print("gfloat", version("gfloat"), "ml_dtypes", version("ml_dtypes"))
for x in (0.0, -1.0, 2.0**-130):
    rounded = gfloat.round_float(e8m0, x)
    again = gfloat.decode_float(e8m0, gfloat.encode_float(e8m0, rounded)).fval
    print(f"{x} is rounded to {rounded}; encoded and decoded it is {again}")
    assert rounded == x and rounded not in values and np.isnan(again)

halfway = 1.5 * 2.0 ** np.arange(-3, 4)
by_gfloat = gfloat.round_ndarray(e8m0, halfway)
by_ml_dtypes = halfway.astype(ml_dtypes.float8_e8m0fnu).astype(float)
print("halfway:", halfway)
print("gfloat:", by_gfloat, "ml_dtypes:", by_ml_dtypes)
assert np.array_equal(by_ml_dtypes, halfway / 0.75)
assert np.array_equal(np.log2(by_gfloat) % 2, np.ones(7))
PYTHON
