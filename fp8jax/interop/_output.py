"""The tensors of a checkpoint to be written: names and shapes now, values one by one later."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fp8jax._formats import E4M3
from fp8jax._scaling import Scaling
from fp8jax.interop._dialects import DIALECTS, METHODS, Dialect, Writing, expand
from fp8jax.interop._recognize import FIELDS
from fp8jax.interop._safetensors_file import CheckpointError, TensorInfo, safetensors_dtype
from fp8jax.interop._scale_values import SCALE_DTYPES, narrow_scale
from fp8jax.interop._scheme import MX_BLOCK, Scheme, weights_in_file

Value = Callable[[], np.ndarray]


def scheme_of_weights(
    weights: Sequence[tuple[str, Sequence[int], Scaling, int]],
    method: str | None,
    activations: Literal["static", "dynamic"] | None,
    scale_dtype: str | None,
) -> Scheme | None:
    """The scheme of weights (path, shape of a layer, scaling, axes of inputs); None without any."""
    if scale_dtype is not None and scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {tuple(SCALE_DTYPES)}; got {scale_dtype!r}.")
    if method is not None and method not in METHODS:
        raise CheckpointError(f"method must be one of {METHODS}; got {method!r}.")
    kinds: dict[tuple[Any, Any], str] = {}
    for path, shape, scaling, inputs in weights:
        try:
            kind = weights_in_file(shape, scaling.normalize(len(shape)), inputs)
        except ValueError as error:
            raise CheckpointError(f"parameter {path!r}: {error}") from None
        kinds.setdefault(kind, path)
    if not kinds:
        return None
    ((kind, block),) = only_kind(kinds)
    if method is None:
        fits_mx = block == MX_BLOCK and scale_dtype in (None, "ue8m0")
        method = "fp8" if kind == "block" and not fits_mx else "compressed-tensors"
    if scale_dtype is None:
        scale_dtype = "ue8m0" if block == MX_BLOCK and method != "fp8" else "float32"
    return Scheme(
        weights=kind,
        block=block,
        activations=activations,
        method=method,
        exponents=scale_dtype == "ue8m0",
    )


def only_kind(kinds: dict[tuple, str]) -> dict[tuple, str]:
    """Kinds of groups by a weight that has them, where there is one kind; else CheckpointError."""
    if len(kinds) > 1:
        (first, here), (second, there) = list(kinds.items())[:2]
        raise CheckpointError(
            f"weights must all have groups of one kind, for config.json says it once; got {first} "
            f"for {here!r} and {second} for {there!r}. Quantize them alike."
        )
    return kinds


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` without what it says of quantization, at any of its places."""
    return {
        name: {k: v for k, v in part.items() if k not in FIELDS} if isinstance(part, dict) else part
        for name, part in config.items()
        if name not in FIELDS
    }


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor may be a linear layer's weight: a matrix, and no embedding by its name."""
    return len(shape) == 2 and "embed" not in name


class _Quantizing(NamedTuple):
    scheme: Scheme
    dialect: Dialect
    writing: Writing


