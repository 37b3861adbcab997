"""One safetensors file: its header, held to the format before a byte behind it is used; tensors
read and written one by one.

A file is the header's length (8 bytes, little-endian), the header (JSON: by tensor name its dtype,
shape and range of bytes), and the tensors' bytes, row-major, without holes. Own code for these few
lines, because the library's NumPy side has neither float8 nor bfloat16, maps whole files into
memory, and writes only what is in memory all at once.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # The limit that the format itself sets.
_MOST_AXES = 32
_METADATA = "__metadata__"


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written as it is; nothing was written, and nothing is half
    read.
    """


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header tells of a tensor.

    Args:
      dtype: NumPy dtype, with those of ml_dtypes; None where NumPy has none, as for packed 4-bit
        values.
      shape: its shape.
      start: position of its first byte in the file; 0 for a tensor that is still to be written.
      stored: where `dtype` is None, what the file calls it, and the number of bytes.
    """

    dtype: np.dtype | None
    shape: tuple[int, ...]
    start: int = 0
    stored: tuple[str, int] | None = None

    @property
    def nbytes(self) -> int:
        """Number of its bytes."""
        if self.dtype is None:
            return self.stored[1] if self.stored else 0
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: pathlib.Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors in a file, by name, checked against format and length; and its metadata.

    A tensor of a dtype that NumPy lacks is listed, so that the others can be read.

    Raises:
      CheckpointError: where the file is no whole safetensors file.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise _broken(
                    path,
                    f"it must hold its header whole; got {size} bytes for a header of {length}. It "
                    "is cut off, "
                    "or no safetensors file: fetch it again.",
                )
            if length > _LONGEST_HEADER:
                raise _broken(
                    path, f"its header must have at most {_LONGEST_HEADER} bytes; got {length}."
                )
            text = file.read(length)
    except OSError as error:
        raise _broken(path, f"it must be a file that can be read; got {error}.") from None
    header = parse_json(path, text)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _broken(path, f"{_METADATA} must map names to texts; got {str(metadata)[:80]}.")
    return _tensors_of(path, header, 8 + length, size), metadata


def parse_json(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    """The JSON object in a file, no name in it twice; CheckpointError where it is none."""

    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(
                f"the name {next(n for n in names if names.count(n) > 1)[:80]!r} twice"
            )
        return found

    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its JSON must be well-formed; got {str(error)[:200]}.") from None
    if not isinstance(data, dict):
        raise _broken(path, f"its JSON must be an object; got {type(data).__name__}.")
    return data


def _broken(path: pathlib.Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {reason}")


def _tensors_of(
    path: pathlib.Path, header: dict[str, Any], first: int, size: int
) -> dict[str, TensorInfo]:
    tensors = {name: _tensor_of(path, name, entry) for name, entry in header.items()}
    end = 0
    for name in sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].nbytes)):
        info = tensors[name]
        if info.start != end:
            problem = "overlap" if info.start < end else "leave a hole"
            raise _broken(
                path,
                f"the bytes of its tensors must follow each other; got {_short(name)} at "
                f"{info.start} where {end} "
                f"was expected: they {problem}.",
            )
        end += info.nbytes
    if first + end != size:
        raise _broken(
            path,
            f"its tensors must end where the file does; got tensors up to byte {first + end} of "
            f"{size}. It is cut "
            "off, or was added to: fetch it again.",
        )
    return {
        name: dataclasses.replace(info, start=first + info.start) for name, info in tensors.items()
    }


def _tensor_of(path: pathlib.Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(
            path,
            f"tensor {_short(name)} must have dtype, shape and data_offsets; got "
            f"{str(entry)[:80]}.",
        )
    if not isinstance(entry["dtype"], str):
        raise _broken(path, _unknown_dtype(name, entry["dtype"]))
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise _broken(
            path,
            f"shape of tensor {_short(name)} must be a list of at most {_MOST_AXES} whole numbers "
            "from 0 on; got "
            f"{str(shape)[:80]}.",
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _broken(
            path,
            f"data_offsets of tensor {_short(name)} must be two whole numbers; got "
            f"{str(offsets)[:80]}.",
        )
    if entry["dtype"] not in DTYPES and offsets[0] <= offsets[1]:
        stored = entry["dtype"], offsets[1] - offsets[0]
        return TensorInfo(None, tuple(shape), offsets[0], stored)
    if entry["dtype"] not in DTYPES:
        raise _broken(path, _unknown_dtype(name, entry["dtype"]))
    info = TensorInfo(DTYPES[entry["dtype"]], tuple(shape), offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise _broken(
            path,
            f"data_offsets of tensor {_short(name)} must span the {str(info.nbytes)[:30]} bytes of "
            f"{entry['dtype']}"
            f"{str(shape)[:80]}; got {str(offsets)[:80]}.",
        )
    return info


def _unknown_dtype(name: str, dtype: Any) -> str:
    return (
        f"dtype of tensor {_short(name)} must be one of {', '.join(DTYPES)}; got "
        f"{str(dtype)[:40]!r}. A tensor that no parameter is may have any other."
    )


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _are_sizes(value: Any) -> bool:
    """Whole numbers that fit into 64 bits."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def read_tensor(path: pathlib.Path, name: str, info: TensorInfo) -> np.ndarray:
    """A tensor of a file whose header told `info`: its bytes alone are read."""
    if info.dtype is None:
        raise _broken(path, _unknown_dtype(name, info.stored[0] if info.stored else ""))
    with open(path, "rb") as file:
        file.seek(info.start)
        data = np.fromfile(file, np.uint8, info.nbytes)
    if data.size != info.nbytes:
        raise _broken(
            path, f"it must stay as it is while it is read; got {data.size} of {info.nbytes} bytes."
        )
    if info.dtype == np.bool_ and (data > 1).any():
        raise _broken(path, "tensors of dtype BOOL must hold 0 and 1 alone; got other bytes.")
    return data.view(info.dtype).reshape(info.shape)


def header_bytes(tensors: dict[str, TensorInfo]) -> bytes:
    """The first bytes of a file with these tensors, in this order: length and header, padded to a
    multiple of 8.
    """
    header: dict[str, Any] = {
        _METADATA: {"format": "pt"}
    }  # Without which Hugging Face's loaders refuse a file.
    end = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    file: BinaryIO, tensors: dict[str, TensorInfo], values: Iterable[np.ndarray]
) -> None:
    """A file of these tensors, whose values come one by one, in the same order.

    Raises:
      CheckpointError: where a value is not as its info says.
    """
    file.write(header_bytes(tensors))
    for (name, info), value in zip(tensors.items(), values, strict=True):
        if (value.dtype, value.shape) != (info.dtype, info.shape):
            raise CheckpointError(
                f"tensor {_short(name)} must be {info.dtype}{list(info.shape)}; got "
                f"{value.dtype}{list(value.shape)}."
            )
        file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def safetensors_dtype(dtype: Any) -> str:
    """The name that the format has for a dtype; CheckpointError where it has none."""
    try:
        return _NAMES[np.dtype(dtype)]
    except KeyError:
        raise CheckpointError(
            f"dtype must be one that safetensors has, one of {', '.join(map(str, _NAMES))}; got "
            f"{np.dtype(dtype)}. "
            "Quantize to E4M3 or E5M2."
        ) from None
