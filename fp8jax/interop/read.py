"""Foreign checkpoints to parameter trees with FP8 weights: codes and scales as they are, never requantized."""

import dataclasses
import pathlib
import re
from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from jax.sharding import NamedSharding

from fp8jax.formats import E4M3, E8M0
from fp8jax.interop.folder import CheckpointFolder
from fp8jax.interop.names import LAYER, TORCH_NAMES, Name, find_name
from fp8jax.interop.safetensors_file import CheckpointError
from fp8jax.interop.scheme import (
    SCALE_DTYPES,
    Scheme,
    from_file_layout,
    scaling_here,
    to_file_layout,
)
from fp8jax.params import named_leaves, sharding_of_scale
from fp8jax.tensor import Fp8Tensor

_SCALES = ("_scale", "_scale_inv")


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """What `read_checkpoint` read.

    Args:
      params: the tree, with `Fp8Tensor` leaves where the checkpoint holds codes.
      input_scales: static scales of activations, by path of the weight that they are multiplied by: float32, one per
        layer where layers are stacked.
      scheme: how the weights are quantized, and the activations are to be; None where nothing is.
      config: the contents of `config.json`.
    """

    params: Any
    input_scales: dict[str, np.ndarray]
    scheme: Scheme | None
    config: dict[str, Any]


def read_checkpoint(
    folder: str | pathlib.Path,
    like: Any,
    names: Sequence[Name] = TORCH_NAMES,
    *,
    ignore: Sequence[str] = (),
    progress: bool = False,
) -> LoadedCheckpoint:
    """Read a checkpoint of safetensors files: compressed-tensors in FP8, per tensor or per channel; block-wise FP8; or dense.

    One tensor is read at a time. Everything is checked before it is used, and nothing is guessed: the block's extents
    come from `config.json`.

    Args:
      folder: holds `config.json` and `model.safetensors`, or several files and their index.
      like: the parameter tree to fill, dense: of arrays or, as from `jax.eval_shape(model.init, ...)`, abstract. What is
        not quantized comes in its dtypes, and codes stand for them; where a leaf has a sharding, what is read gets it.
      names: which tensor each parameter is; see `llama_names` for another such list.
      ignore: regular expressions over whole names of tensors that may stay unread.
      progress: whether to show a bar.

    Returns:
      A `LoadedCheckpoint`.

    Raises:
      CheckpointError: where a file is damaged, cut off, missing or of another format; a tensor missing, of another
        shape or dtype, or not finite where it is a scale; or a tensor is left unread.
      ValueError: where a parameter has no name.
    """
    source = CheckpointFolder(folder)
    reader = _Reader(source, Scheme.from_config(source.config))
    named, tree = named_leaves(like)
    leaves = []
    for path, leaf in rich.progress.track(named, "reading", disable=not progress):
        name, theirs = find_name(names, path)
        leaves.append(reader.parameter(path, leaf, name, theirs))
    unread = [
        name
        for name in source.tensors
        if name not in reader.read and not any(re.fullmatch(p, name) for p in ignore)
    ]
    if unread:
        raise CheckpointError(
            f"checkpoint must hold tensors that are parameters; got {unread[0]!r} and {len(unread) - 1} more that "
            "none is. Correct the names, or pass ignore=[...] with patterns of what may stay unread."
        )
    return LoadedCheckpoint(
        jax.tree.unflatten(tree, leaves), reader.input_scales, reader.scheme, source.config
    )


