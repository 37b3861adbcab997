"""The example: a causal model, both twins alike but for FP8, a run that resumes to the same bits,
and one that learns.
"""

import dataclasses
import importlib.util
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax

ROOT = pathlib.Path(__file__).parents[1]


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_lm = load_example("train_lm")
load_example("transformer_nnx")
FP8, UNQUANTIZED = train_lm.FP8, train_lm.UNQUANTIZED


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 40)
    return str(path)


@pytest.fixture(scope="module")
def small(text_file):
    return train_lm.Config(
        steps=8, layers=2, width=64, batch=2, length=32, warmup=2, data=text_file
    )


@pytest.fixture(scope="module")
def starts():
    """Of the run below: what its twins started from."""
    return {}


@pytest.fixture(scope="module")
def result(small, starts):
    make_twins = train_lm.make_twins

    def recorded(*arguments):
        both = make_twins(*arguments)
        starts.update(
            {name: jax.device_get(twin.variables["params"]) for name, twin in both.items()}
        )
        return both

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lm, "make_twins", recorded)
        return train(small)


def train(config):
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw multiplies floats and integers.
        return train_lm.train(config)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_targets_are_the_successors_and_a_function_of_the_step(small):
    text = np.arange(200, dtype=np.uint8)
    tokens, targets = train_lm.batch_at(text, 3, small)
    assert tokens.shape == targets.shape == (small.batch, small.length)
    np.testing.assert_array_equal(targets, tokens + 1)
    assert_equal(train_lm.batch_at(text, 3, small), (tokens, targets))
    assert (train_lm.batch_at(text, 4, small)[0] != tokens).any()
    assert (train_lm.batch_at(text, 3, dataclasses.replace(small, seed=1))[0] != tokens).any()


def test_default_text_is_the_standard_library_without_tests():
    text = bytes(train_lm.load_text(None, most=200_000))
    assert len(text) == 200_000
    assert text.count(b"    def ") > 100


def test_model_sees_only_the_past():
    model = train_lm.TransformerLM(layers=2, width=64)
    tokens = jax.random.randint(jax.random.key(0), (1, 16), 0, 256)
    variables, apply = jax.jit(model.init)(jax.random.key(1), tokens), jax.jit(model.apply)
    before, after = apply(variables, tokens), apply(variables, tokens.at[0, 9].add(1))
    np.testing.assert_array_equal(before[0, :9], after[0, :9])
    assert (jnp.abs(before - after)[0, 9:].max(-1) > 1e-3).all()


def test_positions_are_seen_relative_to_each_other():
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 64))
    q, k = (jnp.broadcast_to(part, (1, 6, 1, 64)) for part in x)
    scores = jnp.einsum("bqhd,bkhd->qk", train_lm.rotate(q), train_lm.rotate(k))
    np.testing.assert_allclose(scores[:-1, :-1], scores[1:, 1:], atol=1e-4)
    assert np.ptp(scores) > 1


@pytest.mark.thorough
def test_report_has_all_sites_with_all_columns(result, small, tmp_path):
    file = train_lm.write_report(result, small, tmp_path / "report.html")
    text = file.read_text(encoding="utf-8")
    for site in result.explanation.sites:
        assert f'data-sort="{site.name}"' in text
    for heading in ("Recipe", "FLOPs", "SQNR", "Saturated", "Range used", "Engine"):
        assert f'<button type="button">{heading}</button>' in text
    steps = re.findall(r'"steps":(\[[\d,]*\])', text)
    assert steps and set(steps) == {"[1,2,3,4,5,6,7,8]"}


@pytest.mark.thorough
def test_twins_start_from_the_same_parameters(result, starts):
    assert_equal(starts[FP8], starts[UNQUANTIZED])


@pytest.mark.thorough
def test_twins_start_alike_and_train_apart(result):
    first = {name: losses[0] for name, losses in result.losses.items()}
    assert first[FP8] == pytest.approx(first[UNQUANTIZED], rel=0.01)
    assert first[FP8] != first[UNQUANTIZED]
    assert all(losses[-1] < losses[0] - 0.5 for losses in result.losses.values())
    assert result.final_loss(FP8) == pytest.approx(np.mean(result.losses[FP8]))
    assert len(result.seconds[FP8]) == len(result.exponents) == len(result.amaxes) == 8
    shapes = {
        name: jax.tree.map(jnp.shape, variables["params"])
        for name, variables in result.variables.items()
    }
    assert shapes[FP8] == shapes[UNQUANTIZED]


@pytest.mark.thorough
@pytest.mark.slow
def test_the_model_in_nnx_gives_the_losses_of_that_in_linen(small, result):
    """From the same parameters, step by step; its sites have the same names."""
    nnx_result = train(dataclasses.replace(small, api="nnx"))
    for name in (UNQUANTIZED, FP8):
        np.testing.assert_allclose(nnx_result.losses[name], result.losses[name], rtol=1e-5)
    assert {site.name for site in nnx_result.explanation.sites} == {
        site.name for site in result.explanation.sites
    }
    assert nnx_result.explanation.share == result.explanation.share


