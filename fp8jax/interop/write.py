"""Parameter trees with FP8 weights to checkpoints that others read: codes and scales as they are, never requantized."""

import functools
import pathlib
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.formats import E4M3, E8M0
from fp8jax.interop.folder import write_folder
from fp8jax.interop.names import LAYER, TORCH_NAMES, Name, find_name
from fp8jax.interop.safetensors_file import CheckpointError, TensorInfo, safetensors_dtype
from fp8jax.interop.scheme import SCALE_DTYPES, Scheme, to_file_layout, weights_in_file
from fp8jax.params import named_leaves
from fp8jax.state import find_site_scales
from fp8jax.tensor import Fp8Tensor

SHARD_BYTES = 5_000_000_000


def write_checkpoint(
    folder: str | pathlib.Path,
    params: Any,
    names: Sequence[Name] = TORCH_NAMES,
    *,
    method: str | None = None,
    scales: Any = None,
    activations: str | None = "dynamic",
    scale_dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write parameters as a checkpoint that others read: safetensors files and `config.json`.

    How the weights are held says the format: all `Fp8Tensor`s per tensor, per output channel, or block-wise. One tensor
    is brought to the host at a time. Where anything fails, nothing is left behind.

    Args:
      folder: is made where it is missing; must not hold a checkpoint yet.
      params: a tree of arrays and E4M3 `Fp8Tensor`s.
      names: what each parameter is called in the file.
      method: "compressed-tensors" (by default per tensor and per channel) or "fp8" (by default block-wise).
      scales: a tree with the `SiteScales` of the calibrated model, for static scales of activations, per tensor; each
        weight's is that of the site with the name of its module.
      activations: "dynamic", or None for weights alone; "static" follows from `scales`.
      scale_dtype: of the weights' scales: "float32", or "bfloat16" or "ue8m0" where they are exact in it.
      config: what else `config.json` is to hold, as {"architectures": ...}.
      max_shard_bytes: the most bytes of tensors in one file.
      progress: whether to show a bar.

    Raises:
      CheckpointError: where the formats can't hold the parameters.
      ValueError: where a parameter has no name, a weight no site, or two parameters the same name.
      FileExistsError: where the folder holds a checkpoint.
    """
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {tuple(SCALE_DTYPES)}; got {scale_dtype!r}.")
    named = named_leaves(params)[0]
    for path, leaf in named:
        _check_leaf(path, leaf)
    entries = [(path, leaf, *find_name(names, path)) for path, leaf in named]
    quantized = [entry for entry in entries if isinstance(entry[1], Fp8Tensor)]
    scheme = _scheme_of_params(quantized, method, "static" if scales is not None else activations)
    exponents = {} if scales is None else _input_exponents(scales, [path for path, *_ in quantized])
    tensors: dict[str, TensorInfo] = {}
    values: dict[str, Callable[[], np.ndarray]] = {}

    def add(name, dtype, shape, value):
        if name in tensors:
            raise ValueError(f"names must tell parameters apart; got {name!r} for two.")
        safetensors_dtype(dtype)
        tensors[name], values[name] = TensorInfo(np.dtype(dtype), tuple(shape)), value

    ignored = []
    for path, leaf, name, theirs in entries:
        count = jnp.shape(leaf)[0] if name.stacked else 1
        for layer in range(count):
            own, at = theirs.replace(LAYER, str(layer)), layer if name.stacked else None
            data = leaf.data if isinstance(leaf, Fp8Tensor) else leaf
            shape = to_file_layout(
                np.broadcast_to(np.uint8(0), jnp.shape(data)[int(name.stacked) :]), name.inputs
            ).shape
            add(
                own,
                jnp.result_type(data),
                shape,
                functools.partial(_layer_in_file, data, at, name.inputs),
            )
            if isinstance(leaf, Fp8Tensor):
                value = _scale_in_file(
                    path, leaf, at, name.inputs, scheme, SCALE_DTYPES[scale_dtype]
                )
                add(own + scheme.scale_name, value.dtype, value.shape, lambda value=value: value)
                if path in exponents:
                    own_exponent = np.broadcast_to(
                        exponents[path], (count,) if name.stacked else ()
                    ).reshape(-1)[layer]
                    value = np.exp2(own_exponent).astype(np.float32).reshape(1)
                    add(
                        own.removesuffix("weight") + "input_scale",
                        np.float32,
                        (1,),
                        lambda value=value: value,
                    )
            elif name.inputs:
                ignored.append(own.removesuffix(".weight"))
    config = dict(config or {})
    if scheme is not None:
        config["quantization_config"] = scheme.to_config(ignored, scale_dtype)
    write_folder(
        folder,
        tensors,
        lambda name: values.pop(name)(),
        config,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _check_leaf(path: str, leaf: Any) -> None:
    """CheckpointError where a parameter is none that files hold."""
    dtype = getattr(leaf, "dtype", None)
    if isinstance(leaf, Fp8Tensor):
        return
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise CheckpointError(
            f"parameter {path!r} must be an array of numbers; got a typed key, {dtype}{list(leaf.shape)}. Leave it out, or "
            "write jax.random.key_data(key)."
        )
    try:
        safetensors_dtype(jnp.result_type(leaf))
    except CheckpointError as error:
        raise CheckpointError(f"parameter {path!r}: {error}") from None
    except TypeError:
        raise CheckpointError(
            f"parameter {path!r} must be an array of numbers; got {dtype or type(leaf).__name__}. Leave it out of "
            "params, or put it into config."
        ) from None


def scheme_of_weights(
    weights: Sequence[tuple], method: str | None, activations: str | None
) -> Scheme | None:
    """The scheme of weights given as (path, shape without layers, scaling, axes of inputs); None where there are none."""
    kinds: dict[tuple, str] = {}
    for path, shape, scaling, inputs in weights:
        try:
            kinds.setdefault(weights_in_file(shape, scaling.normalize(len(shape)), inputs), path)
        except ValueError as error:
            raise CheckpointError(f"parameter {path!r}: {error}") from None
    if not kinds:
        return None
    if len(kinds) > 1:
        (first, here), (second, there) = list(kinds.items())[:2]
        raise CheckpointError(
            f"weights must all have groups of one kind, for config.json says it once; got {first} for {here!r} and {second} "
            f"for {there!r}. Quantize them alike."
        )
    ((kind, block),) = kinds
    return Scheme(
        weights=kind,
        block=block,
        activations=activations,
        method=method or ("fp8" if kind == "block" else "compressed-tensors"),
    )


def _scheme_of_params(quantized, method, activations) -> Scheme | None:
    for path, leaf, *_ in quantized:
        if leaf.format != E4M3:
            raise CheckpointError(
                f"weights must be E4M3, the format of these files; got {leaf.format} for {path!r}. Quantize it to E4M3."
            )
    weights = [
        (path, leaf.shape[int(name.stacked) :], leaf.scaling, name.inputs)
        for path, leaf, name, _ in quantized
    ]
    return scheme_of_weights(weights, method, activations)


def _layer_in_file(data, layer, inputs) -> np.ndarray:
    return to_file_layout(np.asarray(data if layer is None else data[layer]), inputs)


def _scale_in_file(path, leaf: Fp8Tensor, layer, inputs, scheme: Scheme, dtype) -> np.ndarray:
    scale = np.asarray(leaf.scale)
    if scheme.weights == "tensor":
        scale = (
            np.broadcast_to(scale, leaf.shape[:1]).reshape(-1)[layer : layer + 1]
            if layer is not None
            else scale.reshape(1)
        )
    else:
        if layer is not None:
            scale = np.broadcast_to(scale, (leaf.shape[0], *scale.shape[1:]))[layer]
        scale = to_file_layout(scale, inputs)
    return narrow_scale(path, scale, dtype)


def narrow_scale(path: str, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Scales in the dtype that they are stored in; CheckpointError where they are not exact in it."""
    if dtype == E8M0.dtype:
        mantissa, exponent = np.frexp(scale.astype(np.float64))
        exact = (mantissa == 0.5) & (exponent - 1 >= -E8M0.bias)
        narrow = (exponent - 1 + E8M0.bias).clip(0, 254).astype(np.uint8).view(dtype)
    else:
        narrow = scale.astype(dtype)
        exact = narrow.astype(np.float32) == scale
    if not exact.all():
        raise CheckpointError(
            f"scales of {path!r} must be exact in {dtype}; got {scale[~exact][0]}. Quantize with power_of_two=True, or "
            "write float32 scales."
        )
    return narrow


def _input_exponents(scales: Any, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """By path of a weight, the exponent of the activations' scale; the largest, where a module is called several times."""
    found: dict[str, np.ndarray] = {}
    for node in find_site_scales(scales):
        if node.lhs is not None:
            module, exponent = node.site.partition("#")[0], np.asarray(node.lhs, np.float64)
            found[module] = np.maximum(found.get(module, exponent), exponent)
    missing = [path for path in paths if path.rpartition("/")[0] not in found]
    if missing:
        raise ValueError(
            f"scales must hold a site with a delayed lhs for each quantized weight; got none named {missing[0].rpartition('/')[0]!r}. "
            f"Leave the scales out for dynamic activations; the sites are {sorted(found)[:8]}."
        )
    return {path: found[path.rpartition("/")[0]] for path in paths}
