"""Progress bars of what takes long, on stderr."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress


@contextlib.contextmanager
def progress_bar(
    show: bool, description: str, total: float | None, unit: str = "steps"
) -> Iterator[Callable[..., None]]:
    """A bar for as long as the block runs.

    Args:
      show: whether to show it.
      description: what is under way.
      total: how much there is to do; None where that isn't known.
      unit: what is counted: "steps", or "bytes".

    Returns:
      A context manager whose value, `advance(amount, description=None)`, says how much more has
      been done, and what is under way now.

    >>> with progress_bar(False, "adding", total=3) as advance:
    ...     for _ in range(3):
    ...         advance(1)
    """
    counted = {
        "steps": rich.progress.MofNCompleteColumn,
        "bytes": rich.progress.DownloadColumn,
    }[unit]
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        counted(),
        console=rich.console.Console(stderr=True),
        disable=not show,
        # What is printed while a bar is shown goes above it on a terminal, and else where it was
        # sent to: not to stderr.
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount, description=None: bar.update(
            task, advance=amount, description=description
        )


def arguments_of(batch: Any) -> tuple:
    """One of `batches`, whose passes a bar shows; TypeError where it is no tuple of arguments."""
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"batches must be tuples of arguments, one for each pass; got {type(batch).__name__} "
            "among them. Put what each pass takes into a tuple: [(x,)] for one argument."
        )
    return tuple(batch)
