"""Interleaved timing: each round calls every contender once, so that a drift of the machine hits
them alike.

In another order each round, since a call finds the caches as the one before has left them.
"""

import ctypes
import importlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

# Of glibc's mallopt: one arena, which may grow; no memory of an array's own; none given back; more
# taken at a time.
_KEEPING = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}


def keep_freed_memory() -> bool:
    """Makes the C library keep the memory that is freed in this process, whether it could: with
    glibc alone.

    A CPU takes longer to get an array's pages from the operating system than to fill them. To be
    called before JAX has begun any work.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(option, value) == 1 for option, value in _KEEPING.values()])


def interleaved_medians(
    contenders: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Median seconds of each contender's call, results awaited, after one warm-up round.

    >>> sorted(interleaved_medians({"a": lambda: 1, "b": lambda: 2}, rounds=3))
    ['a', 'b']
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        jax.block_until_ready(contender())
    names, shuffler = list(contenders), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(names)
        for name in names:
            before = time.perf_counter()
            jax.block_until_ready(contenders[name]())
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(taken) for name, taken in times.items()}


def print_table(title: str, reference: str, medians: dict[str, float]) -> None:
    """Prints milliseconds and the ratio to `reference` of each contender."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=title)
    table.add_column("contender")
    table.add_column("ms", justify="right")
    table.add_column(f"relative to {reference}", justify="right")
    for name, seconds in medians.items():
        ratio = seconds / medians[reference]
        table.add_row(
            name, f"{seconds * 1e3:.2f}", f"{ratio:.2f}" if ratio > 0.1 else f"{ratio:.1g}"
        )
    rich.console.Console().print(table)


def optional(name: str) -> Any:
    """A module of the `bench` extra, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def print_missing_peers() -> None:
    """Says which peers will have no row, and how to get them."""
    for name in ("qwix", "aqt"):
        if not optional(name):
            print(f"{name} is not installed: pip install 'fp8jax[bench]'")
