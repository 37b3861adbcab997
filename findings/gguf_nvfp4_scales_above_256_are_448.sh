#!/usr/bin/env bash
# The scale of an NVFP4 block in gguf-py: all from 256 to 448 become 448.
#
# NVFP4 has an E4M3 scale for each 16 elements, and NVFP4 files are made so that the largest of a tensor is
# 448. One would guess that 256, 288 and so on up to 448, the codes 0x78 to 0x7E, are encoded as themselves,
# as they are decoded, and that halfway cases go to the even neighbour as a cast has it.
#
# With gguf 0.19.0 `NVFP4.fp32_to_ue4m3` takes the largest exponent for an overflow: 256 becomes 0x7E, which
# is 448, 75 % too much. Ties go up (17 becomes 18 and not 16), and what rounds up to the smallest
# normal number, 2^-6, stays below it. `ue4m3_to_fp32`, which halves what it decodes, reads all codes right
# but NaN, which is 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "gguf==0.19.0" "ml_dtypes==0.6.0" "numpy==2.5.5"
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np
from gguf.quants import NVFP4

codes = np.arange(128, dtype=np.uint8)
values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
decoded = 2 * NVFP4.ue4m3_to_fp32(codes)
again = NVFP4.fp32_to_ue4m3(values[:127])
wrong = np.flatnonzero(again != codes[:127])
between = np.float32([17, 0.0155])
as_cast = between.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
encoded = 2 * NVFP4.ue4m3_to_fp32(NVFP4.fp32_to_ue4m3(between))
print("gguf", version("gguf"))
for code in wrong:
    print(f"{values[code]}, code {code:#x}, is encoded as {again[code]:#x}, {values[again[code]]}")
print(f"{between} become {encoded}, by a cast {as_cast}; NaN is decoded as {decoded[127]}")
assert np.array_equal(decoded[:127], values[:127]) and np.isnan(values[127]) and decoded[127] == 0
assert values[wrong].tolist() == [256, 288, 320, 352, 384, 416] and (again[wrong] == 0x7E).all()
assert as_cast.tolist() == [16, 2**-6] and encoded.tolist() == [18, 7 * 2**-9]
PYTHON
