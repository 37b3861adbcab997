"""The GPU benchmark: it runs to its end anywhere on small sizes, and what it times is in FP8 when
compiled for an H200.
"""

import re

import jax
import pytest
from compile_only import compile_for, h200_mesh, place

from fp8jax import hlo
from fp8jax.bench import gpu
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
    variants, blocks = gpu.variants, gpu.blocks
    assert {"delayed", "current"} <= gpu.recipes().keys()
    if few:
        monkeypatch.setattr(gpu, "copies_of", lambda contender: 1)
        monkeypatch.setattr(
            gpu,
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


def test_arguments_are_larger_than_a_cache():
    forward, _ = gpu.products(2048)
    copies = gpu.copies_of(forward["bf16"])
    assert copies * 2 * 2048 * 2048 * 2 >= gpu.COLD_BYTES > 50 * 2**20  # an H200's
    forward, _ = gpu.products(16384)
    assert gpu.copies_of(forward["bf16"]) == 2


@pytest.mark.parametrize("name", ["delayed", "current", "rowwise"])
@jax.numpy_dtype_promotion("standard")
def test_what_it_times_is_in_fp8_on_h200(name):
    mesh = h200_mesh()
    contenders = {3: gpu.products(512)[1], 6 * 3: gpu.blocks(512, 256)}
    for count, rows in contenders.items():
        contender = rows[f"fp8jax {name}"]
        shapes = jax.eval_shape(contender.arguments, jax.random.key(0))
        report = hlo.report(compile_for(mesh, contender.function, *place(mesh, shapes)))
        assert not report.fallen_back
        assert len(report.products) == count
