"""Encoding, decoding and quantizing on this machine, against XLA, ml_dtypes, Qwix and AQT."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax._codec import decode, encode
from fp8jax._formats import E4M3, E5M2
from fp8jax._scaling import BlockWise, PerChannel, PerTensor
from fp8jax._tensor import quantize
from fp8jax.bench.timing import interleaved_medians, optional, print_missing_peers, print_table

SHAPE = (4096, 4096)
CAST = "XLA clamp and astype"


def _cast(x):
    return jnp.clip(x, -E4M3.max, E4M3.max).astype(E4M3.dtype)


def _calls(
    functions: dict[str, Callable], argument, eager: dict[str, Callable] = {}
) -> dict[str, Callable]:
    """Calls of jitted functions, and of others as they are."""
    jitted = {name: jax.jit(function) for name, function in functions.items()} | eager
    return {name: lambda f=function: f(argument) for name, function in jitted.items()}


def encoders(x: jax.Array) -> dict[str, Callable]:
    """Rounding f32 to E4M3 codes."""
    functions = {
        CAST: _cast,
        "fp8jax encode": lambda x: encode(x, E4M3),
        "fp8jax encode, E5M2": lambda x: encode(x, E5M2),
        "fp8jax encode, ocp": lambda x: encode(x, E4M3, overflow="ocp"),
        "upper bytes, the memory's own pace": lambda x: (
            lax.bitcast_convert_type(x, jnp.uint32) >> 24
        ).astype(jnp.uint8),
    }
    if numerics := optional("aqt.jax.v2.numerics.fp8_numerics"):
        aqt = numerics.Fp8Numerics(dtype=E4M3.dtype.type)
        functions["AQT Fp8Numerics"] = lambda x: aqt.vjp_fwd(x, None)[0]
    return _calls(functions, x, {"fp8jax encode, called eagerly": lambda x: encode(x, E4M3)})


def host_encoders(x: jax.Array) -> dict[str, Callable]:
    """The same without XLA; in a table of its own, since so long a call in between slows all
    others.
    """
    host = np.asarray(x)
    return _calls(
        {CAST: _cast},
        x,
        {"ml_dtypes": lambda _: np.clip(host, -E4M3.max, E4M3.max).astype(E4M3.dtype)},
    )


def stochastic_encoders(x: jax.Array) -> dict[str, Callable]:
    """Stochastic rounding, beside its parts."""
    key = jax.random.key(1)
    functions = {
        "random bits": lambda x: jax.random.bits(key, x.shape),
        "fp8jax encode, nearest": lambda x: encode(x, E4M3),
        "fp8jax encode, stochastic": lambda x: encode(x, E4M3, rounding="stochastic", key=key),
    }
    if numerics := optional("aqt.jax.v2.numerics.fp8_numerics"):
        aqt = numerics.Fp8Numerics(dtype=E4M3.dtype.type)
        functions["AQT fp_mantissa_round and cast"] = lambda x: aqt.vjp_fwd(
            numerics.fp_mantissa_round(x, 3, key), None
        )[0]
    return _calls(functions, x)


def decoders(x: jax.Array) -> dict[str, Callable]:
    """Turning E4M3 codes into f32 and bf16."""
    functions = {
        "XLA astype f32": lambda codes: codes.astype(jnp.float32),
        "fp8jax decode f32": lambda codes: decode(codes),
        "XLA astype bf16": lambda codes: codes.astype(jnp.bfloat16),
        "fp8jax decode bf16": lambda codes: decode(codes, dtype=jnp.bfloat16),
    }
    return _calls(functions, encode(x, E4M3))


# Name: our granularity, and Qwix's arguments for it.
GRANULARITIES = {
    "per tensor": (PerTensor(), {}),
    "per channel": (PerChannel(-1), {"channelwise_axes": (1,)}),
    "1x128": (BlockWise((1, 128)), {"channelwise_axes": (0,), "tiled_axes": {1: 128}}),
    "128x128": (BlockWise((128, 128)), {"tiled_axes": {0: 128, 1: 128}}),
}


def quantizers(x: jax.Array) -> dict[str, Callable]:
    """Quantizing: amax, scales and codes."""
    functions: dict[str, Callable] = {CAST: _cast}
    qwix = optional("qwix")
    for name, (scaling, arguments) in GRANULARITIES.items():
        functions[f"fp8jax quantize, {name}"] = lambda x, s=scaling: quantize(x, scaling=s)
        if qwix:
            functions[f"Qwix quantize, {name}"] = lambda x, a=arguments: qwix.quantize(
                x, E4M3.dtype, **a
            )
    return _calls(functions, x, {"fp8jax quantize, per tensor, called eagerly": quantize})


def main(rounds: int = 15) -> None:
    """Prints the tables."""
    print_missing_peers()
    x = jax.random.normal(jax.random.key(0), SHAPE)
    size = "x".join(map(str, SHAPE))
    for title, contenders, reference in (
        ("encode", encoders, CAST),
        ("encode", host_encoders, CAST),
        ("decode", decoders, "XLA astype f32"),
        ("quantize", quantizers, CAST),
        ("stochastic", stochastic_encoders, "random bits"),
    ):
        print_table(f"{title}, f32 {size}", reference, interleaved_medians(contenders(x), rounds))
