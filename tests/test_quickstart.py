"""The first example: short, and what it prints is so."""

import pathlib
import re
import resource
import subprocess
import sys

import jax
import pytest

FILE = pathlib.Path(__file__).parents[1] / "examples" / "quickstart.py"
LOSSES = re.compile(r"^(Model|Fp8) +([\d.]+) +([\d.]+)$", re.MULTILINE)


def losses_in(output):
    return {name: (float(before), float(after)) for name, before, after in LOSSES.findall(output)}


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")  # optax.adamw multiplies floats and integers.
def test_a_small_run_learns_in_both(capsys):
    source = FILE.read_text()
    assert len(source.splitlines()) <= 60
    small = source.replace("400, 64, 16, 512", "12, 64, 8, 64").replace("8192", "512")
    assert small != source
    exec(compile(small, FILE.name, "exec"), {"__name__": "quickstart"})
    output = capsys.readouterr().out
    losses = losses_in(output)
    assert set(losses) == {"Model", "Fp8"}
    for before, after in losses.values():
        assert after < before - 0.5
    assert losses["Fp8"] == pytest.approx(losses["Model"], rel=0.01)
    assert losses["Fp8"] != losses["Model"]
    assert "4 of 5 products in FP8" in output and "left out by rule 'head'" in output
    assert re.search(r"^saturated: \d+\.\d\d% of amaxes$", output, re.MULTILINE)


@pytest.mark.slow
def test_the_command_is_as_good_as_unquantized_in_ninety_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(
        [sys.executable, FILE], capture_output=True, text=True, check=True
    ).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of CPU, which other work on the machine doesn't lengthen.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 90
    losses = losses_in(output)
    assert losses["Model"][1] < 2.5 and losses["Fp8"][1] < 1.01 * losses["Model"][1]
