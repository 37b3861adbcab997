"""A checkpoint's folder: one safetensors file or several with an index, and `config.json`."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fp8jax._progress import progress_bar
from fp8jax.interop._safetensors_file import (
    CheckpointError,
    TensorInfo,
    parse_json,
    read_header,
    read_tensor,
    write_tensors,
)

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
QUANT_CONFIG = "hf_quant_config.json"
_LONGEST_JSON = 100_000_000


class CheckpointFolder:
    """The tensors of a checkpoint, by name; a tensor is read when it is asked for.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it
        names, or one other safetensors file; `config.json` and `hf_quant_config.json` beside them
        are optional. Or a safetensors file by itself. All headers are checked at once.

    Raises:
      CheckpointError: where a file is missing or not as its format says.

    Attributes:
      tensors: by name, dtype and shape.
      config: the contents of `config.json`; empty where there is none.
      quant_config: the contents of `hf_quant_config.json`; empty where there is none.
      metadata: what the headers hold beside tensors, texts by name.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        alone = self.folder.suffix == ".safetensors" and self.folder.is_file()
        if alone:
            shards = {self.folder.name: None}
            self.folder = self.folder.parent
        else:
            shards = self._shards()
        self.config, self.quant_config = (
            self._json(name) if not alone and (self.folder / name).exists() else {}
            for name in (CONFIG, QUANT_CONFIG)
        )
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._files: dict[str, pathlib.Path] = {}
        for shard, names in shards.items():
            path = self.folder / shard
            header, metadata = read_header(path)
            self.metadata |= metadata
            missing = sorted((names or header.keys()) - header.keys())
            if missing:
                raise CheckpointError(
                    f"{INDEX}: {shard} must hold the tensors that it is named for; got it without "
                    f"{missing[0]!r} "
                    f"and {len(missing) - 1} more. Fetch the checkpoint again."
                )
            for name in header if names is None else names:
                self.tensors[name], self._files[name] = header[name], path

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor; CheckpointError where there is none of this name."""
        if name not in self.tensors:
            raise CheckpointError(
                f"checkpoint must hold tensor {name!r}; got none in {self.folder}. Correct the "
                "names, or the folder."
            )
        return read_tensor(self._files[name], name, self.tensors[name])

    def _shards(self) -> dict[str, list[str] | None]:
        if (self.folder / INDEX).exists():
            return _names_by_shard(self._json(INDEX).get("weight_map"))
        if (self.folder / SINGLE).exists():
            return {SINGLE: None}
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if len(others) != 1:
            raise CheckpointError(
                f"folder must hold {SINGLE} or {INDEX}, or one safetensors file of another name; "
                f"got {len(others)} such files in {self.folder}. Pass the folder of a checkpoint, "
                "or a safetensors file."
            )
        return {others[0]: None}

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                text = file.read(_LONGEST_JSON + 1)
        except OSError as error:
            raise CheckpointError(
                f"{name}: it must be a file that can be read; got {error}."
            ) from None
        if len(text) > _LONGEST_JSON:
            raise CheckpointError(f"{name}: it must have at most {_LONGEST_JSON} bytes; got more.")
        return parse_json(path, text)


def _names_by_shard(weight_map: Any) -> dict[str, list[str] | None]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{INDEX}: weight_map must map tensors to files; got {str(weight_map)[:80]}."
        )
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        # Nothing but a plain name of the same folder: a path could lead out of it.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or not _is_plain(shard):
            raise CheckpointError(
                f"{INDEX}: files must be plain names that end in .safetensors; got "
                f"{str(shard)[:120]!r}."
            )
        shards.setdefault(shard, []).append(name)
    return dict(shards)


def _is_plain(name: str) -> bool:
    return (
        not set(name) & set("/\\:\0")
        and name.isprintable()
        and not name.startswith(".")
        and len(name) <= 255
    )


def write_folder(
    folder: str | pathlib.Path,
    tensors: Mapping[str, TensorInfo],
    value_of: Callable[[str], np.ndarray],
    files: Mapping[str, Mapping[str, Any]],
    *,
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """Writes a checkpoint, one tensor in memory at a time; either all of it, or nothing.

    Args:
      folder: is made where it is missing; must not hold a checkpoint yet.
      tensors: by name, in the order in which they are written.
      value_of: the values of a tensor, asked for once, in that order.
      files: what `config.json`, and other JSON files by name, will hold.
      max_shard_bytes: the checkpoint is split into files of at most so many bytes of tensors, or of
        one tensor.
      progress: whether to show a bar, on stderr.
    """
    folder = pathlib.Path(folder)
    present = [
        path.name
        for pattern in ("*.safetensors", INDEX, CONFIG, QUANT_CONFIG)
        for path in sorted(folder.glob(pattern))
    ]
    if present:
        raise FileExistsError(
            f"folder must hold no checkpoint yet; got {folder} with {present[0]}. Remove it, or "
            "name another."
        )
    shards = _split(tensors, max_shard_bytes)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    )
    total = sum(info.nbytes for info in tensors.values())

    def values_of(shard, advance):
        for name, info in shard.items():
            yield value_of(name)
            advance(info.nbytes)

    # Under another name until all is there: what fails halfway leaves nothing.
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as staging,
            progress_bar(progress, "writing", total, "bytes") as advance,
        ):
            for name, shard in zip(names, shards):
                with open(pathlib.Path(staging) / name, "wb") as file:
                    write_tensors(file, shard, values_of(shard, advance))
            files = dict(files)
            if len(shards) > 1:
                files[INDEX] = {
                    "metadata": {"total_size": total},
                    "weight_map": {
                        tensor: name for name, shard in zip(names, shards) for tensor in shard
                    },
                }
            for name, data in files.items():
                (pathlib.Path(staging) / name).write_text(json.dumps(data, indent=2) + "\n")
            for name in (*names, *files):
                (pathlib.Path(staging) / name).replace(folder / name)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _split(tensors: Mapping[str, TensorInfo], most: int) -> list[dict[str, TensorInfo]]:
    if not isinstance(most, int) or most < 1:
        raise ValueError(
            f"max_shard_bytes must be a positive number of bytes; got {most!r}. Leave it out for 5 "
            "GB."
        )
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards
