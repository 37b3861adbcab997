"""Foreign checkpoints to parameter trees with FP8 weights: the same codes, the same scales."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fp8jax._formats import get_format
from fp8jax._params import named_leaves, sharding_of_scale
from fp8jax._progress import progress_bar
from fp8jax._tensor import Fp8Tensor
from fp8jax.interop._folder import CheckpointFolder
from fp8jax.interop._loaded import LoadedCheckpoint
from fp8jax.interop._marks import is_comfy_marker
from fp8jax.interop._names import TORCH_NAMES, Name, each_in_file, find_name
from fp8jax.interop._recognize import find_plan
from fp8jax.interop._safetensors_file import CheckpointError
from fp8jax.interop._scheme import Scheme, from_file_layout, scaling_here
from fp8jax.interop._weight import StoredWeight, WeightReader


def read_checkpoint(
    folder: str | pathlib.Path,
    like: Any,
    names: Sequence[Name] = TORCH_NAMES,
    *,
    ignore: Sequence[str] = (),
    progress: bool = False,
) -> LoadedCheckpoint:
    """Read a checkpoint of safetensors files: dense, or in FP8 in any of the `DIALECTS`.

    One tensor is read at a time. Everything is checked before it is used, and nothing is guessed:
    which dialect it is, and a block's extents, come from the configs or from what the file says in
    itself.

    Args:
      folder: holds `model.safetensors`, or several files and their index, and the configs beside
        them; or a safetensors file, as ComfyUI's.
      like: the parameter tree to fill, dense: of arrays or, as from `jax.eval_shape(model.init,
        x)`, abstract. What is not quantized comes in its dtypes, and codes stand for them; where a
        leaf has a sharding, what is read gets it.
      names: which tensor each parameter is; see `llama_names` and its like for other such lists.
      ignore: regular expressions over whole names of tensors that may stay unread.
      progress: whether to show a bar, on stderr.

    Returns:
      A `LoadedCheckpoint`.

    Raises:
      CheckpointError: where a file is damaged, cut off, missing or of another format; a tensor
        missing, of another shape or dtype, or not finite where it is a scale; or a tensor is left
        unread.
      ValueError: where a parameter has no name.
    """
    source = CheckpointFolder(folder)
    reader = _Reader(WeightReader(source, find_plan(source)))
    named, tree = named_leaves(like)
    leaves = []
    with progress_bar(progress, "reading", len(named)) as advance:
        for path, leaf in named:
            name, theirs = find_name(names, path)
            leaves.append(reader.parameter(path, leaf, name, theirs))
            advance(1)
    return reader.finish(jax.tree.unflatten(tree, leaves), ignore)


class _Reader:
    """Reads parameters, and keeps what it came by."""

    def __init__(self, weights: WeightReader):
        self.weights = weights
        self.input_scales: dict[str, np.ndarray] = {}
        self.kv_scales: dict[str, np.ndarray] = {}
        self.schemes: dict[str, Scheme] = {}
        self.excluded: list[str] = []
        self.stacked: dict[str, int] = {}

    def parameter(self, path: str, leaf: Any, name: Name, theirs: str) -> Any:
        """The value for a leaf."""
        shape, stacked = jnp.shape(leaf), len(name.stacked)
        if stacked + name.inputs > len(shape):
            raise ValueError(
                f"parameter {path!r} must have axes of {' and '.join(name.stacked) or 'inputs'} "
                f"and {name.inputs} of inputs, as its name {name.template!r} says; got shape "
                f"{list(shape)}."
            )
        if stacked:
            self.stacked[path] = stacked
        parts = [
            self.weights.read(path, shape[stacked:], name.inputs, own)
            for _, own in each_in_file(name, theirs, shape)
        ]
        whole = self._together(path, parts, shape[:stacked], name.inputs, shape[stacked:])
        sharding = getattr(leaf, "sharding", None)
        placed = sharding if isinstance(sharding, NamedSharding) else None
        dtype = leaf.dtype if isinstance(leaf, Fp8Tensor) else jnp.result_type(leaf)
        if whole.scheme is not None and whole.scheme.method == "cast" and not name.inputs:
            # A bias, norm or embedding, which was cast with all else; no product reads its codes.
            whole = StoredWeight(whole.values.astype(np.float32), None, None)
        if whole.scheme is None:
            is_matrix = len(shape) - stacked >= 2
            if is_matrix and self.weights.plan is not None:
                self.excluded.append(path)
            return jax.device_put(_as_dtype(path, theirs, whole.values, dtype), placed)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise CheckpointError(
                f"parameter {path!r} must be {dtype}; got FP8 codes in {theirs!r}."
            )
        self.schemes[path] = whole.scheme
        scaling = scaling_here(whole.scheme, shape[stacked:], name.inputs)
        beside = None if placed is None else sharding_of_scale(placed, shape, scaling, stacked)
        return Fp8Tensor(
            jax.device_put(whole.values, placed),
            jax.device_put(whole.scales, beside),
            get_format(whole.values.dtype),
            scaling,
            dtype,
        )

    def _together(self, path, parts, lead, inputs, shape) -> StoredWeight:
        """The tensors of a parameter as one, in its layout; what is beside their values is kept."""
        if not parts:
            raise ValueError(
                f"parameter {path!r} must have a layer or more; got shape {list(lead + shape)}."
            )
        schemes = {part.scheme for part in parts}
        if len(schemes) > 1:
            raise CheckpointError(
                f"layers of {path!r} must all be quantized alike, for they are stacked; got "
                f"{' and '.join(sorted(map(str, schemes)))}. Use names that keep layers apart."
            )
        dtypes = {str(part.values.dtype) for part in parts}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"layers of {path!r} must have one dtype, for they are stacked; got "
                f"{sorted(dtypes)}."
            )

        def stack(values):
            missing = [value is None for value in values]
            if all(missing):
                return None
            if any(missing):
                raise CheckpointError(
                    f"layers of {path!r} must all have the same scales, for they are stacked; got "
                    "some with and some without. Use names that keep layers apart."
                )
            return np.stack(values).reshape(lead + np.shape(values[0])) if lead else values[0]

        for kept, of in ((self.input_scales, "input_scale"), (self.kv_scales, "kv_scale")):
            value = stack([getattr(part, of) for part in parts])
            if value is not None:
                kept[path] = value
        return StoredWeight(
            np.asarray(stack([from_file_layout(part.values, shape, inputs) for part in parts])),
            stack([part.scales for part in parts]),
            parts[0].scheme,
        )

    def finish(self, params: Any, ignore: Sequence[str]) -> LoadedCheckpoint:
        """All that was read; CheckpointError where a tensor was not, and mayn't stay so."""
        source = self.weights.source
        unread = [
            name
            for name in source.tensors
            if name not in self.weights.claimed and not is_comfy_marker(name)
        ]
        asked = [name for name in unread if not any(re.fullmatch(p, name) for p in ignore)]
        asked = [name for name in asked if name not in self.weights.surplus]
        plan = self.weights.plan
        if asked:
            raise CheckpointError(
                f"checkpoint must hold tensors that are parameters; got {asked[0]!r} and "
                f"{len(asked) - 1} more that none is. Correct the names, or pass ignore=[...] with "
                "patterns of what may stay unread. It was read as "
                f"{'one that is not quantized' if plan is None else plan.title}."
            )
        return LoadedCheckpoint(
            params=params,
            input_scales=self.input_scales,
            kv_scales=self.kv_scales,
            schemes=self.schemes,
            title=None if plan is None else plan.title,
            excluded=tuple(self._excluded_from_products()),
            left=tuple(unread),
            config=source.config,
            stacked=self.stacked,
        )

    def _excluded_from_products(self) -> list[str]:
        """Embeddings are read by products only where no head of their own is there."""
        has_head = any(re.search(r"(^|\.)lm_head\.", name) for name in self.weights.source.tensors)
        return [
            path
            for path in self.excluded
            if not (has_head and path.rpartition("/")[2] == "embedding")
        ]


def _as_dtype(path: str, theirs: str, values: np.ndarray, dtype: Any) -> np.ndarray:
    """Values that are not quantized in another dtype; CheckpointError where that changes them."""
    if jnp.issubdtype(dtype, jnp.floating) != jnp.issubdtype(values.dtype, jnp.floating):
        raise CheckpointError(
            f"parameter {path!r} must be {dtype}; got {theirs!r} of {values.dtype}."
        )
    narrow = values.astype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) and not np.array_equal(narrow, values):
        raise CheckpointError(
            f"parameter {path!r} must fit into {dtype}; got {theirs!r} of {values.dtype} with "
            "values that don't."
        )
    return narrow
