#!/usr/bin/env bash
# A Pallas kernel's second output, kept by a scan for its backward pass: no program for a TPU 7x.
#
# A kernel that casts an operand for both products that it takes part in has two outputs. The forward
# product reads the one; the scan over the layers stacks the other. One would guess that it compiles
# wherever the kernel by itself does: a scan stacks any array.
#
# With JAX 0.12.0.1 (libtpu 0.0.50.1), XLA takes the stack into the kernel, but with tiles of 8 x 128
# where the backward product has asked for 16 x 128, and raises INTERNAL, "Fused computation shape ...
# is not equal to the fusion shape". Behind an optimization_barrier on that output it compiles. No TPU
# is needed to see it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.13 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax[tpu]==0.12.0.1" "jaxlib==0.12.0.1" "libtpu==0.0.50.1"
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 "$folder/env/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

topology = topologies.get_topology_desc(platform="tpu", topology_name="tpu7x:2x2x1")
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
weights, x = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    for shape in ((3, 1024, 1024), (2048, 1024))
)


def kernel(x, one, two):
    one[...] = x[...]
    two[...] = x[...]


def twice(x):
    tile = pl.BlockSpec((256, 512), lambda i, j: (i, j))
    grid = (x.shape[0] // 256, x.shape[1] // 512)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        kernel, grid=grid, in_specs=[tile], out_specs=[tile] * 2, out_shape=[out] * 2
    )(x)


def gradient_with(apart):
    def gradient(weights, x):
        def forward(x, w):
            one, two = twice(x)
            return jnp.tanh(one @ w), apart(two)

        def backward(g, layer):
            w, kept = layer
            return g @ w.T, kept.T @ g

        y, kept = jax.lax.scan(forward, x, weights)
        return jax.lax.scan(backward, y, (weights, kept), reverse=True)

    return gradient


def outcome(apart):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(gradient_with(apart)).lower(weights, x)
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return "compiled"


print("jax", jax.__version__)
fused, apart = outcome(lambda kept: kept), outcome(jax.lax.optimization_barrier)
print("as it is:", fused)
print("behind a barrier:", apart)
assert "Fused computation shape" in fused and apart == "compiled", "it has changed"
PYTHON
