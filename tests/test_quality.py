"""The quality report."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax import PerChannel, WeightRule, plots, quantize_params
from fp8jax.quality import quality_report

RNG = np.random.default_rng(0)
# The columns of "rough" are of very different sizes, so one scale for all flushes some.
PARAMS = {
    "rough": (RNG.normal(size=(16, 32)) * np.exp2(np.linspace(-18, 0, 32))).astype(np.float32),
    "smooth": (RNG.normal(size=(16, 32)) / 4).astype(np.float32),
    "bias": np.zeros(32, np.float32),
}
RULES = [WeightRule("rough|smooth")]
BATCHES = [(RNG.normal(size=(8, 16)).astype(np.float32),) for _ in range(2)]


def fn(params, x):
    """Both weights count alike in the outputs, each column by its own size."""
    size = np.linalg.norm(PARAMS["rough"], axis=0, keepdims=True)
    outputs = {"a": x @ params["rough"] / size, "b": x @ params["smooth"] + params["bias"][None]}
    return 1 + sum(
        jnp.abs(leaf - target).mean() for leaf, target in zip(jax.tree.leaves(outputs), targets(x))
    ), outputs


def targets(x):
    return x @ PARAMS["rough"] / np.linalg.norm(PARAMS["rough"], axis=0, keepdims=True), x @ PARAMS[
        "smooth"
    ]


def by_hand(name):
    """SQNR of a weight and of the outputs, and the loss, in float64 and by ml_dtypes."""
    w = PARAMS[name].astype(np.float64)
    scale = np.exp2(np.ceil(np.log2(np.abs(w).max() / 448)))
    rounded = (w / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(
        np.float64
    ) * scale
    signal = noise = loss = 0.0
    size = (
        np.linalg.norm(PARAMS["rough"].astype(np.float64), axis=0, keepdims=True)
        if name == "rough"
        else 1.0
    )
    for (x,) in BATCHES:
        error = x @ (rounded - w) / size
        noise += np.square(error).sum()
        loss += np.abs(error).mean() / len(BATCHES)
        signal += sum(np.square(np.float64(t)).sum() for t in targets(x))
    return (
        10 * np.log10(np.square(w).sum() / np.square(rounded - w).sum()),
        10 * np.log10(signal / noise),
        loss,
    )


@pytest.fixture(scope="module")
def report():
    return quality_report(fn, PARAMS, quantize_params(PARAMS, RULES), BATCHES, target=0.04)


def test_figures_are_those_of_float64(report):
    assert report.loss == pytest.approx(1, abs=1e-6)
    for layer in report.layers:
        weight, output, loss = by_hand(layer.path)
        assert layer.weight_sqnr_db == pytest.approx(weight, abs=0.02)
        assert layer.output_sqnr_db == pytest.approx(output, abs=0.02)
        assert layer.loss_increase == pytest.approx(loss, rel=1e-3)
        assert (layer.nbytes, layer.nbytes_before) == (512 + 4, 2048)


def test_worst_comes_first_and_is_kept(report):
    assert [layer.path for layer in report.layers] == ["rough", "smooth"]
    assert report.quantized_loss / report.loss - 1 > 0.04 > report.layers[1].loss_increase
    assert report.keep == ("rough",) and report.target == 0.04
    assert report.kept_loss / report.loss - 1 <= 0.04
    assert report.nbytes_before == 2 * 2048 + 128
    assert report.nbytes == 1024 + 516 + 128
    finer = quality_report(
        fn,
        PARAMS,
        quantize_params(PARAMS, [WeightRule("rough|smooth", PerChannel(-1))]),
        BATCHES,
        target=0.1,
    )
    assert (
        finer.keep == () and finer.kept_loss == finer.quantized_loss < 1.1 < report.quantized_loss
    )


def test_all_is_kept_where_the_target_is_no_loss_at_all():
    report = quality_report(fn, PARAMS, quantize_params(PARAMS, RULES), BATCHES, target=0.0)
    assert sorted(report.keep) == ["rough", "smooth"]


def test_it_is_read_as_a_table_as_data_and_as_a_plot(report):
    text = str(report)
    assert "2 weights in FP8: loss" in text and "keep in bfloat16: rough" in text
    assert text.index("rough") < text.index("smooth")
    assert json.loads(report.to_json())["layers"][0]["path"] == "rough"
    axes = plots.plot_quality(report)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rough (keep)", "smooth"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(
        [layer.weight_sqnr_db for layer in report.layers]
        + [layer.output_sqnr_db for layer in report.layers]
    )


@pytest.mark.parametrize(
    "arguments, options, error, text",
    [
        (
            (fn, PARAMS, quantize_params(PARAMS, RULES), []),
            {},
            ValueError,
            "batches must hold at least one tuple",
        ),
        (
            (fn, PARAMS, quantize_params(PARAMS, RULES), [jnp.ones((2, 4))]),
            {},
            TypeError,
            "batches must be tuples of arguments, one for each pass; got .* among them",
        ),
        (
            (fn, PARAMS, PARAMS, BATCHES),
            {},
            ValueError,
            "quantized must hold an Fp8Tensor; got none",
        ),
        (
            (
                fn,
                PARAMS,
                quantize_params({"rough": PARAMS["rough"]}, [WeightRule("rough")]),
                BATCHES,
            ),
            {},
            ValueError,
            "quantized must be params",
        ),
        (
            (lambda p, x: x.sum(), PARAMS, quantize_params(PARAMS, RULES), BATCHES),
            {},
            TypeError,
            "fn must return a pair of a scalar loss",
        ),
        (
            (lambda p, x: (x.sum(), ()), PARAMS, quantize_params(PARAMS, RULES), BATCHES),
            {},
            TypeError,
            r"outputs of fn must hold an array.*got \(\)\.",
        ),
        (
            (lambda p, x: (x.sum() * jnp.nan, x), PARAMS, quantize_params(PARAMS, RULES), BATCHES),
            {},
            ValueError,
            "finite loss.*nothing quantized",
        ),
        (
            (fn, PARAMS, quantize_params(PARAMS, RULES), BATCHES),
            {"target": -1},
            ValueError,
            "target must be a relative increase.*got -1",
        ),
    ],
)
def test_bad_input_is_refused(arguments, options, error, text):
    with pytest.raises(error, match=text):
        quality_report(*arguments, **options)
