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
#: Okabe and Ito's palette, which color-blind readers can distinguish, in its darker and its lighter hues.
THEMES = {
    "light": {"text": "#24292f", "grid": "#d0d7de", "clean": "#0072b2", "attack": "#d55e00", "target": "#009e73"},
    "dark": {"text": "#e2e6ea", "grid": "#3d444d", "clean": "#56b4e9", "attack": "#e69f00", "target": "#00b888"},
}
#: The marker and the dash of a line, by its color: whoever cannot distinguish colors can distinguish these.
STYLES = {"clean": ("o", "-"), "attack": ("s", "--"), "target": ("^", ":"), "text": ("", "-")}
#: Points of a line that get a marker each; with more, markers would hide the line.
MARKED = 40


class EmbeddingPanel(NamedTuple):
    """A title, embeddings `(N, D)` of images and of the same with the trigger, and which of them are of the target."""

    title: str
    clean: np.ndarray
    triggered: np.ndarray
    is_target: np.ndarray


Draw = Callable[[Mapping[str, str]], "Figure"]


def drawn(draw: Draw, theme: str) -> bytes:
    """The figure that `draw(colors)` returns, in the colors of a theme, as a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    colors = THEMES[theme]
    settings: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colors["text"]),
        **dict.fromkeys(("grid.color", "axes.edgecolor"), colors["grid"]),
        **{"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False},
    }
    with matplotlib.rc_context(settings):
        figure = draw(colors)
        buffer = BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=DPI, transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def themed(draw: Draw) -> dict[str, str]:
    """The same as data URIs for a light and for a dark page."""
    return {theme: data_uri(drawn(draw, theme), "image/png") for theme in THEMES}


def grid(count: int, head: float, height: float, **shared: Any) -> tuple[Figure, Any]:
    """A figure of so many panels of a height, in inches, below a head; and its axes `(rows, columns)`."""
    from matplotlib.figure import Figure

    rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
    figure = Figure(figsize=(9, head + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def without_formulas(text: str) -> str:
    """A text in which a dollar sign starts no formula."""
    return text.replace("$", r"\$")


class CoursePanel(NamedTuple):
    """A panel of [`draw_course`]: metrics that are shares in [0, 1], and when they were measured."""

    title: str
    lines: Sequence[Line]
    points: Sequence[Evaluation]


def draw_course(panels: Sequence[CoursePanel], colors: Mapping[str, str]) -> Figure:
    """Figures over training, in the colors of a theme."""
    from matplotlib.ticker import MaxNLocator

    lengths = {panel.points[-1].epoch for panel in panels}
    figure, axes = grid(len(panels), 0.6, 2.6, sharex=len(lengths) == 1, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for line in panel.lines:
            _draw_line(axis, panel.points, line, colors, scale=100)
        axis.set_title(without_formulas(panel.title), loc="left")
        axis.grid(True, axis="y", lw=0.6)
    axes[0, 0].set_ylim(-3, 103)
    for axis in axes[:, 0]:
        axis.set_ylabel("%")
    for number, axis in enumerate(axes.flat[: len(panels)]):
        if number + COLUMNS >= len(panels) or len(lengths) > 1:  # none below it, or one of another length
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=max(lengths) >= 2))
            axis.tick_params(labelbottom=True)
    legend(figure, axes.flat)
    return figure


def draw_losses(log: Sequence[Logged], colors: Mapping[str, str]) -> Figure:
    """The loss and its terms, and the learning rate, over training."""
    from matplotlib.figure import Figure

    terms = sorted({name for entry in log for name in entry.numbers if name.endswith("_loss")})
    figure = Figure(figsize=(9, 3), layout="constrained")
    losses, rate = figure.subplots(1, 2, sharex=True, width_ratios=(1.9, 1))
    # A loss of one term is that term.
    if len(terms) != 1:
        _draw_line(losses, log, Line("loss", "loss", "text"), colors, across=False)
    styles = cycle([(color, dash) for dash in ("-", "--", ":") for color in ("clean", "attack", "target")])
    for name, (color, dash) in zip(terms, styles, strict=False):  # endless
        # Phases have terms of their own: no line across the stretches of training without one.
        line = Line(name, name.replace("_", " "), color)
        _draw_line(losses, log, line, colors, across=False, style=(".", dash))
    _draw_line(rate, log, Line("learning_rate", "", "text"), colors)
    losses.set_title("Loss", loc="left")
    rate.set_title("Learning rate", loc="left")
    for axis in (losses, rate):
        axis.set_xlabel("epoch")
        axis.grid(True, axis="y", lw=0.6)
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    legend(figure, [losses])
    return figure


def draw_series(series: Series, entries: Sequence[Logged], colors: Mapping[str, str]) -> Figure:
    """What a defence has drawn of its training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(series.panels), sharex=True, squeeze=False)[0]
    for axis, panel in zip(axes, series.panels, strict=True):
        _shade(axis, entries, series.shaded, colors)
        for line in panel.lines:
            _draw_line(axis, entries, line, colors, scale=100 if panel.percent else 1)
        if panel.percent:
            axis.set_ylim(-3, 103)
        axis.set_title(panel.title, loc="left")
        axis.set_xlabel("epoch")
        axis.grid(True, axis="y", lw=0.6)
    legend(figure, axes, columns=2)
    return figure


