"""The parity study: pairs, resuming, and the statistics."""

import json
import math
import pathlib
import sys

import jax
import numpy as np
import pytest
import scipy.stats

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import parity_study

from fp8jax import recipes

TINY = ["--steps=3", "--layers=1", "--width=64", "--length=16", "--batch=2", "--held-out-batches=2"]


def test_a_study_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 40)
    places = [f"--data={tmp_path / 'text'}", f"--results={tmp_path / 'results'}", f"--plot={tmp_path / 'plot.png'}"]
    everyone = parity_study.contenders
    monkeypatch.setattr(parity_study, "contenders", lambda *chosen: [each for each in everyone(*chosen) if each.name in ("f32", "delayed")])
    with jax.numpy_dtype_promotion("standard"):  # optax is not strict
        found = parity_study.main([*TINY, "--seeds=1", *places, "--recipes", "delayed"])
    assert list(found) == ["f32", "delayed"] and found["f32"].mean == 0 and (tmp_path / "plot.png").stat().st_size > 1000
    assert 1e-7 < abs(found["delayed"].mean) < 0.05
    lines = (tmp_path / "results").read_text().splitlines()
    assert len(lines) == 2 and {json.loads(line)["seed"] for line in lines} == {0}

    monkeypatch.setattr(parity_study, "contenders", everyone)
    ran = []
    monkeypatch.setattr(parity_study, "run", lambda contender, *_: ran.append(contender.name) or 3.0)
    again = parity_study.main([*TINY, "--seeds=1", *places, "--recipes", "delayed", "--without", "rowwise"])
    assert ran == ["f32, reordered", "bf16", *(f"rowwise without {operand}" for operand in ("lhs", "rhs", "grad"))]
    assert again["delayed"].mean == found["delayed"].mean
    parity_study.main(["--steps=4", *TINY[1:], "--seeds=2", *places, "--recipes"])
    assert ran[5:] == ["f32", "f32, reordered", "bf16"] * 2  # results of other steps are others


def test_gaps_are_paired_and_their_interval_is_students():
    reference = np.array([1.0, 2.0, 4.0])
    found = parity_study.gap(reference * np.array([1.01, 1.02, 1.03]), reference)
    assert found.loss == pytest.approx(7.17 / 3) and found.mean == pytest.approx(0.02) and found.spread == pytest.approx(0.01)
    interval = scipy.stats.t.interval(0.95, 2, loc=0.02, scale=0.01 / math.sqrt(3))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(interval)
    assert parity_study.gap(np.array([1.1]), np.array([1.0])).half_width == math.inf


@pytest.mark.parametrize("name", ["delayed", "rowwise", "mxfp8"])
def test_one_operand_left_out(name):
    recipe = getattr(recipes, name)()
    for operand in parity_study.OPERANDS:
        left = parity_study.without(recipe, operand)
        assert not left.casts_of(operand) and all(left.casts_of(other) for other in parity_study.OPERANDS if other != operand)


def test_errors():
    with pytest.raises(SystemExit):
        parity_study.main(["--seeds=0"])
    with pytest.raises(SystemExit):
        parity_study.main(["--recipes", "fp4"])
