"""A checkpoint in FP8 to another dialect: the same codes and scales, other names and configs."""

from typing import Literal

import numpy as np

from fp8jax._formats import E4M3
from fp8jax.interop._dialects import METHODS, weight_of
from fp8jax.interop._folder import CheckpointFolder
from fp8jax.interop._marks import is_comfy_marker
from fp8jax.interop._output import Output, Value, is_linear, only_kind, scheme_of_weights
from fp8jax.interop._recognize import is_float8, not_said
from fp8jax.interop._safetensors_file import CheckpointError
from fp8jax.interop._scheme import Plan, Scheme, scaling_here
from fp8jax.interop._weight import WeightReader


def repack(
    folder: CheckpointFolder,
    plan: Plan | None,
    method: str | None,
    activations: Literal["keep", "static", "dynamic"] | None,
    scale_dtype: str | None,
) -> Output:
    """What is to be written for a checkpoint in FP8.

    Raises:
      CheckpointError: where nothing says what its codes mean, or the dialect can't hold them.
    """
    weights = _weights(folder, plan)
    if not weights:
        raise CheckpointError(
            "source must hold weights of float8_e4m3fn, as "
            f"{'its dtypes say' if plan is None else plan.title}; got none in {folder.folder}."
        )
    if plan is None:
        raise not_said(folder, *weights[0])
    reader = WeightReader(folder, plan)
    schemes = {name: reader.scheme_of(name) for name, _ in weights}
    theirs, scalings = _common(folder, reader, schemes)
    kept = {name: reader.beside(name, schemes[name]) for name in schemes}
    activations = theirs.activations if activations == "keep" else activations
    if activations == "static" and any(inputs is None for inputs, _ in kept.values()):
        raise CheckpointError(
            "activations must be 'dynamic' or None where weights have no scales of them; got "
            f"'static' for {plan.title}. Pass 'dynamic'."
        )
    if method is None:
        method = theirs.method if theirs.method in METHODS else None
    if scale_dtype is None and theirs.exponents and (theirs.is_mx or method in ("fp8", None)):
        scale_dtype = "ue8m0"
    shapes = {name: folder.tensors[reader.codes_name(name)].shape for name in schemes}
    scheme = scheme_of_weights(
        [(name, shapes[name], scaling, 0) for name, scaling in scalings.items()],
        method,
        activations,
        scale_dtype,
    )
    out = Output(scheme, scale_dtype)
    stored = _StoredOnce(reader, shapes)
    for name, scaling in scalings.items():
        codes, scale = stored.codes(name), stored.scales(name)
        out.add_weight(name, name, shapes[name], codes, scaling.group_shape(shapes[name]), scale)
        inputs, keys_values = kept[name]
        if activations == "static" and inputs is not None:
            out.add_input_scale(name, name, inputs)
        if keys_values is not None:
            out.add_kv_scale(name, name, keys_values)
    _add_others(out, folder, reader)
    return out


class _StoredOnce:
    """Reads a weight when its codes are asked for, and keeps its scales until these are."""

    def __init__(self, reader: WeightReader, shapes: dict[str, tuple[int, ...]]):
        self._reader, self._shapes = reader, shapes
        self._scales: dict[str, np.ndarray] = {}

    def codes(self, name: str) -> Value:
        def read():
            stored = self._reader.read(name, self._shapes[name], 0, name)
            if stored.scales is not None:
                self._scales[name] = stored.scales
            return stored.values

        return read

    def scales(self, name: str) -> Value:
        return lambda: self._scales.pop(name)


def _weights(folder: CheckpointFolder, plan: Plan | None) -> list[tuple[str, np.dtype]]:
    """The names of the weights that are codes, and their dtypes."""
    weights = []
    for name, info in folder.tensors.items():
        if not is_float8(info) or is_comfy_marker(name):
            continue
        if plan is not None and plan.method == "cast" and not is_linear(name, info.shape):
            continue  # A bias, norm or embedding: float8 values, as they are.
        if info.dtype != E4M3.dtype:
            raise CheckpointError(
                f"weights must be float8_e4m3fn, for another dialect to hold them; got {name!r} of "
                f"{info.dtype}. Read it with read_checkpoint."
            )
        weights.append((weight_of(name), info.dtype))
    return weights


def _common(folder, reader: WeightReader, schemes: dict[str, Scheme]):
    """The one scheme of all weights, and each one's granularity; CheckpointError if they differ."""
    kinds = {}
    for name, scheme in schemes.items():
        kinds.setdefault((scheme.weights, scheme.block, scheme.activations), name)
    only_kind(kinds)
    scalings = {
        name: scaling_here(scheme, folder.tensors[reader.codes_name(name)].shape, 0)
        for name, scheme in schemes.items()
    }
    return next(iter(schemes.values())), scalings


def _add_others(out: Output, folder: CheckpointFolder, reader: WeightReader) -> None:
    """All that is no weight, no scale of one, and no mark of the old dialect, as it is."""
    for name, info in folder.tensors.items():
        if name in reader.claimed or name in reader.surplus or is_comfy_marker(name):
            continue
        if info.dtype is None:
            folder.read(name)  # says that it can't be
        out.add(name, info.dtype, info.shape, lambda name=name: folder.read(name))
        if name.endswith(".weight") and len(info.shape) == 2:
            out.leave_out(name)
