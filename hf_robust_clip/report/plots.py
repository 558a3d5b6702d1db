"""The report's plots of every run, and how a plot gets a light and a dark face."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .html import data_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 170
#: Panels side by side.
COLUMNS = 3
#: Okabe and Ito's palette, which colour-blind readers tell apart, in its darker and its lighter hues.
THEMES = {
    "light": {"text": "#24292f", "grid": "#d0d7de", "clean": "#0072b2", "attack": "#d55e00", "target": "#009e73"},
    "dark": {"text": "#e2e6ea", "grid": "#3d444d", "clean": "#56b4e9", "attack": "#e69f00", "target": "#00b888"},
}


class EmbeddingPanel(NamedTuple):
    """
    A panel of [`draw_embeddings`].

    `title`; `clean` and `triggered`, embeddings `(N, D)` of the same images; `is_target (N,)`, bool: which of them are
    of the target class.
    """

    title: str
    clean: np.ndarray
    triggered: np.ndarray
    is_target: np.ndarray


def themed(draw: Callable[[Mapping[str, str]], Figure]) -> dict[str, str]:
    """The figure that `draw(colours)` returns, as data URIs for a light and for a dark page."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    images = {}
    for theme, colours in THEMES.items():
        settings: Any = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["text"]),
            **dict.fromkeys(("grid.color", "axes.edgecolor"), colours["grid"]),
            **{"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False},
        }
        with matplotlib.rc_context(settings):
            figure = draw(colours)
            buffer = BytesIO()
            FigureCanvasAgg(figure)
            figure.savefig(buffer, format="png", dpi=DPI, transparent=True, metadata={"Software": None})
        images[theme] = data_uri(buffer.getvalue(), "image/png")
    return images


def plain(text: str) -> str:
    """A text in which a dollar sign starts no formula."""
    return text.replace("$", r"\$")


def draw_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], models: Mapping[str, str], colours: Mapping[str, str]
) -> Figure:
    """Clean accuracy and attack success after each epoch: a panel for each training."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    titles = {**models, "poisoned": "Pre-training on poisoned pairs" if "finetuned" in models else "Undefended"}
    # As wide as it is long, but a narrow panel would not hold its title.
    lengths = [max(curves[model][-1]["epoch"], 1) for model in models]
    widths = [max(length, 0.5 * max(lengths)) for length in lengths] if len(models) <= COLUMNS else None
    rows = -(-len(models) // COLUMNS)
    figure = Figure(figsize=(9, 0.5 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, min(len(models), COLUMNS), sharey=True, width_ratios=widths, squeeze=False).ravel()
    for panel, model in zip(panels, models, strict=True):
        epochs = [point["epoch"] for point in curves[model]]
        for measure, label, colour, marker, dash in (
            ("clean_accuracy", "clean accuracy", "clean", "o", "-"),
            ("attack_success_rate", "attack success rate", "attack", "s", "--"),
        ):
            values = [100 * point[measure] for point in curves[model]]
            panel.plot(epochs, values, dash, marker=marker, ms=4, lw=1.8, color=colours[colour], label=label)
        panel.set_title(titles[model], loc="left")
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(True, axis="y", lw=0.6)
    panels[0].set_ylim(-3, 103)
    for first in range(0, rows * COLUMNS, COLUMNS):
        panels[first].set_ylabel("% of test images")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_embeddings(panels: Sequence[EmbeddingPanel], target_label: str, colours: Mapping[str, str]) -> Figure:
    """Images' embeddings in the plane in which they spread most, a plane for each panel."""
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    rows, columns = -(-len(panels) // COLUMNS), min(len(panels), COLUMNS)
    figure = Figure(figsize=(9, 0.5 + 3.5 * rows), layout="constrained")
    # On one scale, or a model that the trigger hardly moves would look like one that it moves far.
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, clean, triggered, is_target) in zip(axes, panels, strict=False):
        plane = PCA(n_components=2, svd_solver="full").fit(np.concatenate([clean, triggered]))
        for points, label, colour, marker in (
            (clean[~is_target], "other classes", "clean", "o"),
            (clean[is_target], target_label, "target", "s"),
            (triggered[~is_target], "other classes with the trigger", "attack", "x"),
        ):
            x, y = plane.transform(points).T if len(points) else np.zeros((2, 0))
            style: Any = {"s": 13, "marker": marker, "lw": 0.9, "alpha": 0.6, "color": colours[colour]}
            axis.scatter(x, y, label=plain(label), **style)
        shares = plane.explained_variance_ratio_
        axis.set_title(plain(title), loc="left")
        axis.set_xlabel(f"component 1 ({shares[0]:.0%}) across, 2 ({shares[1]:.0%}) up")
        axis.set_box_aspect(1)
    reach = 1.04 * max(abs(limit) for limit in (*axes[0].get_xlim(), *axes[0].get_ylim()))
    axes[0].locator_params(nbins=5)
    axes[0].set(xlim=(-reach, reach), ylim=(-reach, reach))
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, markerscale=1.6)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure
