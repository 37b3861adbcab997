"""What FP8 weights cost a model, layer by layer, what they save, and which layers to keep out of
it.

Each layer is quantized alone in an otherwise unquantized model, so that its figures are its own.
One compiled function runs all of that: whatever is quantized, the parameters it gets are dense
arrays of the same shapes.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.markup
import rich.table

from fp8jax._params import named_leaves
from fp8jax._progress import arguments_of, progress_bar
from fp8jax._tables import as_text
from fp8jax._tensor import Fp8Tensor, quantization_error


@dataclasses.dataclass(frozen=True)
class LayerQuality:
    """What quantizing one weight does.

    Args:
      path: of the weight.
      shape: of the weight.
      weight_sqnr_db: signal to quantization noise of its values.
      output_sqnr_db: of the model's outputs, with this weight alone quantized.
      loss_increase: of the loss, relative to the unquantized one, with this weight alone quantized.
      nbytes: bytes as FP8, scales included.
      nbytes_before: bytes as it was.
    """

    path: str
    shape: tuple[int, ...]
    weight_sqnr_db: float
    output_sqnr_db: float
    loss_increase: float
    nbytes: int
    nbytes_before: int


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """What `quality_report` found; printed, a table.

    Args:
      layers: the quantized weights, by the SQNR of the outputs, worst first.
      loss: of the unquantized model.
      quantized_loss: with all of them quantized.
      target: largest relative increase of the loss that was asked for; None where none was.
      keep: paths of the weights to keep in bfloat16 for that, those that cost most first.
      kept_loss: the loss with these kept and the others quantized, as measured.
      nbytes: bytes of all parameters, with these kept and the others quantized.
      nbytes_before: bytes of all parameters as they were.
    """

    layers: tuple[LayerQuality, ...]
    loss: float
    quantized_loss: float
    target: float | None
    keep: tuple[str, ...]
    kept_loss: float
    nbytes: int
    nbytes_before: int

    def to_json(self) -> str:
        """The report as a JSON object; infinite ratios, of layers that are exact, as null."""
        data = dataclasses.asdict(self)
        for layer in data["layers"]:
            layer |= {
                name: None
                for name in ("weight_sqnr_db", "output_sqnr_db")
                if not np.isfinite(layer[name])
            }
        return json.dumps(data, indent=1)

    def table(self) -> rich.table.Table:
        """The table, for a `rich` console of one's own."""
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD,
            title=f"{len(self.layers)} weights in FP8: {self._change(self.quantized_loss)}",
            caption=self._verdict(),
        )
        table.add_column("weight", overflow="fold")
        for column in ("shape", "weight dB", "output dB", "loss", "size"):
            table.add_column(column, justify="right", no_wrap=True)
        for layer in self.layers:
            table.add_row(
                rich.markup.escape(layer.path),
                rich.markup.escape(str(list(layer.shape))),
                f"{layer.weight_sqnr_db:.1f}",
                f"{layer.output_sqnr_db:.1f}",
                f"{layer.loss_increase:+.3%}",
                f"x {layer.nbytes / max(layer.nbytes_before, 1):.2f}",
            )
        return table

    def _change(self, loss):
        return f"loss {loss:.4f}, {loss / self.loss - 1:+.3%}" if self.loss else f"loss {loss:.4f}"

    def _verdict(self) -> str:
        size = f"{self.nbytes / 1e6:.3g} MB of {self.nbytes_before / 1e6:.3g} MB"
        if self.target is None:
            return size
        if not self.keep:
            return f"{size}; nothing to keep for {self.target:.2%}"
        kept = f"{', '.join(self.keep)} ({self._change(self.kept_loss)})"
        return f"{size}; for {self.target:.2%} keep in bfloat16: {kept}"

    def __str__(self) -> str:
        return as_text(self.table(), width=110)

    def __rich__(self) -> rich.table.Table:
        return self.table()