class Output:
    """What is to be written, in the order of writing.

    Args:
      scheme: that of all quantized weights; None where there are none.
      scale_dtype: of the weights' scales, a key of `SCALE_DTYPES`; None for what the scheme says.
    """

    def __init__(self, scheme: Scheme | None, scale_dtype: str | None):
        self.scheme = scheme
        self.tensors: dict[str, TensorInfo] = {}
        self.ignored: list[str] = []
        self._values: dict[str, Value] = {}
        self._quantized: list[str] = []
        self._ragged: list[str] = []
        self._has_kv = False
        self._dtype = SCALE_DTYPES[scale_dtype or "float32"]
        if scheme is not None and scheme.exponents:
            self._dtype = self.quantizing.writing.exponents

    @property
    def quantizing(self) -> "_Quantizing":
        """How weights are written; ValueError where none is quantized."""
        dialect = None if self.scheme is None else DIALECTS[self.scheme.method]
        if self.scheme is None or dialect is None or dialect.writing is None:
            raise ValueError(f"scheme must be one that is written; got {self.scheme}.")
        return _Quantizing(self.scheme, dialect, dialect.writing)

    def add(self, name: str, dtype: Any, shape: Sequence[int], value: Value) -> None:
        """A tensor; ValueError where there is one of its name."""
        if name in self.tensors:
            raise ValueError(f"names must tell parameters apart; got {name!r} for two.")
        safetensors_dtype(dtype)
        self.tensors[name], self._values[name] = TensorInfo(np.dtype(dtype), tuple(shape)), value

    def add_weight(
        self, path: str, name: str, shape: Sequence[int], codes: Value, groups, scale: Value
    ) -> None:
        """A quantized weight: E4M3 codes and float32 scales of shape `groups`, as a file has them.

        Raises:
          CheckpointError: where readers of the dialect would not take it for one.
        """
        if not is_linear(name, shape) or path.rpartition("/")[2] == "embedding":
            raise CheckpointError(
                "quantized weights must be matrices of linear layers, for readers take all others "
                f"as they are; got {path!r}, {name!r} of {list(shape)}. Leave it unquantized: "
                "WeightRule(pattern, None)."
            )
        scheme, dialect, writing = self.quantizing
        self.add(name, E4M3.dtype, shape, codes)
        groups = writing.one if scheme.weights == "tensor" else tuple(groups)
        self.add(
            str(expand(dialect.scales[0], name)),
            self._dtype,
            groups,
            lambda: narrow_scale(path, scale().reshape(groups), self._dtype),
        )
        self._quantized.append(name.removesuffix(".weight"))
        block = scheme.block
        if block and any(n > b and n % b for n, b in zip(shape, block, strict=True)):
            self._ragged.append(name)

    def add_input_scale(self, path: str, name: str, value: np.ndarray) -> None:
        """The static scale of the activations that a weight is multiplied by."""
        self._add_one(path, expand(self.quantizing.dialect.inputs[0], name), value)

    def add_kv_scale(self, path: str, name: str, value: np.ndarray) -> None:
        """The static scale of the keys or values that a weight makes."""
        self._has_kv = True
        self._add_one(path, expand(self.quantizing.dialect.keys_values[0], name), value)

    def _add_one(self, path: str, name: str | None, value: np.ndarray) -> None:
        value = np.asarray(value, np.float32)
        if name is None:
            raise CheckpointError(
                f"parameter {path!r} must be called k_proj or v_proj, and end in .weight, for a "
                "scale beside it; it isn't. Correct the names."
            )
        if value.size != 1 or not 0 < value.item() < np.inf:
            raise CheckpointError(f"scale {name!r} must be one positive number; got {value}.")
        one = self.quantizing.writing.one
        self.add(name, np.float32, one, lambda: value.reshape(one))

    def leave_out(self, name: str) -> None:
        """A linear layer's weight that is not quantized."""
        self.ignored.append(name.removesuffix(".weight"))

    def value_of(self, name: str) -> np.ndarray:
        """The values of a tensor, once."""
        return self._values.pop(name)()

    def files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The JSON files: `config`, with what the dialect says of quantization.

        Raises:
          CheckpointError: where the dialect has no such weights, or its readers would take the
            names of what is left out for names of what isn't.
        """
        files = {"config.json": _without_quantization(config)}
        if self.scheme is None:
            return files
        scheme, _, writing = self.quantizing
        written = writing.files(scheme, self.ignored, self._has_kv)
        files["config.json"]["quantization_config"] = written.pop("config.json")
        if writing.ignores_by_pattern:
            self._check_ignored(scheme)
        if self._ragged and scheme.method == "fp8":
            warnings.warn(
                "blocks must divide weights for transformers without a GPU, which takes them to "
                f"be shape / scales; got {list(scheme.block or ())} for {self._ragged[0]!r} and "
                f"{len(self._ragged) - 1} more. By the format the file is right; with "
                "method='compressed-tensors' it is read right everywhere.",
                UserWarning,
                stacklevel=3,
            )
        return files | written

    def _check_ignored(self, scheme: Scheme) -> None:
        for name in self.ignored:
            for module in self._quantized:
                if module.endswith(name) or module.startswith(f"{name}."):
                    raise CheckpointError(
                        f"method {scheme.method!r} must have names of modules left out that "
                        f"are no ends of others, for its readers take them so; got {name!r} left "
                        f"out, and {module!r} quantized. Rename one, or use method "
                        "'compressed-tensors'."
                    )