def series_text(series: Series) -> str:
    """The same in words."""
    panels = (f"{panel.title}: {', '.join(line.label for line in panel.lines)}" for panel in series.panels)
    return f"Line charts over training: {'; '.join(panels)}."


def _shade(axis: Axes, entries: Sequence[Logged], name: str, colors: Mapping[str, str]) -> None:
    """Shade the stretches of training that have a metric."""
    start = 0.0
    for entry in entries:
        if name in entry.numbers:
            axis.axvspan(start, entry.epoch, color=colors["grid"], alpha=0.55, lw=0)
        start = entry.epoch


def _draw_line(
    axis: Axes,
    entries: Sequence[Logged],
    line: Line,
    colors: Mapping[str, str],
    scale: float = 1,
    across: bool = True,
    style: tuple[str, str] | None = None,
) -> None:
    """A metric of the entries that have it, `across` those that lack it; nothing where all lack it."""
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
        color=colors[line.color],
        label=line.label,
    )


def legend(figure: Figure, axes: Any, columns: int = 3) -> None:
    """One legend for several panels, each label once."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        labels = [without_formulas(label) for label in entries]
        figure.legend(entries.values(), labels, loc="outside lower center", ncols=columns, frameon=False)


def draw_embeddings(panels: Sequence[EmbeddingPanel], target_label: str, colors: Mapping[str, str]) -> Figure:
    """Images' embeddings in the plane in which they spread most, a plane for each panel."""
    from sklearn.decomposition import PCA

    # On one scale, or a model that the trigger hardly moves would look like one that it moves far.
    figure, grid_axes = grid(len(panels), 0.5, 3.5, sharex=True, sharey=True)
    axes = grid_axes.ravel()
    for axis, (title, clean, triggered, is_target) in zip(axes, panels, strict=False):
        plane = PCA(n_components=2, svd_solver="full").fit(np.concatenate([clean, triggered]))
        for points, label, color, marker in (
            (clean[~is_target], "other classes", "clean", "o"),
            (clean[is_target], target_label, "target", "s"),
            (triggered[~is_target], "other classes with the trigger", "attack", "x"),
        ):
            x, y = plane.transform(points).T if len(points) else np.zeros((2, 0))
            style: Any = {"s": 13, "marker": marker, "lw": 0.9, "alpha": 0.6, "color": colors[color]}
            axis.scatter(x, y, label=without_formulas(label), **style)
        shares = plane.explained_variance_ratio_
        axis.set_title(without_formulas(title), loc="left")
        axis.set_xlabel(f"component 1 ({shares[0]:.0%}) across, 2 ({shares[1]:.0%}) up")
        axis.set_box_aspect(1)
    reach = 1.04 * max(abs(limit) for limit in (*axes[0].get_xlim(), *axes[0].get_ylim()))
    axes[0].locator_params(nbins=5)
    axes[0].set(xlim=(-reach, reach), ylim=(-reach, reach))
    handles, labels = axes[0].get_legend_handles_labels()
    box = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, markerscale=1.6)
    for handle in box.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure
