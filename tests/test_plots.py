"""Plots: what is drawn is what was given, for one run and two, for sites with and without state,
and saved.
"""

import sys

import numpy as np
import pytest

from fp8jax import plots, recipes
from fp8jax._formats import E4M3, E5M2
from fp8jax._site_scales import SiteScales

CASTS = recipes.delayed().delayed_casts


def lines_by_label(axes):
    return {line.get_label(): line for line in axes.lines}


def site(steps, casts=CASTS):
    leaves = (np.arange(steps, dtype=np.float32) if cast else None for cast in casts)
    zeros = np.zeros((steps, 3), np.float32)
    return SiteScales(*leaves, zeros, None, "mlp/up", casts, zeros[:, 0])


def test_losses_are_drawn_as_given_and_averaged():
    axes = plots.plot_losses({"unquantized": [4.0, 2.0, 1.0], "FP8": [4.0, 3.0]}, window=2)
    assert [list(line.get_ydata()) for line in axes.lines] == [
        [4.0, 2.0, 1.0],
        [4.0, 3.0, 1.5],
        [4.0, 3.0],
        [4.0, 3.5],
    ]
    assert axes.lines[1].get_xdata().tolist() == [1, 2, 3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["unquantized", "FP8"]
    bold = axes.lines[1::2]
    assert len({(line.get_color(), line.get_linestyle()) for line in bold}) == 2


@pytest.mark.parametrize("window", [1, 3, 100])
def test_running_mean_is_the_mean_of_the_latest(window):
    values = np.random.default_rng(0).normal(size=20)
    want = [np.mean(values[max(0, index + 1 - window) : index + 1]) for index in range(20)]
    np.testing.assert_allclose(plots.running_mean(values, window), want, rtol=1e-12)
    assert plots.running_mean([], window).shape == (0,)


def test_gap_is_in_percent_of_the_reference():
    axes = plots.plot_gap([3.0, 1.0], [2.0, 2.0], window=1)
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [50.0, -50.0])


def test_scale_is_drawn_as_the_largest_value_it_can_represent():
    axes = plots.plot_scale([0, -1, 3], [448.0, 448.0, 0.0], E4M3)
    lines = lines_by_label(axes)
    assert lines["scale × 448"].get_ydata().tolist() == [448.0, 224.0, 3584.0]
    amax = lines["amax"].get_ydata()
    assert amax[:2].tolist() == [448.0, 448.0] and np.isnan(amax[2])  # 0 is "nothing observed".
    assert lines["saturated"].get_xdata().tolist() == [2]
    assert "saturated" not in lines_by_label(plots.plot_scale([0], [1.0], E5M2))


def test_drawing_on_given_axes():
    figure = plots.plot_losses({"a": [1.0]}).figure
    axes = figure.add_subplot()
    assert plots.plot_scale([0], [1.0], E5M2, axes=axes) is axes


def test_history_of_one_layer_of_a_stacked_site():
    nodes = [
        SiteScales(
            *(np.float32([step, 10 * step]) for _ in range(3)),
            np.zeros((2, 3), np.float32),
            None,
            "up",
            CASTS,
            np.zeros(2, np.float32),
        )
        for step in range(4)
    ]
    history = plots.stack_history(nodes, layer=1)
    assert history.grad.tolist() == [0.0, 10.0, 20.0, 30.0]
    assert (history.seal.shape, history.site, history.casts) == ((4, 3), "up", CASTS)


def test_training_is_drawn_with_a_row_for_each_site_and_saved(tmp_path):
    losses = {"unquantized": [2.0, 1.0, 1.0], "FP8": [2.0, 1.5, 1.0]}
    figure = plots.plot_training(losses, {"up": (site(3), site(3)), "down": (site(3), site(3))})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:2] == ["Loss", "Gap of the losses"]
    assert titles[2:] == [
        f"{name}: {operand}"
        for name in ("up", "down")
        for operand in ("lhs, E4M3", "rhs, E4M3", "grad, E5M2")
    ]
    figure.savefig(tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_operands_without_state_have_no_panel():
    casts = (CASTS[0], None, CASTS[2])
    figure = plots.plot_training({"FP8": [1.0, 0.5]}, {"up": (site(2, casts), site(2, casts))})
    assert [axes.get_visible() for axes in figure.axes] == [True, True, False, True]


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: plots.running_mean([1.0], 0), r"window must be .* at least 1; got 0\. Use 1"),
        (
            lambda: plots.plot_gap([1.0], [1.0, 2.0]),
            r"losses and reference must have as many steps; got 1 and 2\. Cut",
        ),
        (
            lambda: plots.plot_scale([[0.0]], [[1.0]], E4M3),
            r"one number each per step; got shapes \(1, 1\) .*take one layer",
        ),
        (lambda: plots.plot_scale([0.0], [1.0, 2.0], E4M3), r"got shapes \(1,\) and \(2,\)"),
    ],
)
def test_errors_name_argument_rule_value_and_remedy(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_without_matplotlib_the_error_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fp8jax\[plots\]"'):
        plots.plot_losses({})
