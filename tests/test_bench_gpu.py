"""The GPU benchmark: it runs to its end anywhere on small sizes, and what it times is in FP8 when
compiled for an H200.
"""

import functools
import re

import jax
import numpy as np
import pytest
from compile_only import compile_for, h200_mesh, place

from fp8jax import hlo
from fp8jax.bench import contenders, gpu, quick
from fp8jax.bench.__main__ import main as bench


def test_it_refuses_where_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "gpu"])
    with pytest.raises(SystemExit, match="bench gpu needs a GPU; got 'cpu'. Run it where one is"):
        bench()
    monkeypatch.setattr("sys.argv", ["bench", "codec", "--sizes", "3"])
    with pytest.raises(SystemExit):
        bench()
    assert "codec has no options; got --sizes 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "few",
    [
        pytest.param(True, id="few", marks=pytest.mark.thorough),
        pytest.param(False, id="all", marks=pytest.mark.slow),
    ],
)
@jax.numpy_dtype_promotion("standard")
def test_it_writes_dated_tables(monkeypatch, tmp_path, few):
    out = tmp_path / "table.md"
    variants, blocks = contenders.variants, contenders.blocks
    assert {"delayed", "current"} <= contenders.recipes().keys()
    if few:
        monkeypatch.setattr(contenders, "copies_of", lambda contender: 1)
        monkeypatch.setattr(
            contenders,
            "variants",
            lambda make: {name: variants(make)[name] for name in ("bf16", "fp8jax current")},
        )
        monkeypatch.setattr(gpu, "blocks", lambda *arguments: {"bf16": blocks(*arguments)["bf16"]})
    monkeypatch.setattr(
        "sys.argv",
        [
            "bench",
            "gpu",
            "--any-device",
            "--sizes",
            "32",
            "--widths",
            "64",
            "--tokens",
            "32",
            "--rounds",
            "2",
            "--out",
            str(out),
        ],
    )
    bench()
    text = out.read_text()
    assert re.search(r"^# FP8 on cpu, \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "32 x 32 x 32, forward",
        "32 x 32 x 32, forward and both gradients",
        "Training step of a Transformer block, width 64, 32 tokens",
    ]
    rows = [line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| \w", line)]
    assert rows.count("bf16") == 3 and rows.count("fp8jax current") == (2 if few else 3)
    assert all(
        rows.count(name) == (0 if few else 3)
        for name in ("fp8jax delayed", "Flax Fp8DirectDotGeneralOp")
    )
    assert rows.count("bare FP8 product, codes given") == 1
    assert all(
        float(cell) > 0
        for line in text.splitlines()
        if re.match(r"\| \w", line)
        for cell in line.split("|")[2:-1]
    )


REFUSED, WHY = "a peer", "RESOURCE_EXHAUSTED: too large | by far"

REFUSING = contenders.Contender({}.get, lambda key: {}["none"])


@pytest.fixture
def quickly(monkeypatch, tmp_path):
    """A quick run of two contenders and of one that refuses; the tables' text, and what it left
    with.
    """
    variants, recipes, blocks = contenders.variants, contenders.recipes, contenders.blocks

    def refuse():
        raise RuntimeError(f"{WHY}\nfor any device")

    def few(make):
        found = {name: variants(make)[name] for name in ("bf16", "fp8jax current")}
        return found | {REFUSED: contenders.Variant(refuse)}

    monkeypatch.setattr(contenders, "variants", few)

    def one(width, tokens):
        return {"bf16": blocks(width, tokens)["bf16"], REFUSED: REFUSING}

    monkeypatch.setattr(contenders, "blocks", one)
    monkeypatch.setattr(contenders, "recipes", lambda: {"current": recipes()["current"]})

    def run(*options):
        out = tmp_path / "quick.md"
        sizes = "--sizes 32 --widths 64 --tokens 32 --rounds 2 --patterns 4096".split()
        arguments = ["--quick", "--any-device", "--out", str(out), *sizes, *options]
        monkeypatch.setattr("sys.argv", ["bench", "gpu", *arguments])
        try:
            bench()
        except SystemExit as left:
            return out.read_text(), left.code
        return out.read_text(), 0

    return run


def rows_of(text):
    """By section, each row's cells."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    rows = {}
    for section in sections:
        title, *lines = section.splitlines()
        body = lines[1 + next(i for i, line in enumerate(lines) if line.startswith("|---")) :]
        cells = [line.strip("|").split("|") for line in body if line.startswith("|")]
        rows[title] = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}
    return rows


@pytest.mark.thorough
def test_a_quick_run_tells_the_bits_and_the_times(quickly, capsys):
    text, status = quickly()
    assert status == 0 and re.search(r"^19 of 19 comparisons of bits held: all", text, re.M)
    casts, scaled, products, forward, both, step = rows_of(text).values()
    assert len(casts) == 4 * 3 and len(scaled) == 2 * 3
    assert all(row[:2] == ["4,096 of 4,096", "0"] for row in casts.values())
    assert all(row == ["20,480", "0"] for row in scaled.values())
    assert products["current"] == ["XLA in bf16", "yes", "equal, equal, equal"]
    assert float(step["bf16"][0]) > 0 and step[REFUSED][0] == "KeyError: 'none'"
    for rows in (forward, both):
        assert float(rows["bf16"][1]) == 1 and float(rows["fp8jax current"][0]) > 0
        # What failed is told where its time would be, and is all that is lost.
        assert rows[REFUSED][0] == f"RuntimeError: {WHY.replace('|', '/')} for any device"
    assert "bare FP8 product, codes given" in forward
    assert "| fp8jax current |" in capsys.readouterr().out


def test_a_quick_run_s_status_tells_wrong_bits(quickly, monkeypatch):
    """One wrong code of one cast; all else is told all the same."""
    right = quick.convert

    def wrong(x, source, fmt, overflow, *, round_first):
        codes = right(x, source, fmt, overflow, round_first=round_first)
        is_it = (fmt == quick.E5M2) & (not round_first) & (source == 1.0)
        return jax.numpy.where(is_it, jax.numpy.zeros_like(codes), codes)

    monkeypatch.setattr(quick, "convert", wrong)
    # Not the function that is compiled already.
    anew = functools.partial(quick._differing.__wrapped__)
    monkeypatch.setattr(quick, "_differing", jax.jit(anew, static_argnums=(1, 2, 3)))
    monkeypatch.setattr(contenders, "products", lambda size: ({}, {}))
    monkeypatch.setattr(contenders, "blocks", lambda width, tokens: {"bf16": REFUSING})
    monkeypatch.setattr(quick, "_STRIDE", np.uint32(1 << 20))
    text, status = quickly()
    assert status == 1 and "17 of 19 comparisons of bits held: NOT ALL" in text
    casts, *_, step = rows_of(text).values()
    assert casts["E5M2, saturate, converted"][1:] == ["1", "0x3F800000"]
    assert casts["E5M2, saturate, rounded, then converted"][1] == "0"
    assert step["bf16"][0] == "KeyError: 'none'"


def test_a_quick_run_ends_when_its_time_does(quickly):
    text, status = quickly("--budget", "0")
    assert status == 1 and "0 of 7 comparisons of bits held" in text
    assert rows_of(text)["32 x 32 x 32, forward"]["bf16"][0] == "TimeoutError: out of time"


def test_arguments_are_larger_than_a_cache():
    forward, _ = contenders.products(2048)
    copies = contenders.copies_of(forward["bf16"])
    assert copies * 2 * 2048 * 2048 * 2 >= contenders.COLD_BYTES > 50 * 2**20  # an H200's
    forward, _ = contenders.products(16384)
    assert contenders.copies_of(forward["bf16"]) == 2


@pytest.mark.parametrize("name", ["delayed", "current", "rowwise"])
@jax.numpy_dtype_promotion("standard")
def test_what_it_times_is_in_fp8_on_h200(name):
    mesh = h200_mesh()
    of_each = {3: contenders.products(512)[1], 6 * 3: contenders.blocks(512, 256)}
    for count, rows in of_each.items():
        contender = rows[f"fp8jax {name}"]
        shapes = jax.eval_shape(contender.arguments, jax.random.key(0))
        report = hlo.report(compile_for(mesh, contender.function, *place(mesh, shapes)))
        assert not report.fallen_back
        assert len(report.products) == count