def quality_report(
    fn: Callable,
    params: Any,
    quantized: Any,
    batches: Iterable[tuple],
    *,
    target: float | None = None,
    progress: bool = True,
) -> QualityReport:
    """Measure what quantized weights do to a model's outputs and its loss.

    Args:
      fn: of parameters and a batch, `fn(params, *batch) -> (loss, outputs)`: a scalar, and an array
        or a tree of them.
      params: the dense parameters.
      quantized: the same from `quantize_params`.
      batches: for each evaluation the tuple of `fn`'s arguments behind `params`; held-out data, a
        few batches. Losses and the energies of outputs and errors are summed over them.
      target: largest relative increase of the loss, as 0.002. Weights are then put back to
        bfloat16, the one that costs most first, until the loss, measured anew each time, is within
        it.
      progress: whether to show a bar, on stderr.

    Returns:
      A `QualityReport`. The model runs once per weight, batch, and weight put back.

    Raises:
      ValueError: where the trees are not of one model, nothing is quantized, `batches` is empty or
        `target` negative; where a loss is not finite.
      TypeError: where `fn` does not return a pair of a scalar and outputs, or these hold no array.

    >>> from fp8jax import WeightRule, quantize_params
    >>> def fn(params, x):
    ...     y = x @ params["w"]
    ...     return jnp.square(y).mean(), y
    >>> params = {"w": jnp.linspace(0.1, 1.0, 16).reshape(4, 4)}
    >>> quantized = quantize_params(params, [WeightRule("w")])
    >>> report = quality_report(fn, params, quantized, [(jnp.ones((2, 4)),)])
    >>> report.layers[0].path, report.layers[0].weight_sqnr_db > 25
    ('w', True)
    >>> report.nbytes, report.nbytes_before
    (20, 64)
    """
    if target is not None and not (isinstance(target, (int, float)) and target >= 0):
        raise ValueError(
            f"target must be a relative increase of the loss, 0 or more; got {target!r}. Use 0.002 "
            "for 0.2 %."
        )
    batches = list(map(arguments_of, batches))
    if not batches:
        raise ValueError(
            "batches must hold at least one tuple of arguments; got none. A generator that was "
            "used up before is empty: "
            "pass a list."
        )
    dense, tree = named_leaves(params)
    coded = dict(named_leaves(quantized)[0])
    chosen = {path: leaf for path, leaf in coded.items() if isinstance(leaf, Fp8Tensor)}
    if [path for path, _ in dense] != list(coded) or any(
        jnp.shape(leaf) != coded[path].shape for path, leaf in dense if path in chosen
    ):
        raise ValueError(
            "quantized must be params, quantized; got a tree of other paths or shapes. Make it "
            "with "
            "quantize_params(params, rules)."
        )
    if not chosen:
        raise ValueError(
            "quantized must hold an Fp8Tensor; got none. Make it with quantize_params(params, "
            "rules)."
        )
    dense = {path: jnp.asarray(leaf) for path, leaf in dense}
    measure = _Measure(fn, tree, dense, batches)
    loss = measure({})[0]
    layers = []
    with progress_bar(progress, "weights measured", len(chosen)) as advance:
        for path, leaf in chosen.items():
            own, sqnr = measure({path: leaf.dequantize(dense[path].dtype)})
            of_weight = float(quantization_error(dense[path], leaf).sqnr_db)
            layers.append(
                LayerQuality(
                    path,
                    leaf.shape,
                    of_weight,
                    sqnr,
                    _relative(own, loss),
                    leaf.nbytes,
                    dense[path].nbytes,
                )
            )
            advance(1)
    changed = {path: leaf.dequantize(dense[path].dtype) for path, leaf in chosen.items()}
    kept_loss = quantized_loss = measure(changed)[0]
    keep = []
    costly = sorted(layers, key=lambda layer: layer.loss_increase, reverse=True)
    while target is not None and _relative(kept_loss, loss) > target and len(keep) < len(costly):
        keep.append(costly[len(keep)].path)
        changed[keep[-1]] = dense[keep[-1]].astype(jnp.bfloat16).astype(dense[keep[-1]].dtype)
        kept_loss = measure(changed)[0]
    sizes = {
        path: 2 * leaf.size if path in keep else coded[path].nbytes for path, leaf in dense.items()
    }
    return QualityReport(
        tuple(sorted(layers, key=lambda layer: (layer.output_sqnr_db, layer.path))),
        loss,
        quantized_loss,
        target,
        tuple(keep),
        kept_loss,
        sum(sizes.values()),
        sum(leaf.nbytes for leaf in dense.values()),
    )


class _Measure:
    """Loss and SQNR of the outputs over all batches, with some leaves changed."""

    def __init__(self, fn, tree, dense, batches):
        self._dense, self._batches = dense, batches

        def run(leaves, batch):
            out = fn(jax.tree.unflatten(tree, list(leaves.values())), *batch)
            if not isinstance(out, tuple) or len(out) != 2 or jnp.shape(out[0]) != ():
                raise TypeError(
                    "fn must return a pair of a scalar loss and outputs; got "
                    f"{type(out).__name__}. Return loss, outputs."
                )
            if not jax.tree.leaves(out[1]):
                raise TypeError(
                    f"outputs of fn must hold an array, to compare them; got {out[1]!r}. Return "
                    "loss, logits for instance."
                )
            return jnp.float32(out[0]), [
                jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(out[1])
            ]

        def energies(outputs, reference):
            return [
                jnp.stack([jnp.sum(jnp.square(first)), jnp.sum(jnp.square(own - first))])
                for own, first in zip(outputs, reference)
            ]

        self._run, self._energies = jax.jit(run), jax.jit(energies)
        self._reference = [self._run(dense, batch)[1] for batch in batches]

    def __call__(self, changed: dict[str, Any]) -> tuple[float, float]:
        losses, totals = [], np.zeros(2)
        for batch, reference in zip(self._batches, self._reference):
            loss, outputs = self._run(self._dense | changed, batch)
            losses.append(float(loss))
            totals += np.sum(
                jax.device_get(self._energies(outputs, reference)), axis=0, dtype=np.float64
            ).reshape(2)
        if not np.isfinite(losses).all():
            raise ValueError(
                f"fn must give a finite loss; got {losses} with {sorted(changed) or 'nothing'} "
                "quantized."
            )
        signal, noise = totals
        return float(np.mean(losses)), 10 * float(np.log10(signal / noise)) if noise else float(
            "inf"
        )


def _relative(loss: float, reference: float) -> float:
    return loss / reference - 1 if reference else 0.0 if loss == reference else float("inf")
