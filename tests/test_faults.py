"""Killed at any moment, a run goes on from a complete state to the same bits; steps that are not
finite leave no trace.
"""

import os
import pathlib
import random
import subprocess
import sys
import threading

import jax
import pytest
from checkpointed_training import advance, batch_at, begin, digest

HERE = pathlib.Path(__file__).parent
LIMIT = 300  # seconds for a start, most of which is what a loaded machine may need


@pytest.fixture
def environment(tmp_path):
    return {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run(folder, environment, log, kill_after=None, lines_before=0, steps=()):
    """A training in a process of its own: what it printed, to the end or to SIGKILL, some seconds
    after so many lines.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "checkpointed_training.py"), str(folder), *map(str, steps)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    timers = [threading.Timer(LIMIT, process.kill)]
    timers[0].start()
    try:
        lines = [process.stdout.readline() for _ in range(1 + lines_before)]
        assert lines[0].startswith("from ") and lines[-1], log.read_text()[-4000:]
        if kill_after is not None:
            timers.append(threading.Timer(kill_after, process.kill))
            timers[-1].start()
        lines += process.stdout.readlines()
    finally:
        for timer in timers:
            timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    printed = (line.split() for line in lines[1:] if line.endswith("\n"))
    return int(lines[0].split()[1]), {int(step): tuple(rest) for step, *rest in printed}


def whole_steps(folder):
    """Those that are not being written still."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


@pytest.mark.parametrize(
    "kills", [pytest.param(kills, marks=pytest.mark.slow) for kills in (2, 50)]
)
@jax.numpy_dtype_promotion("standard")  # for optax
def test_killed_at_random_moments_it_goes_on_from_a_complete_state_bitwise(
    kills, environment, tmp_path
):
    folder, log, moments = tmp_path / "run", tmp_path / "log", random.Random(0)
    seen, unfinished = {}, 0
    for nth in range(kills):
        latest = max(whole_steps(folder), default=0)
        # Now and then before the first step, which is the time of restoring and compiling too.
        begun, printed = run(
            folder,
            environment,
            log,
            kill_after=moments.uniform(0, 1),
            lines_before=int(nth % 5 != 4),
        )
        assert begun == latest
        unfinished += any(not path.name.isdigit() for path in folder.glob("*"))
        for step, what in printed.items():
            assert seen.setdefault(step, what) == what
    latest = max(whole_steps(folder))
    assert latest >= kills // 2
    assert unfinished or kills < 10  # some were killed while they saved
    begun, printed = run(folder, environment, log, steps=[latest + 2])
    assert begun == latest and printed.keys() == {latest + 1, latest + 2}
    # One that was never stopped.
    state, seen = begin(), seen | printed
    for step in range(latest + 2):
        state, value = advance(state, batch_at(step))
        if step + 1 in seen:
            assert seen[step + 1] == (float(value).hex(), str(digest(state)))
