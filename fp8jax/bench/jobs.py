"""Work side by side within a time, where nothing that fails or hangs costs what else was found."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


class Clock:
    """Seconds that are left of a budget.

    >>> clock = Clock(60)
    >>> 59 < clock.left <= 60, clock.part(0.5).left <= 30
    (True, True)
    """

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 at the least."""
        return max(self._end - time.monotonic(), 0.0)

    def part(self, share: float) -> "Clock":
        """A clock with a share of what is left."""
        return Clock(self.left * share)


def outcomes(
    jobs: Mapping[str, Callable[[], Any]], clock: Clock, workers: int
) -> Iterator[tuple[str, Any]]:
    """Each job's name with what it returned or the exception it raised, as they end.

    At the end of the time, a TimeoutError for each that hasn't ended; what hangs stays in its
    thread, see `leave`.

    >>> found = dict(outcomes({"two": lambda: 1 + 1, "none": lambda: 1 // 0}, Clock(60), 2))
    >>> found["two"], type(found["none"]).__name__
    (2, 'ZeroDivisionError')
    """
    waiting, ended = queue.SimpleQueue(), queue.SimpleQueue()
    for item in jobs.items():
        waiting.put(item)

    def work():
        while clock.left:
            try:
                name, job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                with jax.numpy_dtype_promotion("standard"):  # of this thread alone; Flax needs it
                    ended.put((name, job()))
            except Exception as error:  # whatever a peer, a compiler or a device makes of it
                ended.put((name, error))

    for _ in range(min(workers, len(jobs))):
        threading.Thread(target=work, name=_WORKER, daemon=True).start()
    pending = dict.fromkeys(jobs)
    while pending:
        try:
            name, result = ended.get(timeout=clock.left)
        except queue.Empty:
            for name in pending:
                yield name, TimeoutError("out of time")
            return
        del pending[name]
        yield name, result


_WORKER = "fp8jax.bench"


def leave(status: int) -> None:
    """Ends the program where a worker still hangs, which an orderly exit would wait for; else
    raises SystemExit where `status` is not 0.
    """
    workers = [thread for thread in threading.enumerate() if thread.name == _WORKER]
    for worker in workers:
        worker.join(timeout=1)
    if any(worker.is_alive() for worker in workers):
        sys.stdout.flush()
        os._exit(status)
    if status:
        raise SystemExit(status)


def in_words(error: BaseException) -> str:
    """An exception in one short line of a table.

    >>> in_words(ValueError("lhs | rhs must fit,\\nbut don't"))
    "ValueError: lhs / rhs must fit, but don't"
    """
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "..."
