"""One weight of a checkpoint: codes, scales and what is beside it, as its dialect calls them."""

import dataclasses

import ml_dtypes
import numpy as np

from fp8jax._formats import E4M3, E5M2
from fp8jax.interop._dialects import DIALECTS, Dialect, changes_of, expand
from fp8jax.interop._folder import CheckpointFolder
from fp8jax.interop._recognize import not_said
from fp8jax.interop._safetensors_file import CheckpointError
from fp8jax.interop._scale_values import widen_scale
from fp8jax.interop._scheme import Plan, Scheme, from_file_layout, scaling_here, shape_in_file

# Of a checkpoint that doesn't say its dialect.
_UNKNOWN = dataclasses.replace(
    DIALECTS["cast"],
    scales=("{module}.{weight}_scale", "{module}.{weight}_scale_inv"),
    inputs=(),
    keys_values=(),
    formats=(E4M3, E5M2),
)


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """What there is of a weight.

    Args:
      values: codes, or the values themselves.
      scales: float32, in the layout that `Fp8Tensor` has; None where the weight is not quantized.
      scheme: how it is; None where it is not.
      input_scale: static scale of the activations; None where there is none.
      kv_scale: static scale of the keys or values that it makes, one or one for each head; None
        where there is none.
    """

    values: np.ndarray
    scales: np.ndarray | None
    scheme: Scheme | None
    input_scale: np.ndarray | None = None
    kv_scale: np.ndarray | None = None


