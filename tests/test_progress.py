"""What takes long shows a bar on stderr, counts in it, and keeps silent where it is asked to."""

import jax
import jax.numpy as jnp
import pytest

import fp8jax
from fp8jax import WeightRule, quantize_params, recipes
from fp8jax._progress import progress_bar
from fp8jax.bench import ahead
from fp8jax.interop import Name, read_checkpoint, write_checkpoint
from fp8jax.quality import quality_report

PARAMS = {"up": jnp.ones((16, 16)), "down": jnp.linspace(0.1, 1.0, 256).reshape(16, 16)}
X = jnp.ones((4, 16))


def loss(params, x):
    return jnp.square(jnp.tanh(x @ params["up"]) @ params["down"]).mean()


def calibrating(folder, progress):
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    fp8jax.calibrate(fp8_loss, fp8_loss.init(PARAMS, X), [(PARAMS, X)] * 3, progress=progress)


def monitoring(folder, progress):
    fp8_loss = fp8jax.fp8(loss, recipes.current())
    fp8jax.metrics.monitor(fp8_loss, progress=progress)({}, PARAMS, X)


def reporting(folder, progress):
    held = quantize_params(PARAMS, [WeightRule(".*")])
    quality_report(lambda params, x: (loss(params, x), x), PARAMS, held, [(X,)], progress=progress)


def writing(folder, progress):
    write_checkpoint(folder, PARAMS, [Name("(.*)", r"\1.weight")], progress=progress)


def reading(folder, progress):
    names = [Name("(.*)", r"\1.weight")]
    write_checkpoint(folder, PARAMS, names)
    read_checkpoint(folder, jax.eval_shape(lambda: PARAMS), names, progress=progress)


@pytest.mark.parametrize(
    ("run", "shown"),
    [
        (calibrating, "3/3"),
        (monitoring, "6/?"),
        (reporting, "2/2"),
        (writing, "2.0/2.0 kB"),
        (reading, "2/2"),
    ],
)
def test_a_bar_counts_what_is_done(run, shown, tmp_path, capsys):
    run(tmp_path / "silent", False)
    silent = capsys.readouterr()
    assert silent.err == "" and silent.out == ""
    run(tmp_path / "shown", True)
    told = capsys.readouterr()
    assert shown in told.err and told.out == ""


def test_what_is_printed_meanwhile_goes_where_it_was_sent(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # the bar is shown as on a terminal
    with progress_bar(True, "working", total=2) as advance:
        advance(1)
        print("a line of the table")
        advance(1, "still working")
    told = capsys.readouterr()
    assert told.out == "a line of the table\n"
    assert "2/2" in told.err and "still working" in told.err


def test_steps_compiled_ahead_are_counted(tmp_path, monkeypatch, capsys):
    cost = ahead.Cost(None, None, 3, 1000, 1, 2, 2**30)
    monkeypatch.setattr(ahead, "compile_step", lambda *_: None)
    monkeypatch.setattr(ahead, "cost_of", lambda _: cost)
    monkeypatch.setattr(ahead.targets, "has_compiler", lambda _: True)
    given = ["--devices", "H200", "--contenders", "bf16", "delayed", "--workloads", "small"]
    for more, shown in (["--no-progress"], False), ([], True):
        ahead.main(**vars(ahead.options([*given, *more, "--out", str(tmp_path / "table")])))
        told = capsys.readouterr()
        assert ("2/2" in told.err) == shown and bool(told.err) == shown
        assert "| delayed |" in told.out and "| delayed |" in (tmp_path / "table").read_text()
