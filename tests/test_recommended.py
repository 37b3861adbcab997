"""Which recipe pays on which device, and what `explain` and `hlo.report` say of the device."""

import dataclasses
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import fp8jax
from fp8jax import devices, hlo, recipes

ROOT = pathlib.Path(__file__).parents[1]
W, X = jnp.ones((64, 32)), jnp.ones((8, 64))


def test_the_presets_are_all_of_the_recipes():
    made = {
        name
        for name, value in vars(recipes).items()
        if inspect.isfunction(value)
        and value.__module__ == recipes.__name__
        and not name.startswith("_")
    }
    assert set(recipes.PRESETS) == made - {"recommended"}
    assert all(make().name == name for name, make in recipes.PRESETS.items())
    with pytest.raises(TypeError):
        recipes.PRESETS["delayed"] = recipes.current


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "Hopper GPUs"),
        ("NVIDIA H200", "Hopper GPUs"),
        ("H200", "Hopper GPUs"),
        ("NVIDIA GH200 480GB", "Hopper GPUs"),
        ("NVIDIA B200", "Blackwell GPUs"),
        ("NVIDIA GB200", "Blackwell GPUs"),
        ("TPU7x", "TPU 7x"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "older TPUs"),
        ("TPU v5p", "older TPUs"),
        ("NVIDIA A100-SXM4-80GB", "older GPUs"),
        ("cpu", "CPU"),
    ],
)
def test_a_device_is_known_by_the_kind_that_jax_reports(kind, name):
    assert devices.figures_of(kind).name == name


def test_a_small_blackwell_is_none_that_is_known():
    """Of compute capability 12, without the large ones' products."""
    assert devices.figures_of("NVIDIA GB10") is None
    assert devices.figures_of("NVIDIA RTX PRO 6000 Blackwell Server Edition") is None


def test_by_default_it_is_the_device_at_hand():
    assert recipes.recommended() == recipes.recommended("cpu") == recipes.delayed()
    assert recipes.recommended("NVIDIA H200") == recipes.delayed()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("an abacus", "there are no figures of 'an abacus'"),
        ("TPU v4", "older TPUs: no figures"),
        (
            "TPU v6 lite",
            "TPU v6e: 'delayed' takes 0.76 of bfloat16's time in a large model, 1.15 in a small "
            "one, by XLA's estimate",
        ),
        ("slow", "a slow one: 'current' takes 1.25 of bfloat16's time, by XLA's estimate"),
    ],
)
def test_it_warns_where_fp8_is_not_known_to_pay(kind, why, monkeypatch):
    slow = devices.DeviceFigures(
        "a slow one", ("slow",), True, False, 1.25, None, "by XLA's estimate", "current"
    )
    monkeypatch.setattr(devices, "FIGURES", (*devices.FIGURES, slow))
    with pytest.warns(
        UserWarning, match=f"not known to be faster .* on this device: {why}\\. Hold"
    ):
        recipe = recipes.recommended(kind)
    assert recipe == (recipes.current() if kind == "slow" else recipes.delayed())
    notes = dataclasses.replace(explained(recipes.current()), device=kind).notes
    assert ("FP8 can be slower than bfloat16 there" in " ".join(notes)) == (
        kind in ("slow", "TPU v6 lite")
    )


def test_what_is_no_kind_raises():
    with pytest.raises(
        TypeError, match="device_kind must be a string.*got None|got 3.*Use jax.dev"
    ):
        recipes.recommended(3)


def explained(recipe):
    return fp8jax.fp8(lambda w, x: x @ w, recipe).explain(W, X)


@pytest.mark.parametrize(
    ("recipe", "kind", "multiplies"),
    [
        (recipes.current(), "cpu", False),
        (recipes.current(), "NVIDIA H200", True),
        (recipes.current(execution="emulated"), "NVIDIA H200", False),
        (recipes.current(forward=fp8jax.E5M2), "NVIDIA H200", False),
        (recipes.rowwise(), "TPU7x", True),
        (recipes.mxfp8(), "NVIDIA H200", False),
        (recipes.weight_only(), "NVIDIA H200", False),
        (recipes.current(), "TPU v6 lite", False),
        (recipes.current(), "an abacus", None),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_explain_says_where_no_code_is_multiplied(recipe, kind, multiplies):
    found = dataclasses.replace(explained(recipe), device=kind)
    said = f"{kind} multiplies none of these products as FP8 codes"
    assert (said in " ".join(found.notes)) == (multiplies is False)
    assert (said in " ".join(str(found).split())) == (multiplies is False)
    if multiplies is None:
        assert found.notes == ()


def test_explain_and_the_report_know_the_device():
    fp8_fn = fp8jax.fp8(lambda w, x: x @ w, recipes.current())
    compiled = jax.jit(fp8_fn).lower({}, W, X).compile()
    report = hlo.report(compiled)
    assert explained(recipes.current()).device == report.device == "cpu"
    assert report.notes == explained(recipes.current()).notes and len(report.notes) == 1
    assert report.notes[0] in " ".join(str(report).split())
    # A text doesn't say what it is for.
    of_text = hlo.report(compiled.as_text())
    assert of_text.device == "" and of_text.notes[0].startswith("the device multiplies none")
    nothing = fp8jax.fp8(lambda w, x: x @ w, recipes.current(), [fp8jax.Rule(".*", None)])
    assert nothing.explain(W, X).notes == ()


def test_the_pages_have_the_figures():
    readme, guide, measured = (
        (ROOT / path).read_text()
        for path in ("README.md", "docs/guides/recipes.md", "docs/benchmarks.md")
    )
    for figures in devices.FIGURES:
        if figures.large is None:
            continue
        steps = [figures.large, *([] if figures.small is None else [figures.small])]
        for page in (readme, guide):
            (row,) = re.findall(rf"^\| {figures.name} \|(.*)\|$", page, re.MULTILINE)
            tensors, blocks, said = row.split(" | ")
            assert said.startswith(", ".join(f"{step:.2f}" for step in steps))
            assert [cell.strip() == "FP8" for cell in (tensors, blocks)] == [
                figures.multiplies,
                figures.multiplies_blocks,
            ]
        for step in steps:
            assert figures.name == "CPU" or f"| {figures.recipe} | {step:.3f} |" in measured
