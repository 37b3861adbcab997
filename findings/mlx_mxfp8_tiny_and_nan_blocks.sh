#!/usr/bin/env bash
# Blocks of tiny numbers, and blocks with a NaN, in MLX's "mxfp8" quantization.
#
# One would guess that a block of numbers near zero comes back as numbers near zero, and that a NaN stays
# one: both formats of MXFP8, E4M3 for the elements and E8M0 for the scale, have a NaN.
#
# With mlx 0.32.4 on a CPU a block of 1e-37 comes back as infinity and one of 1e-40 as 1e37: the scale's
# exponent would be below the smallest, -127, and wraps around to large ones instead of stopping there.
# A block of ones with one NaN comes back as 896 in all 32 places, with no NaN to notice it by. "mxfp4" wraps
# as well. Second moments of an optimizer are what can be as small as that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-cpu==0.32.4" "numpy==2.5.5"
"$folder/env/bin/python" - <<'PYTHON'
import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)


def there_and_back(block, mode="mxfp8"):
    quantized = mx.quantize(mx.array(np.float32(block))[None], group_size=32, mode=mode)
    back = mx.dequantize(*quantized, group_size=32, mode=mode, dtype=mx.float32)
    return np.array(back)[0], int(quantized[1][0, 0])


found = {}
for value in (1e-30, 1e-37, 1e-40):
    back, scale = there_and_back(np.full(32, value))
    found[value] = back[0]
    print(f"mlx {mx.__version__}: a block of {value} has the scale {scale} and comes back as {back[0]}")
back, scale = there_and_back([np.nan] + [1] * 31)
print(f"a NaN and 31 ones, scale {scale}, come back as {back[:3]} ...")
fp4, scale = there_and_back(np.full(32, 1e-40), "mxfp4")
print(f"mxfp4: a block of 1e-40 has the scale {scale} and comes back as {fp4[0]}")
assert abs(found[1e-30] / 1e-30 - 1) < 0.07
assert found[1e-37] == np.inf and found[1e-40] > 1e36 and fp4[0] > 1e30
assert (back == 896).all()
PYTHON
