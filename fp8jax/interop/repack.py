"""A checkpoint in FP8 to another dialect: the same codes, the same scales, other names and configs."""

import re

import numpy as np

from fp8jax.formats import E4M3
from fp8jax.interop.dialects import METHODS
from fp8jax.interop.folder import CheckpointFolder
from fp8jax.interop.marks import is_comfy_marker
from fp8jax.interop.output import Output, only_kind, scheme_of_weights
from fp8jax.interop.recognize import not_said
from fp8jax.interop.safetensors_file import CheckpointError
from fp8jax.interop.scheme import Plan, Scheme, scaling_here
from fp8jax.interop.weight import WeightReader

_TORCHAO_CODES = re.compile(r"(.*\.)?_(\w+)_qdata")


def repack(
    folder: CheckpointFolder,
    plan: Plan | None,
    method: str | None,
    activations: str | None,
    scale_dtype: str | None,
) -> Output:
    """What is to be written for a checkpoint in FP8.

    Raises:
      CheckpointError: where nothing says what its codes mean, or the dialect can't hold them.
    """
    weights = _weights(folder)
    if plan is None:
        raise (
            not_said(folder, *weights[0])
            if weights
            else CheckpointError(
                f"source must hold weights of float8_e4m3fn; got none in {folder.folder}."
            )
        )
    if not weights:
        raise CheckpointError(
            f"source must hold weights of float8_e4m3fn, as {plan.title} says; got none in {folder.folder}."
        )
    reader = WeightReader(folder, plan)
    schemes = {name: reader.scheme_of(name) for name, _ in weights}
    theirs, scalings = _common(folder, reader, schemes)
    kept = {name: reader.beside(name, schemes[name]) for name in schemes}
    static = all(inputs is not None for inputs, _ in kept.values())
    activations = theirs.activations if activations == "keep" else activations
    if activations == "static" and not static:
        raise CheckpointError(
            f"activations can be 'static' where each weight has a scale of them; got {plan.title} without. Pass 'dynamic'."
        )
    if method is None:
        method = theirs.method if theirs.method in METHODS else None
    if scale_dtype is None and theirs.exponents and (theirs.is_mx or method in ("fp8", None)):
        scale_dtype = "ue8m0"
    scheme = scheme_of_weights(
        [(n, folder.tensors[reader.codes_name(n)].shape, s, 0) for n, s in scalings.items()],
        method,
        activations,
        scale_dtype,
    )
    out = Output(scheme, scale_dtype)
    scales: dict[str, np.ndarray] = {}

    def codes_of(name: str) -> np.ndarray:
        shape = folder.tensors[reader.codes_name(name)].shape
        stored = reader.read(name, shape, 0, name)
        scales[name] = stored.scales
        return stored.values

    for name, scaling in scalings.items():
        shape = folder.tensors[reader.codes_name(name)].shape
        out.add_weight(
            name,
            name,
            shape,
            lambda name=name: codes_of(name),
            scaling.group_shape(shape),
            lambda name=name: scales.pop(name),
        )
        inputs, keys_values = kept[name]
        if activations == "static":
            out.add_input_scale(name, name, inputs)
        if keys_values is not None:
            out.add_kv_scale(name, name, keys_values)
    _add_others(out, folder, reader)
    return out


def _weights(folder: CheckpointFolder) -> list[tuple[str, np.dtype]]:
    """The names of the weights that are codes, and their dtypes."""
    weights = []
    for name, info in folder.tensors.items():
        is_codes = info.dtype is not None and info.dtype.name.startswith("float8_e")
        if not is_codes or info.dtype.name == "float8_e8m0fnu" or is_comfy_marker(name):
            continue
        if info.dtype != E4M3.dtype:
            raise CheckpointError(
                f"weights must be float8_e4m3fn, for another dialect to hold them; got {name!r} of {info.dtype}. Read it "
                "with read_checkpoint."
            )
        match = _TORCHAO_CODES.fullmatch(name)
        weights.append((name if match is None else (match[1] or "") + match[2], info.dtype))
    return weights


def _common(folder, reader: WeightReader, schemes: dict[str, Scheme]):
    """The one scheme of all weights, and the granularity of each; CheckpointError where they differ."""
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
