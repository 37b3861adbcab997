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


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(32, 127)) * 40)
    return path


@pytest.mark.thorough
@pytest.mark.thorough
def test_a_contender_is_trained_and_measured_on_held_out_text(text_file):
    study = parity_study.Study(
        steps=3, layers=1, width=64, length=16, batch=2, data=str(text_file), held_out_batches=2
    )
    ran = []
    with jax.numpy_dtype_promotion("standard"):  # optax is not strict
        text = parity_study.train_lm.load_text(study.data)
        loss = parity_study.run(
            parity_study.Contender("delayed", recipes.delayed()),
            study,
            0,
            text,
            lambda: ran.append(0),
        )
    assert len(ran) == 3 and 3 < loss < 7


def test_a_study_goes_on_where_it_stopped(tmp_path, text_file, monkeypatch):
    places = [
        f"--data={text_file}",
        f"--results={tmp_path / 'results'}",
        f"--plot={tmp_path / 'plot.png'}",
    ]
    losses, ran = {"f32": 3.0, "delayed": 3.03}, []
    monkeypatch.setattr(
        parity_study,
        "run",
        lambda contender, *_: ran.append(contender.name) or losses.get(contender.name, 3.3),
    )
    everyone = parity_study.contenders
    monkeypatch.setattr(
        parity_study,
        "contenders",
        lambda *chosen: [each for each in everyone(*chosen) if each.name in losses],
    )
    found = parity_study.main([*TINY, "--seeds=1", *places, "--recipes", "delayed"])
    assert (
        list(found) == ran == ["f32", "delayed"] and (tmp_path / "plot.png").stat().st_size > 1000
    )
    assert found["f32"].mean == 0 and found["delayed"].mean == pytest.approx(0.01)
    lines = (tmp_path / "results").read_text().splitlines()
    assert len(lines) == 2 and {json.loads(line)["seed"] for line in lines} == {0}

    monkeypatch.setattr(parity_study, "contenders", everyone)
    ran.clear()
    again = parity_study.main(
        [*TINY, "--seeds=1", *places, "--recipes", "delayed", "--without", "rowwise"]
    )
    assert ran == [
        "f32, reordered",
        "bf16",
        *(f"rowwise without {operand}" for operand in ("lhs", "rhs", "grad")),
    ]
    assert again["delayed"].mean == found["delayed"].mean
    parity_study.main(["--steps=4", *TINY[1:], "--seeds=2", *places, "--recipes"])
    assert ran[5:] == ["f32", "f32, reordered", "bf16"] * 2  # results of other steps are others


@pytest.mark.parametrize("shown", [True, False], ids=["bar", "none"])
def test_the_bar_can_be_turned_off(shown, tmp_path, text_file, monkeypatch, capsys):
    def run(contender, study, seed, text, on_step):
        for _ in range(study.steps):
            on_step()
        return 3.0

    monkeypatch.setattr(parity_study, "run", run)
    places = [
        f"--data={text_file}",
        f"--results={tmp_path / 'results'}",
        f"--plot={tmp_path / 'plot.png'}",
    ]
    switch = [] if shown else ["--no-progress"]
    parity_study.main([*TINY, "--seeds=1", *places, "--recipes", *switch])
    told = capsys.readouterr()
    assert "Held-out loss" in told.out
    if shown:
        assert "9/9" in told.err and "bf16, seed 0" in told.err and "9/9" not in told.out
    else:
        assert told.err == ""


def test_gaps_are_paired_and_their_interval_is_students():
    reference = np.array([1.0, 2.0, 4.0])
    found = parity_study.gap(reference * np.array([1.01, 1.02, 1.03]), reference)
    assert (
        found.loss == pytest.approx(7.17 / 3)
        and found.mean == pytest.approx(0.02)
        and found.spread == pytest.approx(0.01)
    )
    interval = scipy.stats.t.interval(0.95, 2, loc=0.02, scale=0.01 / math.sqrt(3))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(interval)
    assert parity_study.gap(np.array([1.1]), np.array([1.0])).half_width == math.inf


@pytest.mark.parametrize("name", ["delayed", "rowwise", "mxfp8"])
def test_one_operand_left_out(name):
    recipe = getattr(recipes, name)()
    for operand in parity_study.OPERANDS:
        left = parity_study.without(recipe, operand)
        assert not left.casts_of(operand) and all(
            left.casts_of(other) for other in parity_study.OPERANDS if other != operand
        )


def test_errors():
    with pytest.raises(SystemExit):
        parity_study.main(["--seeds=0"])
    with pytest.raises(SystemExit):
        parity_study.main(["--recipes", "fp4"])