@pytest.mark.thorough
def test_scales_follow_what_was_observed(result):
    sites = {"query", "key", "value", "out", "up", "down"}
    assert {site.rpartition("/")[2] for site in result.amaxes[0]} == sites
    for before, seen, after in zip(result.exponents, result.amaxes, result.exponents[1:]):
        for site in seen:
            assert (seen[site].grad > 0).all() and seen[site].grad.shape == (2,)
            largest = 2.0 ** after[site].lhs * 448  # The window holds all of so short a run.
            assert (seen[site].lhs <= largest).all() and (before[site].lhs <= after[site].lhs).all()


@pytest.mark.thorough
def test_resumed_run_is_the_uninterrupted_one(small, result, tmp_path):
    first = dataclasses.replace(
        small, steps=5, checkpoint=str(tmp_path / "run"), checkpoint_every=2
    )
    train(first)
    resumed = train(dataclasses.replace(first, steps=small.steps))
    assert resumed.losses == result.losses
    assert_equal(
        (resumed.variables, resumed.exponents, resumed.amaxes),
        (result.variables, result.exponents, result.amaxes),
    )
    assert resumed.summary == result.summary
    for changes, message in (
        (
            {"seed": 1},
            r"seed must be as in the checkpoint .* got 1, .* written with 0\. Pass that, or "
            r"another",
        ),
        (
            {"data": str(ROOT / "LICENSE")},
            r"data must be as in the checkpoint .* got '\d+ bytes, CRC",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(first, **changes))


@pytest.mark.slow
def test_command_prints_sites_losses_and_table_and_writes_the_plot(small, tmp_path, capsys):
    sizes = [
        f"--{name}={getattr(small, name)}"
        for name in ("layers", "width", "batch", "length", "data")
    ]
    with jax.numpy_dtype_promotion("standard"):
        assert (
            train_lm.main([*sizes, "--steps=3", "--recipe=current", f"--out={tmp_path / 'new'}"])
            == 0
        )
    out = capsys.readouterr().out
    assert "lm_head" in out and re.search(r"step 3 of 3 +unquantized \d\.\d+ +FP8 \d\.\d+", out)
    for row in (
        r"loss of last 3 steps.* \d\.\d+ +\d\.\d+ +[+-]\d",
        r"time per step.* x \d",
        r"FLOPs.* \d+\.\d%",
        "saturated share",
    ):
        assert re.search(row, out), row
    assert max(map(len, out.splitlines())) <= 80
    assert (tmp_path / "new" / "train_lm.png").stat().st_size > 10_000


def test_recipes_are_the_library_s():
    assert {"delayed", "current"} <= set(train_lm.recipe_names())
    assert all(
        isinstance(getattr(fp8jax.recipes, name)(), fp8jax.Recipe)
        for name in train_lm.recipe_names()
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 100}, r"width must be a multiple of 64.* got 100\. The nearest is 128"),
        ({"steps": 0}, r"steps must be at least 1; got 0\. Leave it out for the default, \d+"),
        ({"api": "haiku"}, r"api must be one of \('linen', 'nnx'\); got 'haiku'\. Leave it out"),
        ({"recipe": "fp9"}, r"recipe must be one of \[.*'delayed'.*\]; got 'fp9'"),
        (
            {"recipe": "current", "unit_gradient_scales": True},
            r"unit_gradient_scales must be False for .* 'current'",
        ),
    ],
)
def test_bad_configurations_are_told_what_is_wrong(changes, message, capsys):
    with pytest.raises(ValueError, match=message):
        train_lm.Config(**changes)


def test_command_line_reports_bad_values(capsys):
    with pytest.raises(SystemExit):
        train_lm.main(["--width=100"])
    assert "width must be a multiple of 64" in capsys.readouterr().err


def test_short_text_is_refused(small, tmp_path):
    (tmp_path / "short").write_text("a" * 32)
    with pytest.raises(
        ValueError,
        match=r"data must be longer than a sequence of 32 bytes; got 32 bytes\. Pass a longer",
    ):
        train_lm.train(dataclasses.replace(small, data=str(tmp_path / "short")))


def test_explain_names_every_product_of_the_default_model_and_why():
    config = train_lm.Config()
    explanation = train_lm.explain(config)
    sites = {site.name.removeprefix("blocks/"): site for site in explanation.sites}
    attention = [sites["scores/data"], sites["mix/data"]]
    assert len(sites) == len(explanation.sites) == 9
    assert all(site.reason for site in explanation.sites)
    tokens_per_step, width = config.batch * config.length, config.width
    assert sites["up"].flops == config.layers * 2 * tokens_per_step * width * 4 * width
    outside = sum(site.flops for site in explanation.sites if site not in attention)
    assert explanation.selected_flops / outside >= 0.9
    assert not sites["lm_head"].selected and not any(site.selected for site in attention)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_default_run_learns_and_fp8_stays_within_a_percent(seed):
    result = train(train_lm.Config(seed=seed))
    assert result.final_loss(UNQUANTIZED) < 2.3
    assert abs(result.gap) < 0.01


@pytest.mark.slow
def test_default_run_without_gradient_scales_falls_behind():
    result = train(train_lm.Config(unit_gradient_scales=True))
    assert result.final_loss(UNQUANTIZED) < 2.3
    assert not result.gap < 0.01
