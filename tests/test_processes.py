"""Several processes train what one does with as many devices; killed, they go on from their
checkpoint to the same bits.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_train_lm import load_example

ROOT = pathlib.Path(__file__).parents[1]
STEPS, LIMIT = (
    40,
    300,
)  # steps, and seconds for each launch, most of which is what a loaded machine may need

train_processes = load_example("train_processes")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """That of the launches: fp8jax as it is here, and compiled programs kept for the next."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def alone():
    """One process with eight devices."""
    with jax.numpy_dtype_promotion("standard"):  # for optax
        result = train_processes.train(
            train_processes.parse_arguments([f"--steps={STEPS}"]), jax.devices()
        )
    return result["losses"], result["exponents"]


def start(environment, log, **options):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "train_processes.py"), *arguments],
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def finish(process, log):
    try:
        assert process.wait(LIMIT) == 0, log.read_text()[-4000:]
    finally:
        kill(process)


def kill(process):
    """SIGKILL to the launcher and all of its workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def result_of(path):
    found = json.loads(path.read_text())
    return tuple(
        {int(step): value for step, value in found[name].items()}
        for name in ("losses", "exponents")
    )


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param(
            2, marks=pytest.mark.thorough if jax.__version_info__ >= (0, 12) else pytest.mark.slow
        ),  # by default on one JAX alone: it takes long
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_processes_train_as_one_does_and_go_on_after_being_killed(
    processes, alone, environment, tmp_path
):
    out, log = tmp_path / "whole.json", tmp_path / "log"
    finish(start(environment, log, processes=processes, steps=STEPS, out=out), log)
    losses, exponents = result_of(out)
    assert losses.keys() == alone[0].keys() and losses[0] > 1.5 * losses[STEPS - 1]
    np.testing.assert_allclose(
        [losses[step] for step in range(20)], [alone[0][step] for step in range(20)], rtol=1e-3
    )
    assert exponents[0] == alone[1][0] and sorted(exponents[0]) == [
        "down:layers/down",
        "head",
        "up:layers/up",
    ]

    folder, out = tmp_path / "run", tmp_path / "resumed.json"
    options = {
        "processes": processes,
        "steps": STEPS,
        "out": out,
        "checkpoint": folder,
        "checkpoint_every": 4,
    }
    process, deadline = start(environment, log, **options), time.monotonic() + LIMIT
    try:
        while not (folder / "8").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.002)
    finally:
        kill(process)
    assert not out.exists()
    finish(start(environment, log, **options), log)
    for rest, whole in zip(result_of(out), (losses, exponents), strict=True):
        assert 8 <= min(rest) < STEPS
        assert rest == {step: whole[step] for step in rest}


def test_a_failing_worker_ends_the_launch(environment, tmp_path):
    """The other one, which waits for it, included."""
    (tmp_path / "jax.py").write_text(
        "import os, sys, time\nprint(os.getpid(), flush=True)\n"
        "time.sleep(900)if '--worker=0' in sys.argv else os._exit(3)\n"
    )
    log = tmp_path / "log"
    process = start({**environment, "PYTHONPATH": str(tmp_path)}, log, processes=2)
    try:
        assert process.wait(LIMIT) == 1
    finally:
        kill(process)
    for pid in log.read_text().split():
        assert not pathlib.Path(f"/proc/{pid}").exists()


def test_shares_must_be_equal(capsys):
    with pytest.raises(SystemExit):
        train_processes.parse_arguments(["--processes=3", "--devices=8"])
    assert (
        "--devices must be a multiple of --processes and divide 64, the batch; got 8 devices and 3"
        in capsys.readouterr().err
    )