class WeightReader:
    """Reads weights one by one, and keeps which tensors they are.

    Attributes:
      claimed: tensors that belong to the weights that were asked for, or say nothing that the
        configs don't.
      surplus: tensors beside weights that the config says are not used.
    """

    def __init__(self, source: CheckpointFolder, plan: Plan | None):
        self.source, self.plan = source, plan
        self.dialect: Dialect = _UNKNOWN if plan is None else DIALECTS[plan.method]
        self.claimed: set[str] = set()
        self.surplus: set[str] = set()

    def codes_name(self, theirs: str) -> str:
        """The name of the tensor that holds a weight."""
        name = expand(self.dialect.codes, theirs)
        return theirs if name is None or name not in self.source.tensors else name

    def read(self, path: str, shape: tuple[int, ...], inputs: int, theirs: str) -> StoredWeight:
        """A weight: values in the file's layout, scales in that of here.

        Raises:
          CheckpointError: where it is not as its configs, or its shape here, say.
        """
        values = self._values(self.codes_name(theirs))
        expected = shape_in_file(shape, inputs)
        if values.shape != expected:
            raise CheckpointError(
                f"tensor {theirs!r} must be {list(expected)}, for {path!r} to be {list(shape)}; "
                f"got {list(values.shape)}. Correct the names or the model's sizes."
            )
        if values.dtype.itemsize > 1 or values.dtype.kind in "iub":
            self._check_not_scaled(theirs, values.dtype)
            return StoredWeight(values, None, None, None, self._kv_scale(theirs))
        scheme = self.scheme_of(theirs)
        # E5M2 has infinities, and three NaNs.
        first = 0x7F if values.dtype == ml_dtypes.float8_e4m3fn else 0x7C
        if ((values.view(np.uint8) & 0x7F) >= first).any():
            raise CheckpointError(f"tensor {theirs!r} must hold numbers; got NaNs.")
        scales = self._scales(theirs, shape, inputs, scheme)
        return StoredWeight(values, scales, scheme, *self.beside(theirs, scheme))

    def scheme_of(self, theirs: str) -> Scheme:
        """How a weight of FP8 codes is quantized, of the header alone.

        Raises:
          CheckpointError: where nothing says it, the codes have another dtype, or there are no
            scales.
        """
        name = self.codes_name(theirs)
        dtype = self.source.tensors[name].dtype
        formats = [fmt.dtype for fmt in self.dialect.formats]
        if dtype not in formats:
            raise CheckpointError(
                f"tensor {theirs!r} must be {' or '.join(map(str, formats))}, the "
                f"dtype of weights; got {dtype}.{self._suffix()}"
            )
        if self.plan is None:
            raise not_said(self.source, theirs, dtype)
        changes = changes_of(theirs, self.source.tensors)
        if changes is not None:
            raise CheckpointError(
                f"tensor {theirs!r} must be of codes and scales alone; got {changes!r} beside it, "
                f"without which its values are wrong. Such weights are not read.{self._suffix()}"
            )
        scheme = self.plan.scheme_of(theirs.rpartition(".")[0])
        self.claimed.update([name, *self._found(self.dialect.beside, theirs)])
        scale = self._scale_name(theirs)
        if scale is not None and scheme.method == "fp8" and scheme.weights == "block":
            is_one = self.source.tensors[scale].shape in ((), (1,), (1, 1))
            if is_one and scale.endswith("_scale"):  # vLLM's: per tensor, even beside blocks
                return dataclasses.replace(scheme, weights="tensor", block=None)
        return scheme

    def beside(self, theirs: str, scheme: Scheme) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The static scales of a weight's activations, and of the keys or values that it makes."""
        return self._input_scale(theirs, scheme), self._kv_scale(theirs)

    def _found(self, templates: tuple[str, ...], theirs: str) -> list[str]:
        """The names by these templates that are there."""
        names = (expand(template, theirs) for template in templates)
        return [name for name in names if name is not None and name in self.source.tensors]

    def _check_not_scaled(self, theirs: str, dtype: np.dtype) -> None:
        """CheckpointError where a weight that is not FP8 has scales."""
        # A module's own "scale" beside it is a parameter.
        found = self._found(self.dialect.scales, theirs)
        found = [name for name in found if not name.endswith(".scale")]
        if found:
            raise CheckpointError(
                f"tensor {theirs!r} must be float8_e4m3fn, for it has scales, {found[0]!r}; got "
                f"{dtype}.{self._suffix()}"
            )

    def _suffix(self) -> str:
        return "" if self.plan is None else f" It was read as {self.plan.title}."

    def _values(self, name: str) -> np.ndarray:
        values = self.source.read(name)
        self.claimed.add(name)
        return values

    def _scale_values(self, name: str, exponents: bool) -> np.ndarray:
        return widen_scale(
            name,
            self._values(name),
            bytes_are_exponents=exponents or self.dialect.bytes_are_exponents,
        )

    def _one_scale(self, name: str, exponents: bool = False) -> np.ndarray:
        scale = self._scale_values(name, exponents)
        if scale.size != 1:
            raise CheckpointError(
                f"scales {name!r} must be one number; got {list(scale.shape)}.{self._suffix()}"
            )
        return scale.reshape(())

    def _input_scale(self, theirs: str, scheme: Scheme) -> np.ndarray | None:
        names = self._found(self.dialect.inputs, theirs)
        if not names:
            return None
        if scheme.activations != "static":
            self.surplus.update(names)
            return None
        if len(names) > 1:
            raise CheckpointError(
                f"tensor {theirs!r} must have one scale of activations; got "
                f"{names}.{self._suffix()}"
            )
        return self._one_scale(names[0])

    def _kv_scale(self, theirs: str) -> np.ndarray | None:
        names = self._found(self.dialect.keys_values, theirs)
        if not names:
            return None
        scale = self._scale_values(names[0], exponents=False)
        if not scale.size or scale.size != max(scale.shape, default=1):
            raise CheckpointError(
                f"scales {names[0]!r} must be one number, or one for each head; got "
                f"{list(scale.shape)}.{self._suffix()}"
            )
        return scale.reshape(() if scale.size == 1 else -1)

    def _scale_name(self, theirs: str) -> str | None:
        """The name of a weight's scales; None where its dialect has none."""
        if not self.dialect.scales:
            return None
        found = self._found(self.dialect.scales, theirs)
        if len(found) != 1:
            names = [expand(template, theirs) for template in self.dialect.scales]
            wanted = " or ".join(repr(name) for name in names if name is not None)
            raise CheckpointError(
                f"tensor {theirs!r} must have scales, {wanted}; got {found}.{self._suffix()}"
            )
        self.claimed.add(found[0])
        return found[0]

    def _scales(self, theirs: str, shape, inputs, scheme: Scheme) -> np.ndarray:
        """A weight's scales as its `Fp8Tensor` has them."""
        name = self._scale_name(theirs)
        if name is None:
            return np.ones((), np.float32)
        if scheme.weights == "tensor":
            return self._one_scale(name, scheme.exponents)
        try:
            groups = scaling_here(scheme, shape, inputs).group_shape(shape)
        except ValueError as error:
            raise CheckpointError(f"scales {name!r} must fit their weight: {error}") from None
        scales = self._scale_values(name, scheme.exponents)
        if scales.ndim == 4 and scales.shape[1] == scales.shape[3] == 1:
            scales = scales[:, 0, :, 0]
        expected = shape_in_file(groups, inputs)
        if scales.shape != expected and not (
            scheme.weights == "channel" and scales.shape == expected[:1]
        ):
            raise CheckpointError(
                f"scales {name!r} must be {list(expected)}, one per {scheme.weights}"
                f"{f' of {list(scheme.block)}' if scheme.block else ''}; got "
                f"{list(scales.shape)}.{self._suffix()}"
            )
        return from_file_layout(scales.reshape(expected), groups, inputs)