class _Reader:
    """Reads parameters, and keeps what it came by."""

    def __init__(self, source: CheckpointFolder, scheme: Scheme | None):
        self.source, self.scheme = source, scheme
        self.read: set[str] = set()
        self.input_scales: dict[str, np.ndarray] = {}

    def parameter(self, path: str, leaf: Any, name: Name, theirs: str) -> Any:
        """The value for a leaf."""
        shape, sharding = jnp.shape(leaf), getattr(leaf, "sharding", None)
        if name.stacked:
            if not shape:
                raise ValueError(
                    f"parameter {path!r} must have an axis of layers, as its name {name.template!r} says; got a scalar."
                )
            layers = [
                self._tensor(path, shape[1:], name.inputs, theirs.replace(LAYER, str(layer)))
                for layer in range(shape[0])
            ]
            values, scales, inputs = (self._stack(path, part) for part in zip(*layers))
        else:
            values, scales, inputs = self._tensor(path, shape, name.inputs, theirs)
        if inputs is not None:
            self.input_scales[path] = inputs
        placed = sharding if isinstance(sharding, NamedSharding) else None
        dtype = leaf.dtype if isinstance(leaf, Fp8Tensor) else jnp.result_type(leaf)
        if scales is None:
            if jnp.issubdtype(dtype, jnp.floating) != jnp.issubdtype(values.dtype, jnp.floating):
                raise CheckpointError(
                    f"parameter {path!r} must be {dtype}; got {theirs!r} of {values.dtype}."
                )
            narrow = values.astype(dtype)
            if not jnp.issubdtype(dtype, jnp.floating) and not np.array_equal(narrow, values):
                raise CheckpointError(
                    f"parameter {path!r} must fit into {dtype}; got {theirs!r} of {values.dtype} with values that don't."
                )
            return jax.device_put(narrow, placed)
        stacked = int(name.stacked)
        scaling = scaling_here(self.scheme, len(shape) - stacked, name.inputs)
        beside = None if placed is None else sharding_of_scale(placed, shape, scaling, stacked)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise CheckpointError(f"parameter {path!r} must be {dtype}; got FP8 codes in {theirs!r}.")
        return Fp8Tensor(
            jax.device_put(values, placed), jax.device_put(scales, beside), E4M3, scaling, dtype
        )

    def _stack(self, path, parts):
        missing = [part is None for part in parts]
        if any(missing):
            if not all(missing):
                raise CheckpointError(
                    f"layers of {path!r} must all be quantized alike, for they are stacked; got some with and some "
                    "without. Use names that keep layers apart."
                )
            return None
        if len({part.dtype for part in parts}) > 1:
            raise CheckpointError(
                f"layers of {path!r} must have one dtype, for they are stacked; got {sorted({str(p.dtype) for p in parts})}."
            )
        return np.stack(parts)

    def _tensor(self, path, shape, inputs, theirs):
        """Values, scales and input scale of a tensor as it is here; None for those that it has not."""
        if inputs > len(shape):
            raise ValueError(
                f"parameter {path!r} must have {inputs} axes of inputs, as its name says; got shape {list(shape)}."
            )
        values = self._values(theirs)
        expected = to_file_layout(np.broadcast_to(np.uint8(0), shape), inputs).shape
        if values.shape != expected:
            raise CheckpointError(
                f"tensor {theirs!r} must be {list(expected)}, for {path!r} to be {list(shape)}; got {list(values.shape)}. "
                "Correct the names or the model's sizes."
            )
        found = [theirs + suffix for suffix in _SCALES if theirs + suffix in self.source.tensors]
        if values.dtype.itemsize > 1 or values.dtype.kind in "iub":
            if found:
                raise CheckpointError(
                    f"tensor {theirs!r} must be float8_e4m3fn, for it has scales, {found[0]!r}; got {values.dtype}."
                )
            return from_file_layout(values, shape, inputs), None, None
        if values.dtype != E4M3.dtype:
            raise CheckpointError(
                f"tensor {theirs!r} must be float8_e4m3fn, the dtype of weights; got {values.dtype}."
            )
        if self.scheme is None:
            raise CheckpointError(
                f"config.json: quantization_config must say how {theirs!r} is quantized, whose dtype is {values.dtype}; "
                "got none. Fetch config.json too."
            )
        if len(found) != 1:
            raise CheckpointError(
                f"tensor {theirs!r} must have scales, {theirs + _SCALES[0]!r} or {theirs + _SCALES[1]!r}; got {found}."
            )
        if ((values.view(np.uint8) & 0x7F) == 0x7F).any():
            raise CheckpointError(f"tensor {theirs!r} must hold numbers; got NaNs.")
        scales = self._scales(found[0], shape, inputs)
        name = theirs.removesuffix("weight") + "input_scale"
        inputs_scale = None
        if name in self.source.tensors:
            if self.scheme.activations != "static":
                raise CheckpointError(
                    f"tensor {name!r} must not be there, for config.json says that activations are not scaled statically."
                )
            inputs_scale = self._one_scale(name)
        return from_file_layout(values, shape, inputs), scales, inputs_scale

    def _values(self, theirs):
        values = self.source.read(theirs)
        self.read.add(theirs)
        return values

    def _scale_values(self, theirs):
        values = self._values(theirs)
        if values.dtype == E8M0.dtype:
            codes = values.view(np.uint8)
            wide = np.where(
                codes == 0xFF, np.nan, np.ldexp(1.0, codes.astype(np.int32) - E8M0.bias)
            ).astype(np.float32)
        elif values.dtype in (np.float32, SCALE_DTYPES["bfloat16"], np.float16):
            wide = values.astype(np.float32)
        else:
            raise CheckpointError(
                f"scales {theirs!r} must be float32, bfloat16, float16 or float8_e8m0fnu; got {values.dtype}."
            )
        if not (np.isfinite(wide) & (wide >= 0)).all():
            raise CheckpointError(
                f"scales {theirs!r} must be finite and not negative; got {wide[~(np.isfinite(wide) & (wide >= 0))][0]}."
            )
        return wide

    def _one_scale(self, theirs):
        scale = self._scale_values(theirs)
        if scale.size != 1:
            raise CheckpointError(f"scales {theirs!r} must be one number; got {list(scale.shape)}.")
        return scale.reshape(())

    def _scales(self, theirs, shape, inputs):
        if self.scheme.weights == "tensor":
            return self._one_scale(theirs)
        try:
            groups = scaling_here(self.scheme, len(shape), inputs).group_shape(shape)
        except ValueError as error:
            raise CheckpointError(f"scales {theirs!r} must fit their weight: {error}") from None
        scales = self._scale_values(theirs)
        expected = to_file_layout(np.broadcast_to(np.uint8(0), groups), inputs).shape
        if scales.shape != expected and not (
            self.scheme.weights == "channel" and scales.shape == expected[:1]
        ):
            raise CheckpointError(
                f"scales {theirs!r} must be {list(expected)}, one per {self.scheme.weights}"
                f"{f' of {list(self.scheme.block)}' if self.scheme.block else ''}; got {list(scales.shape)}."
            )
        return from_file_layout(scales.reshape(expected), groups, inputs)
