"""A report to look at: what runs in FP8, why, how exactly, and how its scales moved, as one HTML
file.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from fp8jax._monitor import Errors
from fp8jax._transform import Explanation
from fp8jax.report._page import page_of
from fp8jax.report._rows import rows_of

__all__ = ["write_html"]


def write_html(
    path: str | os.PathLike,
    explanation: Explanation,
    *,
    state: Any = None,
    scales: Any = None,
    monitor: Errors | None = None,
    hlo: Any = None,
    steps: Sequence[tuple[Any, Any]] = (),
    title: str = "FP8 report",
) -> pathlib.Path:
    """Writes a page that shows every product of a model: recipe, reason, exactness, losses of
    range, engine, histories.

    The file stands alone: it loads nothing, so it can be mailed, or kept beside a checkpoint. The
    table sorts and filters. The worst sites come first: those with faults (what was not finite or
    not sealed, ratios below 10 dB), then those to look at (below 20 dB, more than 5 % saturated or
    flushed), then the others by their ratio.

    Pass what you have; what is left out has no column. The file is whole or not there: it is
    written beside its place and moved there.

    Args:
      path: of the file; one that is there is replaced.
      explanation: of `fp8_fn.explain(...)` or a Flax wrapper's `explain`.
      state: an optimizer's state that holds a `ScalingState`: for saturated and flushed shares,
        faults, and the amaxes in the windows. Pass `scales` too.
      scales: a tree that holds the `SiteScales`, as the trained variables do.
      monitor: the errors of `fp8jax.metrics.monitor(fp8_fn)(scales, ...)`: for signal to
        quantization noise.
      hlo: the report of `fp8jax.hlo.report(compiled)`: for engines. By default that of
        `explanation.with_report`.
      steps: one pair for each step: a tree with the `SiteScales` that it began with, and one with
        the amaxes that it observed (the gradients with respect to them). They are drawn instead of
        the windows of `state`.
      title: of the page.

    Returns:
      The path of the file.

    Raises:
      TypeError: where `explanation`, `monitor` or `hlo` is of another type.
      ValueError: where `state` comes without `scales`, or is not the state of these.

    >>> import jax, jax.numpy as jnp, fp8jax, tempfile
    >>> fp8_loss = fp8jax.fp8(lambda w, x: jnp.square(x @ w).mean(), fp8jax.recipes.delayed())
    >>> w, x = jnp.ones((64, 8)), jnp.ones((16, 64))
    >>> scales = fp8_loss.init(w, x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = write_html(f"{folder}/fp8.html", fp8_loss.explain(w, x), scales=scales)
    ...     "1 of 1" in file.read_text()
    True
    """
    if not isinstance(explanation, Explanation):
        raise TypeError(
            f"explanation must be an fp8jax.Explanation; got {type(explanation).__name__}. "
            "Pass what fp8_fn.explain(...) or model.explain(...) returns."
        )
    if monitor is not None and not isinstance(monitor, Errors):
        raise TypeError(
            f"monitor must be the Errors of a batch; got {type(monitor).__name__}. "
            "Pass fp8jax.metrics.monitor(fp8_fn)(scales, ...)."
        )
    hlo = explanation.report if hlo is None else hlo
    if hlo is not None and not callable(getattr(hlo, "verdict", None)):
        raise TypeError(
            f"hlo must be an fp8jax.hlo.Report; got {type(hlo).__name__}. "
            "Pass fp8jax.hlo.report(compiled)."
        )
    if state is not None and scales is None:
        raise ValueError(
            "scales must hold the SiteScales that state is the state of; got None. "
            "Pass the trained variables as scales=."
        )
    rows = rows_of(explanation, state, scales, monitor, hlo, list(steps))
    return _write_whole(pathlib.Path(path), page_of(title, explanation, rows, recorded=bool(steps)))


def _write_whole(path: pathlib.Path, text: str) -> pathlib.Path:
    """Writes a file that is never there in part, whatever interrupts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path
