"""Parameter trees with FP8 weights to checkpoints that others read: the same codes and scales."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax._formats import E4M3
from fp8jax._params import named_leaves
from fp8jax._state import find_site_scales
from fp8jax._tensor import Fp8Tensor
from fp8jax.interop._folder import write_folder
from fp8jax.interop._names import TORCH_NAMES, Name, each_in_file, find_name
from fp8jax.interop._output import Output, is_linear, scheme_of_weights
from fp8jax.interop._safetensors_file import CheckpointError, safetensors_dtype
from fp8jax.interop._scheme import shape_in_file, to_file_layout

SHARD_BYTES = 5_000_000_000


def write_checkpoint(
    folder: str | pathlib.Path,
    params: Any,
    names: Sequence[Name] = TORCH_NAMES,
    *,
    method: str | None = None,
    scales: Any = None,
    input_scales: Mapping[str, Any] | None = None,
    kv_scales: Mapping[str, Any] | None = None,
    activations: Literal["static", "dynamic"] | None = "dynamic",
    scale_dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write parameters as a checkpoint that others read: safetensors files and `config.json`.

    How the weights are held says the format: all `Fp8Tensor`s per tensor, per output channel, or
    block-wise; in blocks of 32 along the inputs, MXFP8. What the readers of a dialect would misread
    is not written. One tensor is brought to the host at a time. Where anything fails, nothing is
    left behind.

    Args:
      folder: is made where it is missing; must not hold a checkpoint yet.
      params: a tree of arrays and E4M3 `Fp8Tensor`s.
      names: what each parameter is called in the file.
      method: the dialect: "compressed-tensors" (by default per tensor, per channel and MXFP8),
        "fp8" as transformers reads it (by default block-wise), "mxfp8" or "modelopt".
      scales: a tree with the `SiteScales` of the calibrated model, for static scales of
        activations, per tensor; each weight's is that of the site with the name of its module.
      input_scales: the same as numbers, by path of each quantized weight, as of a
        `LoadedCheckpoint`.
      kv_scales: static scales of keys and values, by path of the weights that make them, as of a
        `LoadedCheckpoint`.
      activations: "dynamic", or None for weights alone; "static" follows from `scales` or
        `input_scales`.
      scale_dtype: of the weights' scales: "float32", or "bfloat16" or "ue8m0" where they are exact
        in it. By default float32, and ue8m0 for MXFP8.
      config: what else `config.json` is to hold, as {"architectures": ...}; what it says of
        quantization is replaced.
      max_shard_bytes: the most bytes of tensors in one file.
      progress: whether to show a bar, on stderr.

    Raises:
      CheckpointError: where the formats can't hold the parameters, or a reader would misread them.
      ValueError: where a parameter has no name, a weight no site or scale, or two parameters the
        same name.
      FileExistsError: where the folder holds a checkpoint.

    Warns:
      UserWarning: where blocks under method "fp8" leave a tail, which transformers without a GPU
        misreads.
    """
    named = named_leaves(params)[0]
    for path, leaf in named:
        _check_leaf(path, leaf)
    entries = [(path, leaf, *find_name(names, path)) for path, leaf in named]
    quantized = [path for path, leaf, *_ in entries if isinstance(leaf, Fp8Tensor)]
    inputs = _input_scales(scales, input_scales, quantized)
    keys_values = _of_paths("kv_scales", kv_scales, [path for path, *_ in entries])
    out = Output(
        scheme_of_weights(
            _weights(entries), method, activations if inputs is None else "static", scale_dtype
        ),
        scale_dtype,
    )
    if out.scheme is None and keys_values:
        raise ValueError("kv_scales must go with quantized weights; got none of them.")
    for entry in entries:
        _add(out, *entry, inputs or {}, keys_values)
    write_folder(
        folder,
        out.tensors,
        out.value_of,
        out.files(config or {}),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _add(
    out: Output,
    path: str,
    leaf: Any,
    name: Name,
    theirs: str,
    inputs: Mapping[str, np.ndarray],
    keys_values: Mapping[str, np.ndarray],
) -> None:
    """The tensors of a parameter."""
    stacked = len(name.stacked)
    data = leaf.data if isinstance(leaf, Fp8Tensor) else leaf
    shape = jnp.shape(data)
    lead, in_file = shape[:stacked], shape_in_file(shape[stacked:], name.inputs)
    for index, own in each_in_file(name, theirs, shape):
        values = functools.partial(_at, data, index, name.inputs)
        if isinstance(leaf, Fp8Tensor):
            groups = leaf.scaling.group_shape(shape[stacked:])
            scale = functools.partial(_scale_at, leaf, lead, index, name.inputs)
            in_groups = shape_in_file(groups, name.inputs) if groups else ()
            out.add_weight(path, own, in_file, values, in_groups, scale)
            if path in inputs:
                out.add_input_scale(path, own, _per_layer(path, inputs[path], lead)[index])
        else:
            out.add(own, _dtype_of(data), in_file, values)
            if name.inputs or own.endswith(".weight") and is_linear(own, in_file):
                out.leave_out(own)
        if path in keys_values:
            out.add_kv_scale(path, own, _per_layer(path, keys_values[path], lead)[index])


def _per_layer(path: str, value: Any, lead: tuple[int, ...]) -> np.ndarray:
    """Scales for each layer and expert; what has fewer axes is shared by the later ones."""
    value = np.asarray(value, np.float32)
    value = value.reshape(value.shape + (1,) * (len(lead) - value.ndim))
    try:
        return np.broadcast_to(value, lead)
    except ValueError:
        raise ValueError(
            f"scale of {path!r} must have the axes {list(lead)} of layers and experts; got "
            f"{list(value.shape)}."
        ) from None


def _weights(entries: Sequence[tuple]) -> list[tuple]:
    """What `scheme_of_weights` wants of the quantized ones."""
    weights = []
    for path, leaf, name, _ in entries:
        if isinstance(leaf, Fp8Tensor):
            if leaf.format != E4M3:
                raise CheckpointError(
                    f"weights must be E4M3, the format of these files; got {leaf.format} for "
                    f"{path!r}. Quantize it to E4M3."
                )
            weights.append((path, leaf.shape[len(name.stacked) :], leaf.scaling, name.inputs))
    return weights


def _check_leaf(path: str, leaf: Any) -> None:
    """CheckpointError where a parameter is none that files hold."""
    dtype = getattr(leaf, "dtype", None)
    if isinstance(leaf, Fp8Tensor):
        return
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise CheckpointError(
            f"parameter {path!r} must be an array of numbers; got a typed key, "
            f"{dtype}{list(leaf.shape)}. Leave it out, or write jax.random.key_data(key)."
        )
    try:
        jnp.result_type(leaf)  # raises for what is no array of numbers
        safetensors_dtype(_dtype_of(leaf))
    except CheckpointError as error:
        raise CheckpointError(f"parameter {path!r}: {error}") from None
    except TypeError:
        raise CheckpointError(
            f"parameter {path!r} must be an array of numbers; got {dtype or type(leaf).__name__}. "
            "Leave it out of params, or put it into config."
        ) from None


def _dtype_of(leaf: Any) -> Any:
    """Its own, where it has one: JAX would take a NumPy array of float64 for one of float32."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _at(data: Any, index: tuple[int, ...], inputs: int) -> np.ndarray:
    return to_file_layout(np.asarray(data[index] if index else data, _dtype_of(data)), inputs)


def _scale_at(leaf: Fp8Tensor, lead, index, inputs) -> np.ndarray:
    scale = np.asarray(leaf.scale)
    own = scale.shape[len(lead) :] if scale.ndim > len(lead) else ()
    scale = np.broadcast_to(scale, lead + own)[index]
    return to_file_layout(scale, inputs) if scale.ndim else scale


def _input_scales(
    scales: Any, given: Mapping[str, Any] | None, quantized: Sequence[str]
) -> dict[str, np.ndarray] | None:
    """Static scales of activations by path of a weight; None where there are to be none."""
    if scales is not None and given is not None:
        raise ValueError("scales and input_scales mean the same; got both. Leave one out.")
    if scales is not None:
        exponents = _input_exponents(scales, quantized)
        return {path: np.exp2(exponent).astype(np.float32) for path, exponent in exponents.items()}
    if given is None:
        return None
    missing = [path for path in quantized if path not in given]
    if missing:
        raise ValueError(
            f"input_scales must hold one for each quantized weight; got none for {missing[0]!r} "
            f"and {len(missing) - 1} more. Leave them out for dynamic activations."
        )
    return _of_paths("input_scales", given, quantized)


def _of_paths(
    what: str, given: Mapping[str, Any] | None, paths: Sequence[str]
) -> dict[str, np.ndarray]:
    known = set(paths)
    surplus = [path for path in given or {} if path not in known]
    if surplus:
        raise ValueError(
            f"{what} must be of paths of params; got {surplus[0]!r}. The paths are "
            f"{', '.join(paths[:8])} and so on."
        )
    return {path: np.asarray(value, np.float32) for path, value in (given or {}).items()}


def _input_exponents(scales: Any, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """By path of a weight, the exponent of its activations' scale; the largest of several calls."""
    found: dict[str, np.ndarray] = {}
    for node in find_site_scales(scales):
        if node.lhs is not None:
            module, exponent = node.site.partition("#")[0], np.asarray(node.lhs, np.float64)
            found[module] = np.maximum(found.get(module, exponent), exponent)
    # A site is called as the module, or in a plain tree as the weight.
    sites = {path: path if path in found else path.rpartition("/")[0] for path in paths}
    missing = [site for site in sites.values() if site not in found]
    if missing:
        raise ValueError(
            "scales must hold a site with a delayed lhs for each quantized weight; got none named "
            f"{missing[0]!r}. Leave the scales out for dynamic activations; the sites are "
            f"{sorted(found)[:8]}."
        )
    return {path: found[site] for path, site in sites.items()}
