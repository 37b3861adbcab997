"""File to file, one tensor in memory at a time: wide weights to FP8, or one dialect to another."""

import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax._fitting import FACTORS, errors_of_scales
from fp8jax._formats import E4M3
from fp8jax._params import WeightRule
from fp8jax._scaling import PerTensor, Scaling, group_amax, scale_from_amax
from fp8jax._tensor import quantize
from fp8jax.interop._folder import CheckpointFolder, write_folder
from fp8jax.interop._output import Output, scheme_of_weights
from fp8jax.interop._recognize import find_plan, float8_weights
from fp8jax.interop._repack import repack
from fp8jax.interop._safetensors_file import CheckpointError
from fp8jax.interop._scheme import Scheme
from fp8jax.interop._write import SHARD_BYTES

# Of a matrix, as many rows are widened at a time as have so many elements.
_ELEMENTS = 1 << 22


def convert_checkpoint(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    rules: Sequence[WeightRule] = (),
    *,
    method: str | None = None,
    activations: Literal["keep", "static", "dynamic"] | None = "keep",
    scale_dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Scheme:
    """Quantize a checkpoint's weights, or bring one in FP8 to another dialect, without a model.

    Args:
      source: folder of a checkpoint in float32, bfloat16 or float16, as read by `read_checkpoint`;
        or of one in FP8, whose codes and scales stay as they are.
      target: folder to write; must not hold a checkpoint yet.
      rules: ordered; the first whose pattern matches a tensor's whole name says how it is held, in
        the file's own layout, outputs first: `PerTensor()`, `PerToken()` (per output channel),
        `BlockWise((128, 128))` or, for MXFP8, `BlockWise(32)`. The others stay. None for a source
        in FP8, which is held already.
      method, scale_dtype, max_shard_bytes: as of `write_checkpoint`.
      activations: "dynamic", "static" with the scales that a source in FP8 has, or None for weights
        alone; "keep" for what the source says, or "dynamic" where it says nothing.
      progress: whether to show a bar, on stderr.

    Returns:
      The scheme that `config.json` tells.

    Raises:
      CheckpointError: where the source is damaged, or quantized and there are rules, or the dialect
        can't hold the weights.
      ValueError: where a rule matches no tensor, or none chooses one.
      FileExistsError: where the target holds a checkpoint.
    """
    folder = CheckpointFolder(source)
    plan = find_plan(folder)
    is_quantized = plan is not None or bool(float8_weights(folder))
    if is_quantized and rules:
        raise CheckpointError(
            "source must not be quantized, for rules to quantize it; got "
            f"{plan.title if plan else 'float8 tensors'} in {folder.folder}. Leave the rules out "
            "to bring its codes to another dialect."
        )
    if is_quantized:
        out = repack(folder, plan, method, activations, scale_dtype)
    else:
        out = _quantized(
            folder, rules, method, "dynamic" if activations == "keep" else activations, scale_dtype
        )
    write_folder(
        target,
        out.tensors,
        out.value_of,
        out.files(folder.config),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    return out.quantizing.scheme


def _quantized(folder: CheckpointFolder, rules, method, activations, scale_dtype) -> Output:
    """A wide checkpoint, as its rules say."""
    if activations == "static":
        raise ValueError(
            "activations must be 'dynamic' or None for a source without scales of them; got "
            "'static'. Calibrate the model and use write_checkpoint."
        )
    chosen = _chosen(folder, rules)
    scheme = scheme_of_weights(
        [(name, folder.tensors[name].shape, scaling, 0) for name, (_, scaling) in chosen.items()],
        method,
        activations,
        scale_dtype,
    )
    if scheme is None:
        raise ValueError("rules must choose a weight; got none that does. Give one a scaling.")
    out = Output(scheme, scale_dtype)
    scales: dict[str, np.ndarray] = {}

    def codes_of(name: str) -> np.ndarray:
        codes, scales[name] = quantize_rows(folder.read(name), *chosen[name])
        return codes

    for name, info in folder.tensors.items():
        if name in chosen:
            groups = chosen[name][1].group_shape(info.shape)
            out.add_weight(
                name,
                name,
                info.shape,
                lambda name=name: codes_of(name),
                groups,
                lambda name=name: scales.pop(name),
            )
        else:
            out.add(name, info.dtype, info.shape, lambda name=name: folder.read(name))
            if name.endswith(".weight") and len(info.shape) == 2:
                out.leave_out(name)
    return out


def _chosen(
    folder: CheckpointFolder, rules: Sequence[WeightRule]
) -> dict[str, tuple[WeightRule, Scaling]]:
    """By name of a tensor, the rule that quantizes it, and its granularity."""
    for rule in rules:
        if not any(rule.matches(name) for name in folder.tensors):
            raise ValueError(
                f"pattern of a rule must match the name of a tensor; got {rule.pattern!r}. The "
                f"names are {', '.join(list(folder.tensors)[:8])} and so on."
            )
    chosen = {}
    for name, info in folder.tensors.items():
        rule = next((rule for rule in rules if rule.matches(name)), None)
        if rule is None or rule.scaling is None:
            continue
        if (
            rule.stacked
            or rule.format != E4M3
            or len(info.shape) != 2
            or info.dtype is None
            or info.dtype.kind in "iubc"
            or info.dtype.itemsize < 2
        ):
            raise CheckpointError(
                f"tensor {name!r} must be a floating matrix and its rule of E4M3 without stacked "
                f"layers; got {info.dtype}{list(info.shape)} and {rule}. Narrow the pattern."
            )
        chosen[name] = rule, rule.scaling.normalize(2)
    return chosen


def quantize_rows(
    values: np.ndarray, rule: WeightRule, scaling: Scaling
) -> tuple[np.ndarray, np.ndarray]:
    """The codes and scales that `quantize` gives, some rows at a time: the whole is never widened.

    Args:
      values: floating matrix, outputs first.
      rule: how.
      scaling: its granularity, whose groups are of one row or of a block of them, or per tensor.
    """
    rows = scaling.block(values.shape)[0] or 1
    step = max(_ELEMENTS // max(values.shape[1], 1) // rows, 1) * rows
    parts = [values[at : at + step] for at in range(0, len(values), step)]
    is_whole = isinstance(scaling, PerTensor)
    options: dict[str, Any] = {"power_of_two": rule.power_of_two, "scale": rule.scale}
    if is_whole:
        options = {"scale": _scale_of_all(parts, rule)}
    codes, scales = np.empty(values.shape, E4M3.dtype), []
    for at, part in zip(range(0, len(values), step), parts):
        q = quantize(part, E4M3, scaling, **options)
        codes[at : at + step] = q.data
        scales.append(np.asarray(q.scale))
    if is_whole:
        return codes, np.asarray(options["scale"])
    groups = scaling.group_shape(values.shape)
    return codes, np.concatenate(scales) if scales else np.ones(groups, np.float32)


def _scale_of_all(parts: Sequence[np.ndarray], rule: WeightRule) -> jax.Array:
    """The one scale of a matrix that comes in parts."""
    one = PerTensor()
    amaxes = [np.float32(group_amax(part, one)) for part in parts]
    amax = jnp.asarray(max(amaxes, default=np.float32(0)))
    scale = scale_from_amax(amax, E4M3, power_of_two=rule.power_of_two)
    if rule.scale == "mse" and parts:
        errors = sum(
            np.asarray(errors_of_scales(jnp.asarray(part), scale, E4M3, one)) for part in parts
        )
        scale = scale * FACTORS[np.argmin(errors)]
    return scale
