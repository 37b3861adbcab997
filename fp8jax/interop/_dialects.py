"""The dialects that FP8 weights are exchanged in: names of tensors, their dtypes, and configs.

One table for reading and writing. Names are templates over the name of a weight,
"model.layers.0.mlp.up_proj.weight":

    {module}     model.layers.0.mlp.up_proj        {weight}   weight
    {parent}     model.layers.0.mlp                {letter}   k or v, of k_proj and v_proj alone

Sources: files that the libraries wrote, and their loaders; see the functions in `configs` and
`marks`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fp8jax._formats import E4M3, E5M2, E8M0, Format
from fp8jax.interop import _configs, _marks, _written_configs
from fp8jax.interop._folder import CheckpointFolder
from fp8jax.interop._scale_values import BYTES
from fp8jax.interop._scheme import Plan, Scheme

_KEYS_VALUES = (
    "{parent}.{letter}_scale",
    "{module}.{letter}_scale",
    "{parent}.attn.{letter}_scale",
    "{parent}.kv_scale",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """How a dialect is written.

    Args:
      files: `(scheme, modules left out, whether there are scales of keys and values)` to the JSON
        files, by name: for `config.json` what is added to it. CheckpointError where the dialect has
        no such weights.
      one: shape of a scale that is one number.
      exponents: dtype of scales that are powers of two, where the dialect holds them as E8M0.
      ignores_by_pattern: whether readers take the names of modules left out as patterns, or as ends
        of names.
    """

    files: Callable[[Scheme, list[str], bool], dict[str, dict[str, Any]]]
    one: tuple[int, ...]
    exponents: np.dtype
    ignores_by_pattern: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """What a dialect calls the tensors of a weight.

    Args:
      title: its name in texts.
      plan: what the config says, by `(config, where it is from, checkpoint)`.
      codes: name of the codes.
      scales: names that the weight's scales may have; the first is written.
      inputs: the same of the static scale of activations.
      keys_values: the same of the static scale of keys or values.
      bytes_are_exponents: whether scales of dtype uint8 are E8M0 even where the config doesn't say
        so.
      formats: formats of the codes.
      beside: names of tensors that say nothing that the config doesn't.
      writing: how it is written; None where it is read alone.
    """

    title: str
    plan: Callable[[Mapping[str, Any], str, CheckpointFolder], Plan]
    codes: str = "{module}.{weight}"
    scales: tuple[str, ...] = ("{module}.{weight}_scale",)
    inputs: tuple[str, ...] = ("{module}.input_scale",)
    keys_values: tuple[str, ...] = _KEYS_VALUES
    bytes_are_exponents: bool = False
    formats: tuple[Format, ...] = (E4M3,)
    beside: tuple[str, ...] = ()
    writing: Writing | None = None


_FINE_GRAINED = (
    "{module}.{weight}_scale_inv",
    "{module}.qscale_{weight}",
    "{module}.scale",
    "{module}.{weight}_scale",
)

# By what `quant_method` says; the last three don't say it so.
DIALECTS: dict[str, Dialect] = {
    "compressed-tensors": Dialect(
        title="compressed-tensors",
        plan=_configs.compressed_tensors,
        writing=Writing(files=_written_configs.compressed_tensors, one=(1,), exponents=BYTES),
    ),
    "fp8": Dialect(
        title="fine-grained FP8",
        plan=_configs.fine_grained,
        scales=_FINE_GRAINED,
        inputs=(
            "{module}.activation_scale",
            "{module}.qscale_act",
            "{module}.input_scale",
            "{module}.act_scale",
        ),
        bytes_are_exponents=True,
        writing=Writing(
            files=_written_configs.fine_grained,
            one=(),
            exponents=E8M0.dtype,
            ignores_by_pattern=True,
        ),
    ),
    "mxfp8": Dialect(
        title="MXFP8",
        plan=_configs.mxfp8,
        scales=_FINE_GRAINED,
        bytes_are_exponents=True,
        writing=Writing(
            files=_written_configs.mxfp8, one=(), exponents=BYTES, ignores_by_pattern=True
        ),
    ),
    "modelopt": Dialect(
        title="ModelOpt",
        plan=_configs.modelopt,
        keys_values=("{module}.{letter}_scale", *_KEYS_VALUES),
        writing=Writing(files=_written_configs.modelopt, one=(), exponents=BYTES),
    ),
    "quark": Dialect(
        title="Quark",
        plan=_configs.quark,
        keys_values=("{module}.output_scale", *_KEYS_VALUES),
    ),
    "fbgemm_fp8": Dialect(
        title="fbgemm", plan=_configs.fbgemm, beside=("{module}.input_scale_ub",)
    ),
    "torchao": Dialect(
        title="torchao",
        plan=_marks.torchao,
        codes="{module}._{weight}_qdata",
        scales=("{module}._{weight}_scale",),
        inputs=(),
    ),
    "comfyui": Dialect(
        title="ComfyUI",
        plan=_marks.comfyui,
        scales=("{module}.scale_{weight}", "{module}.{weight}_scale"),
        inputs=("{module}.scale_input", "{module}.input_scale"),
        formats=(E4M3, E5M2),
        beside=("{module}.comfy_quant",),
    ),
    "cast": Dialect(
        title="plain cast to float8",
        plan=_marks.cast,
        scales=(),
        inputs=(),
        formats=(E4M3, E5M2),
    ),
}

METHODS = tuple(method for method, dialect in DIALECTS.items() if dialect.writing is not None)

# Tensors beside a weight that its values depend on in ways that FP8 codes with scales don't have.
_CHANGES = (
    "pre_quant_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_packed",
)


def expand(template: str, weight: str) -> str | None:
    """A name by its template; None where that is of keys or values, and the weight isn't.

    >>> expand("{parent}.{letter}_scale", "layers.0.self_attn.k_proj.weight")
    'layers.0.self_attn.k_scale'
    >>> expand("{module}.{weight}_scale", "up.weight")
    'up.weight_scale'
    """
    module, _, last = weight.rpartition(".")
    parent, _, projection = module.rpartition(".")
    letter = re.fullmatch("([kv])_proj", projection)
    of_keys_values = any(part in template for part in ("{letter}", "kv_scale", "output_scale"))
    if of_keys_values and letter is None or "{weight}" not in template and last != "weight":
        return None
    name = template.format(
        module=module, weight=last, parent=parent, letter=letter.group(1) if letter else ""
    )
    return name.removeprefix(".")


def weight_of(codes: str) -> str:
    """The name of the weight whose codes a tensor of this name holds, in any dialect.

    >>> weight_of("up._weight_qdata"), weight_of("up.weight")
    ('up.weight', 'up.weight')
    """
    match = re.fullmatch(r"(.*\.)?_(\w+)_qdata", codes)
    return codes if match is None else (match[1] or "") + match[2]


def changes_of(weight: str, tensors: Mapping[str, Any]) -> str | None:
    """The name of a tensor beside codes and scales that a weight's values depend on, if any."""
    module = weight.removesuffix("weight")
    return next((module + name for name in _CHANGES if module + name in tensors), None)
