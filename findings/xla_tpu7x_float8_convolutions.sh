#!/usr/bin/env bash
# Convolutions of float8 on a TPU 7x, by XLA's own estimate: slower than bfloat16, or twice as fast.
#
# A TPU 7x multiplies float8 at twice the rate of bfloat16, and matrix products compiled for one are
# estimated at 0.47 of bfloat16's cycles. One would guess about half for convolutions as well, whatever
# the batch.
#
# With JAX 0.12.0.1 (libtpu 0.0.50.1), a 3 x 3 convolution of 512 channels on 32 x 32 positions takes
# 1.73 times bfloat16's estimated cycles at batch 8, and 0.51 times at batch 64. The estimates are in
# the compiled program; no TPU is needed to read them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax[tpu]==0.12.0.1" "jaxlib==0.12.0.1" "libtpu==0.0.50.1"
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 "$folder/env/bin/python" - <<'PYTHON'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

topology = topologies.get_topology_desc(platform="tpu", topology_name="tpu7x:2x2x1")
sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def cycles(batch, dtype):
    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        )

    arguments = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape in ((batch, 32, 32, 512), (3, 3, 512, 512))
    )
    text = jax.jit(convolution).lower(*arguments).compile().as_text()
    found = map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))
    return sum(count for count in found if count < 2**62)  # above: none is known


print("jax", jax.__version__)
ratios = {}
for batch in (8, 64):
    float8, bfloat16 = (cycles(batch, dtype) for dtype in (jnp.float8_e4m3fn, jnp.bfloat16))
    ratios[batch] = float8 / bfloat16
    print(f"batch {batch}: float8 {float8}, bfloat16 {bfloat16} cycles: {ratios[batch]:.2f}")
assert ratios[8] > 1.3 and ratios[64] < 0.8, "they are alike now"
PYTHON
