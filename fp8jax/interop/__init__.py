"""FP8 weights in the formats of others: compressed-tensors and block-wise safetensors checkpoints, Qwix arrays, Flax's FP8 state."""

from fp8jax.interop.convert import convert_checkpoint
from fp8jax.interop.flax_fp8 import from_flax_fp8
from fp8jax.interop.folder import CheckpointFolder
from fp8jax.interop.names import TORCH_NAMES, Name, llama_names
from fp8jax.interop.qwix import from_qarray, to_qarray
from fp8jax.interop.read import LoadedCheckpoint, read_checkpoint
from fp8jax.interop.safetensors_file import CheckpointError
from fp8jax.interop.scheme import Scheme
from fp8jax.interop.write import write_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointFolder",
    "LoadedCheckpoint",
    "Name",
    "Scheme",
    "TORCH_NAMES",
    "convert_checkpoint",
    "from_flax_fp8",
    "from_qarray",
    "llama_names",
    "read_checkpoint",
    "to_qarray",
    "write_checkpoint",
]
