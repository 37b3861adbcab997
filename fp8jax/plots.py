"""Plots of FP8 training: losses of runs side by side, and the scales that followed the amaxes.

Functions of plain data that return matplotlib objects; nothing global is touched, so they work in
notebooks, on machines without a display, and beside plots of one's own. Needs `pip install
"fp8jax[plots]"`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fp8jax._formats import Format
from fp8jax._recipe import OPERANDS
from fp8jax._site_scales import LEAVES, SiteScales
from fp8jax.quality import QualityReport

# Told apart by people with any colour vision and in print (Okabe and Ito's palette, without its
# yellow).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_FAINT = 0.3


def plot_losses(
    losses: Mapping[str, Sequence[float]], *, window: int = 20, axes: Any = None
) -> Any:
    """The losses of some runs over their steps: each step's faintly, the mean over the latest
    `window` boldly.

    Args:
      losses: by name of the run, its losses in nats, one for each step; runs may differ in length.
      window: number of steps that the bold line averages over; at least 1.
      axes: matplotlib `Axes` to draw on; by default those of a new figure.

    Returns:
      The `Axes`; its figure is `axes.figure`.

    Raises:
      ValueError: where `window` is below 1.
      ImportError: where matplotlib is missing.

    >>> axes = plot_losses({"unquantized": [3.0, 2.0, 1.5], "FP8": [3.0, 2.1, 1.5]})
    >>> axes.get_legend_handles_labels()[1]
    ['unquantized', 'FP8']
    """
    axes = _axes(axes)
    for index, (name, values) in enumerate(losses.items()):
        color = COLORS[index % len(COLORS)]
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, values, color=color, alpha=_FAINT, linewidth=0.6)
        # Runs that agree lie on each other: with dashes on top, both stay visible.
        axes.plot(
            steps,
            running_mean(values, window),
            color=color,
            linewidth=1.8,
            label=name,
            linestyle="-" if index == 0 else (0, (4, 2)),
        )
    axes.set(xlabel="step", ylabel="nats")
    _finish(axes, "Loss")
    if losses:
        axes.legend(frameon=False)
    return axes


def plot_gap(
    losses: Sequence[float], reference: Sequence[float], *, window: int = 20, axes: Any = None
) -> Any:
    """How far a run's loss is from another's, in percent, by the means over the latest `window`
    steps.

    Args:
      losses: the losses of the run, one for each step.
      reference: those of the run it is held against, as many; not 0.
      window: number of steps to average over; at least 1.
      axes: matplotlib `Axes` to draw on; by default those of a new figure.

    Returns:
      The `Axes`.

    Raises:
      ValueError: where the runs differ in length or `window` is below 1.
      ImportError: where matplotlib is missing.

    >>> axes = plot_gap([2.02, 1.01], [2.0, 1.0], window=1)
    >>> [round(float(gap), 6) for gap in axes.lines[-1].get_ydata()]
    [1.0, 1.0]
    """
    if len(losses) != len(reference):
        raise ValueError(
            f"losses and reference must have as many steps; got {len(losses)} and "
            f"{len(reference)}. "
            "Cut the longer one."
        )
    axes = _axes(axes)
    base = running_mean(reference, window)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.plot(
        np.arange(1, len(base) + 1),
        100 * (running_mean(losses, window) - base) / base,
        color=COLORS[1],
        linewidth=1.4,
    )
    axes.set(xlabel="step", ylabel="%")
    _finish(axes, "Gap of the losses")
    return axes


def plot_quality(report: QualityReport, *, axes: Any = None) -> Any:
    """What each quantized weight costs: the SQNR of its values and of the model's outputs with it
    alone quantized.

    Args:
      report: of `fp8jax.quality.quality_report`; its order, worst first, is kept from the top down.
        Weights to keep in bfloat16 are marked.
      axes: matplotlib `Axes` to draw on; by default those of a new figure.

    Returns:
      The `Axes`.

    Raises:
      ImportError: where matplotlib is missing.

    >>> from fp8jax.quality import LayerQuality, QualityReport
    >>> layer = LayerQuality("up/kernel", (8, 8), 31.0, 38.0, 1e-4, 68, 256)
    >>> axes = plot_quality(QualityReport((layer,), 2.0, 2.1, 0.01, ("up/kernel",), 2.0, 128, 256))
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['up/kernel (keep)']
    """
    axes = _axes(axes)
    places = np.arange(len(report.layers))
    for offset, color, label, field in (
        (-0.2, COLORS[0], "of the weight", "weight_sqnr_db"),
        (0.2, COLORS[1], "of the outputs", "output_sqnr_db"),
    ):
        values = np.array([getattr(layer, field) for layer in report.layers], np.float64)
        axes.barh(
            places + offset,
            np.where(np.isfinite(values), values, np.nan),
            height=0.38,
            color=color,
            label=label,
        )
    axes.set_yticks(
        places,
        [layer.path + (" (keep)" if layer.path in report.keep else "") for layer in report.layers],
    )
    axes.invert_yaxis()
    axes.set(xlabel="dB")
    _finish(axes, "SQNR with one weight quantized")
    axes.legend(frameon=False)
    return axes


def plot_scale(
    exponents: Sequence[float], amaxes: Sequence[float], format: Format, *, axes: Any = None
) -> Any:
    """How an operand's scale followed its amax.

    The scale is drawn as what it means, the largest value that the cast can represent, `scale *
    format.max`: amaxes below that line fit, those above saturate.

    Args:
      exponents: base-2 exponents of the scale, as in a `SiteScales` before each step, one for each
        step.
      amaxes: those observed in these steps, as many; 0 where nothing was observed.
      format: of the cast.
      axes: matplotlib `Axes` to draw on; by default those of a new figure.

    Returns:
      The `Axes`.

    Raises:
      ValueError: where there are not as many exponents as amaxes, or they are not one per step.
      ImportError: where matplotlib is missing.

    >>> from fp8jax import E4M3
    >>> axes = plot_scale([0, 1], [300.0, 600.0], E4M3)
    >>> axes.get_legend_handles_labels()[1]
    ['amax', 'scale × 448']
    """
    moves, seen = np.asarray(exponents, np.float64), np.asarray(amaxes, np.float64)
    if moves.ndim != 1 or moves.shape != seen.shape:
        raise ValueError(
            f"exponents and amaxes must be one number each per step; got shapes {moves.shape} "
            "and "
            f"{seen.shape}. Of a stacked site, take one layer: leaf[:, layer]."
        )
    axes = _axes(axes)
    steps = np.arange(1, len(seen) + 1)
    fits = np.exp2(moves) * format.max
    seen = np.where((seen > 0) & np.isfinite(seen), seen, np.nan)
    saturated = seen > fits
    axes.plot(steps, seen, color=COLORS[0], linewidth=0.9, label="amax")
    axes.step(
        steps, fits, color=COLORS[1], linewidth=1.6, where="mid", label=f"scale × {format.max:g}"
    )
    if saturated.any():
        axes.plot(
            steps[saturated], seen[saturated], ".", color="black", markersize=4, label="saturated"
        )
    axes.set_yscale("log", base=2)
    drawn = np.log2(np.concatenate([fits, seen[~np.isnan(seen)]]))
    if len(drawn):  # Whole octaves, so that there are two ticks at least.
        axes.set_ylim(2.0 ** (np.floor(drawn.min()) - 0.1), 2.0 ** (np.ceil(drawn.max()) + 0.1))
    axes.set(xlabel="step")
    _finish(axes)
    return axes


def plot_training(
    losses: Mapping[str, Sequence[float]],
    histories: Mapping[str, tuple[SiteScales, SiteScales]] | None = None,
    *,
    window: int = 20,
) -> Any:
    """A training run on one page: the losses, their gap where there are two, and a row of scales
    for each site.

    Args:
      losses: by name of the run, its losses, as of `plot_losses`; the gap is the second's to the
        first.
      histories: by title, the exponents and the amaxes of a site, as of `stack_history`.
      window: number of steps that losses are averaged over.

    Returns:
      A matplotlib `Figure`; `figure.savefig("training.png")` writes it.

    Raises:
      ValueError: as of `plot_losses`, `plot_gap` and `plot_scale`.
      ImportError: where matplotlib is missing.

    >>> figure = plot_training({"unquantized": [2.0, 1.0], "FP8": [2.0, 1.01]})
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['Loss', 'Gap of the losses']
    """
    histories = histories or {}
    heights = [4.0, 2.2 * len(histories) + 0.3] if histories else [4.0]
    figure = _figure(figsize=(11, sum(heights)))
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights, hspace=0.04)[
        :, 0
    ]
    runs = list(losses.values())
    if len(runs) == 2:
        left, right = parts[0].subplots(1, 2, width_ratios=(2, 1))
        plot_gap(runs[1], runs[0], window=window, axes=right)
    else:
        left = parts[0].subplots()
    plot_losses(losses, window=window, axes=left)
    if histories:
        grid = parts[1].subplots(len(histories), len(OPERANDS), sharex=True, squeeze=False)
        for row, (title, (exponents, amaxes)) in zip(grid, histories.items()):
            _plot_site(row, title, exponents, amaxes)
        for axes in grid[:-1].flat:
            axes.set_xlabel("")
        # One legend for all: by label, since not every panel has saturated amaxes.
        handles = {
            label.partition(" ×")[0]: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels())
        }
        labels = {
            "amax": "amax",
            "scale": "largest that the scale can represent (scale × format's max)",
            "saturated": "amax beyond it: saturated",
        }
        parts[1].legend(
            handles.values(),
            [labels[name] for name in handles],
            loc="outside upper left",
            ncols=3,
            frameon=False,
        )
    return figure


def plot_errors(errors: Any, *, axes: Any = None) -> Any:
    """How exact each site's products are: signal to quantization noise of the output and both
    gradients, the worst on top.

    Args:
      errors: from `fp8jax.metrics.monitor(fp8_fn)(scales, *args)`.
      axes: matplotlib `Axes` to draw on; by default those of a new figure, as high as the sites
        need.

    Returns:
      The `Axes`. Ratios that are infinite or not a number have no mark.

    Raises:
      ImportError: where matplotlib is missing.

    >>> from fp8jax.metrics import Errors, SiteError
    >>> site = SiteError("mlp/up", forward=28.1, dlhs=24.9, drhs=None, lowest=24.0)
    >>> axes = plot_errors(Errors((site,)))
    >>> [text.get_text() for text in axes.get_yticklabels()]
    ['mlp/up']
    """
    axes = _bars_axes(axes, len(errors.sites))
    for marker, color, (product, label) in zip(
        "os^",
        COLORS,
        (("forward", "output"), ("dlhs", "gradient of lhs"), ("drhs", "gradient of rhs")),
    ):
        values = [getattr(site, product) for site in errors.sites]
        values = [value if value is not None and np.isfinite(value) else np.nan for value in values]
        axes.plot(values, range(len(values)), marker, color=color, markersize=5, label=label)
    _name_rows(axes, [site.name for site in errors.sites])
    axes.set(xlabel="dB")
    _finish(axes, "Signal to quantization noise")
    axes.legend(frameon=False)
    return axes


def plot_shares(
    shares: Mapping[str, float], *, title: str = "Saturated share", axes: Any = None
) -> Any:
    """Shares by operand, the largest on top: of observations that saturated, or of elements that
    were flushed to zero.

    Args:
      shares: by name of the operand, in [0, 1], as from `fp8jax.metrics.saturated_shares` or
        `flushed_shares`.
      title: what they are shares of.
      axes: matplotlib `Axes` to draw on; by default those of a new figure, as high as the operands
        need.

    Returns:
      The `Axes`.

    Raises:
      ImportError: where matplotlib is missing.

    >>> axes = plot_shares({"mlp/up/lhs": 0.0, "mlp/up/grad": 0.25})
    >>> for text, bar in zip(axes.get_yticklabels(), axes.patches):
    ...     print(text.get_text(), bar.get_width())
    mlp/up/grad 25.0
    mlp/up/lhs 0.0
    """
    names = sorted(shares, key=shares.__getitem__, reverse=True)
    axes = _bars_axes(axes, len(names))
    axes.barh(
        range(len(names)), [100 * shares[name] for name in names], color=COLORS[0], height=0.7
    )
    _name_rows(axes, names)
    axes.set(xlabel="%")
    _finish(axes, title)
    return axes


def stack_history(nodes: Sequence[SiteScales], layer: tuple[int, ...] | int = ()) -> SiteScales:
    """One site's exponents, or its observations, over the steps.

    Args:
      nodes: the site's `SiteScales` at each step, at least one.
      layer: of a site whose scales are stacked, the index of the one to take.

    Returns:
      A `SiteScales` whose leaves are NumPy arrays with the steps as leading axis.

    >>> from fp8jax import recipes
    >>> node = SiteScales.zeros("mlp/up", recipes.delayed().delayed_casts, (2,))
    >>> stack_history([node, node, node], layer=1).lhs.shape
    (3,)
    """

    def stack(operand):
        leaves = [getattr(node, operand) for node in nodes]
        return None if leaves[0] is None else np.stack([np.asarray(leaf)[layer] for leaf in leaves])

    return nodes[0].replace(**{operand: stack(operand) for operand in LEAVES})


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """For each value the mean of it and those before it, `window` at most.

    >>> running_mean([1.0, 2.0, 4.0, 6.0], 2).tolist()
    [1.0, 1.5, 3.0, 5.0]
    """
    if window < 1:
        raise ValueError(
            f"window must be a number of steps, at least 1; got {window!r}. Use 1 for no averaging."
        )
    array = np.asarray(values, np.float64)
    return np.array([array[max(0, end - window) : end].mean() for end in range(1, len(array) + 1)])


def _plot_site(row, title: str, exponents: SiteScales, amaxes: SiteScales) -> None:
    for axes, operand, cast in zip(row, OPERANDS, exponents.casts):
        if cast is None:  # Its scale is no state, so it has no history.
            axes.set_visible(False)
            continue
        plot_scale(getattr(exponents, operand), getattr(amaxes, operand), cast.format, axes=axes)
        axes.set_title(f"{title}: {operand}, {cast.format.name}", loc="left", fontsize="medium")


def _bars_axes(axes: Any, rows: int) -> Any:
    return _figure((7, 1.2 + 0.22 * rows)).subplots() if axes is None else axes


def _name_rows(axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.4, -0.6)


def _figure(figsize: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"fp8jax.plots needs matplotlib, which could not be imported ({error}). "
            'Install it with: pip install "fp8jax[plots]"'
        ) from error
    return Figure(figsize=figsize, dpi=110, layout="constrained")


def _axes(axes: Any) -> Any:
    return _figure((7, 4)).subplots() if axes is None else axes


def _finish(axes, title: str = "") -> None:
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
