"""The plots of runs, and how a plot gets a light and a dark face."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..methods import Line, Series
from ..record import Evaluation, Logged
from .html import data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 170
#: Panels side by side.
COLUMNS = 3
#: Okabe and Ito's palette, which colour-blind readers tell apart, in its darker and its lighter hues.
THEMES = {
    "light": {"text": "#24292f", "grid": "#d0d7de", "clean": "#0072b2", "attack": "#d55e00", "target": "#009e73"},
    "dark": {"text": "#e2e6ea", "grid": "#3d444d", "clean": "#56b4e9", "attack": "#e69f00", "target": "#00b888"},
}
#: The marker and the dash of a line, by its colour: who cannot tell colours apart can tell these.
STYLES = {"clean": ("o", "-"), "attack": ("s", "--"), "target": ("^", ":"), "text": ("", "-")}
#: Points of a line that get a marker each; with more, markers would hide the line.
MARKED = 40


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


class CoursePanel(NamedTuple):
    """A panel of [`draw_course`]: figures that are shares in [0, 1], and when they were measured."""

    title: str
    lines: Sequence[Line]
    points: Sequence[Evaluation]


def draw_course(panels: Sequence[CoursePanel], colours: Mapping[str, str]) -> Figure:
    """Figures over training, in the colours of a theme."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, columns = -(-len(panels) // COLUMNS), min(len(panels), COLUMNS)
    figure = Figure(figsize=(9, 0.6 + 2.6 * rows), layout="constrained")
    lengths = {panel.points[-1].epoch for panel in panels}
    axes = figure.subplots(rows, columns, sharex=len(lengths) == 1, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for line in panel.lines:
            _draw_line(axis, panel.points, line, colours, scale=100)
        axis.set_title(plain(panel.title), loc="left")
        axis.grid(True, axis="y", lw=0.6)
    axes[0, 0].set_ylim(-3, 103)
    for axis in axes[:, 0]:
        axis.set_ylabel("%")
    for number, axis in enumerate(axes.flat[: len(panels)]):
        if number + columns >= len(panels) or len(lengths) > 1:  # none below it, or one of another length
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=max(lengths) >= 2))
            axis.tick_params(labelbottom=True)
    _legend(figure, axes.flat)
    return figure


def draw_losses(log: Sequence[Logged], colours: Mapping[str, str]) -> Figure:
    """The loss and its terms, and the learning rate, over training."""
    from matplotlib.figure import Figure

    terms = sorted({name for entry in log for name in entry.numbers if name.endswith("_loss")})
    figure = Figure(figsize=(9, 3), layout="constrained")
    losses, rate = figure.subplots(1, 2, sharex=True, width_ratios=(1.9, 1))
    # A loss of one term is that term.
    if len(terms) != 1:
        _draw_line(losses, log, Line("loss", "loss", "text"), colours, across=False)
    styles = cycle([(colour, dash) for dash in ("-", "--", ":") for colour in ("clean", "attack", "target")])
    for name, (colour, dash) in zip(terms, styles, strict=False):  # endless
        # Phases have terms of their own: no line across the stretches of training without one.
        line = Line(name, name.replace("_", " "), colour)
        _draw_line(losses, log, line, colours, across=False, style=(".", dash))
    _draw_line(rate, log, Line("learning_rate", "", "text"), colours)
    losses.set_title("Loss", loc="left")
    rate.set_title("Learning rate", loc="left")
    for axis in (losses, rate):
        axis.set_xlabel("epoch")
        axis.grid(True, axis="y", lw=0.6)
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    _legend(figure, [losses])
    return figure


def draw_series(series: Series, entries: Sequence[Logged], colours: Mapping[str, str]) -> Figure:
    """What a defence has drawn of its training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(series.panels), sharex=True, squeeze=False)[0]
    for axis, panel in zip(axes, series.panels, strict=True):
        _shade(axis, entries, series.shaded, colours)
        for line in panel.lines:
            _draw_line(axis, entries, line, colours, scale=100 if panel.percent else 1)
        if panel.percent:
            axis.set_ylim(-3, 103)
        axis.set_title(panel.title, loc="left")
        axis.set_xlabel("epoch")
        axis.grid(True, axis="y", lw=0.6)
    _legend(figure, axes, columns=2)
    return figure


def series_text(series: Series) -> str:
    """The same in words."""
    panels = (f"{panel.title}: {', '.join(line.label for line in panel.lines)}" for panel in series.panels)
    return f"Line charts over training: {'; '.join(panels)}."


def _shade(axis: Axes, entries: Sequence[Logged], name: str, colours: Mapping[str, str]) -> None:
    """Shade the stretches of training that have a metric."""
    start = 0.0
    for entry in entries:
        if name in entry.numbers:
            axis.axvspan(start, entry.epoch, color=colours["grid"], alpha=0.55, lw=0)
        start = entry.epoch


def _draw_line(
    axis: Axes,
    entries: Sequence[Logged],
    line: Line,
    colours: Mapping[str, str],
    scale: float = 1,
    across: bool = True,
    style: tuple[str, str] | None = None,
) -> None:
    """A figure of those entries that have it, `across` those that have not; nothing where none has."""
    having = [entry for entry in entries if entry.numbers.get(line.name) is not None]
    if not having:
        return
    drawn = having if across else entries
    marker, dash = style or STYLES[line.color]
    axis.plot(
        [entry.epoch for entry in drawn],
        [math.nan if (value := entry.numbers.get(line.name)) is None else scale * value for entry in drawn],
        dash,
        marker=marker if len(having) <= MARKED or not across else "",
        ms=4,
        lw=1.8,
        color=colours[line.color],
        label=line.label,
    )


def _legend(figure: Figure, axes: Any, columns: int = 3) -> None:
    """One legend for several panels, each label once."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        labels = [plain(label) for label in entries]
        figure.legend(entries.values(), labels, loc="outside lower center", ncols=columns, frameon=False)


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
