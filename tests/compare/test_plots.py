"""Plots: what must be seen is within the image, apart from its neighbors, and where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from sit.compare import plots

NAME = "FID (digits features, not comparable with Inception FID)"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What a plotting function draws, laid out: its figure."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))

    def draw(plot, *arguments) -> Figure:
        plot(*arguments, tmp_path / "plot.png")
        figures[-1].draw_without_rendering()
        return figures[-1]

    return draw


def test_labels_are_within_the_image(drawn):
    figure = drawn(plots.plot_metric, NAME, {"attention": [(100, 4.0, 0.5), (200, 3.0, 0.5)]})
    box = figure.axes[0].yaxis.label.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    assert figure.axes[0].yaxis.label.get_text().replace("\n", " ") == NAME


def test_error_bars_stand_beside_one_another(drawn):
    curves = {name: [(100, 4.0, 0.5), (150, 3.5, None), (400, 3.0, 0.5)] for name in "abc"}
    axes = drawn(plots.plot_metric, "FID", curves).axes[0]
    at = np.array([container.lines[0].get_xdata() for container in axes.containers])
    assert at.shape == (3, 3) and (np.diff(at, axis=0) > 4).all()
    assert (np.abs(at - [100, 150, 400]) < 25 / 2).all(), "nearer to their own step than to another's"
    np.testing.assert_allclose(at[1], [100, 150, 400])
    once = drawn(plots.plot_metric, "FID", {name: [(100, 4.0, 0.5)] for name in "ab"}).axes[0]
    first, second = (container.lines[0].get_xdata()[0] for container in once.containers)
    assert first < 100 < second


def test_a_smoothed_loss_does_not_lag():
    falling = np.linspace(10, 0, 101)
    np.testing.assert_allclose(plots.smooth(falling, 5), falling, atol=1e-12)
    noisy = falling + np.random.default_rng(0).normal(size=101)
    expected = [noisy[i - min(i, 100 - i, 5) : i + min(i, 100 - i, 5) + 1].mean() for i in range(101)]
    np.testing.assert_allclose(plots.smooth(noisy, 5), expected)
    np.testing.assert_allclose(plots.smooth(noisy, 0), noisy)


def test_a_smoothed_loss_says_so(drawn):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 101)]
    axes = drawn(plots.plot_losses, {"attention": [rows]}).axes[0]
    assert axes.get_title() == "mean of up to 5 logged losses around each step"
    assert len(axes.lines) == 2, "the losses themselves behind it"
    few = drawn(plots.plot_losses, {"attention": [rows[:10]]}).axes[0]
    assert few.get_title() == "" and len(few.lines) == 1
