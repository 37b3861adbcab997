"""FP8 weights in the formats of others: safetensors in all dialects, Qwix arrays, Flax's state."""

from fp8jax.interop._convert import convert_checkpoint
from fp8jax.interop._dialects import DIALECTS, Dialect
from fp8jax.interop._flax_fp8 import from_flax_fp8
from fp8jax.interop._folder import CheckpointFolder
from fp8jax.interop._loaded import LoadedCheckpoint
from fp8jax.interop._model_names import (
    gemma_names,
    llama_names,
    mixtral_names,
    qwen3_names,
    qwen_moe_names,
)
from fp8jax.interop._names import TORCH_NAMES, Name
from fp8jax.interop._qwix import from_qarray, to_qarray
from fp8jax.interop._read import read_checkpoint
from fp8jax.interop._safetensors_file import CheckpointError
from fp8jax.interop._scheme import Scheme
from fp8jax.interop._write import write_checkpoint

__all__ = [
    "DIALECTS",
    "TORCH_NAMES",
    "CheckpointError",
    "CheckpointFolder",
    "Dialect",
    "LoadedCheckpoint",
    "Name",
    "Scheme",
    "convert_checkpoint",
    "from_flax_fp8",
    "from_qarray",
    "gemma_names",
    "llama_names",
    "mixtral_names",
    "qwen3_names",
    "qwen_moe_names",
    "read_checkpoint",
    "to_qarray",
    "write_checkpoint",
]
