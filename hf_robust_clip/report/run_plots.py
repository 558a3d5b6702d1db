"""The plots of a run's report: its figures, its losses, and RoCLIP's matches, over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from ..record import Evaluation, Logged
from .plots import COLUMNS, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of a line that get a marker each; with more, markers would hide the line.
MARKED = 40


class Line(NamedTuple):
    """A figure over training: its name in the entries, its label, and how it is drawn."""

    name: str
    label: str
    colour: str
    marker: str
    dash: str


class CoursePanel(NamedTuple):
    """A panel of [`draw_course`]: figures that are shares in [0, 1]."""

    title: str
    lines: Sequence[Line]


def draw_course(panels: Sequence[CoursePanel], points: Sequence[Evaluation], colours: Mapping[str, str]) -> Figure:
    """
    Figures over training.

    Args:
        panels (sequence of [`CoursePanel`]): What to draw.
        points (sequence of [`Evaluation`]): When they were measured.
        colours (mapping): Of the theme.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, columns = -(-len(panels) // COLUMNS), min(len(panels), COLUMNS)
    figure = Figure(figsize=(9, 0.6 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for line in panel.lines:
            _draw_line(axis, points, line, colours, scale=100)
        axis.set_title(plain(panel.title), loc="left")
        axis.grid(True, axis="y", lw=0.6)
    axes[0, 0].set_ylim(-3, 103)
    for axis in axes[:, 0]:
        axis.set_ylabel("%")
    for number, axis in enumerate(axes.flat[: len(panels)]):
        if number + columns >= len(panels):  # none below it
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=points[-1].epoch >= 2))
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
    lines = [Line("loss", "loss", "text", "", "-")] if len(terms) != 1 else []
    styles = cycle([(colour, dash) for dash in ("-", "--", ":") for colour in ("clean", "attack", "target")])
    lines += [
        Line(name, name.replace("_", " "), colour, ".", dash)
        for name, (colour, dash) in zip(terms, styles, strict=False)  # endless
    ]
    for line in lines:
        # Phases have terms of their own: no line across the stretches of training without one.
        _draw_line(losses, log, line, colours, across=False)
    _draw_line(rate, log, Line("learning_rate", "", "text", "", "-"), colours)
    losses.set_title("Loss", loc="left")
    rate.set_title("Learning rate", loc="left")
    for axis in (losses, rate):
        axis.set_xlabel("epoch")
        axis.grid(True, axis="y", lw=0.6)
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    _legend(figure, [losses])
    return figure


def draw_match_log(log: Sequence[Logged], colours: Mapping[str, str]) -> Figure:
    """RoCLIP's log: how similar pairs and matches are, and how many are matched with what, over training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    similarities, matches = figure.subplots(1, 2, sharex=True)
    told = any("poisoned_pair_similarity" in entry.numbers for entry in log)
    pairs = [Line("pair_similarity", "all pairs", "clean", "o", "-")]
    if told:
        pairs = [
            Line("clean_pair_similarity", "clean pairs", "clean", "o", "-"),
            Line("poisoned_pair_similarity", "poisoned pairs", "attack", "s", "--"),
        ]
    left = [*pairs, Line("match_similarity", "images and what they are matched with", "target", "^", ":")]
    right = [
        Line("distinct_matches", "different matches in a batch", "clean", "o", "-"),
        Line("largest_match_share", "share of the most popular match", "target", "^", ":"),
    ]
    if any("poisoned_match_adversarial" in entry.numbers for entry in log):
        right.append(
            Line(
                "poisoned_match_adversarial",
                "poisoned images matched with their adversarial class",
                "attack",
                "s",
                "--",
            )
        )
    for axis, lines, title, scale in (
        (similarities, left, "Cosine similarity", 1),
        (matches, right, "Matches, %", 100),
    ):
        _shade_matching(axis, log, colours)
        for line in lines:
            _draw_line(axis, log, line, colours, scale)
        axis.set_title(title, loc="left")
        axis.set_xlabel("epoch")
        axis.grid(True, axis="y", lw=0.6)
    matches.set_ylim(-3, 103)
    _legend(figure, [similarities, matches], columns=2)
    return figure


def _shade_matching(axis: Axes, log: Sequence[Logged], colours: Mapping[str, str]) -> None:
    """Shade the stretches of training that had matching steps."""
    start, label = 0.0, "with matching"
    for entry in log:
        if "match_similarity" in entry.numbers:
            axis.axvspan(start, entry.epoch, color=colours["grid"], alpha=0.55, lw=0, label=label)
            label = "_"  # in the legend once
        start = entry.epoch


def _draw_line(
    axis: Axes,
    entries: Sequence[Logged],
    line: Line,
    colours: Mapping[str, str],
    scale: float = 1,
    across: bool = True,
) -> None:
    """A figure of those entries that have it, `across` those that have not; nothing where none has."""
    having = [entry for entry in entries if entry.numbers.get(line.name) is not None]
    if not having:
        return
    drawn = having if across else entries
    axis.plot(
        [entry.epoch for entry in drawn],
        [math.nan if (value := entry.numbers.get(line.name)) is None else scale * value for entry in drawn],
        line.dash,
        marker=line.marker if len(having) <= MARKED or not across else "",
        ms=4,
        lw=1.8,
        color=colours[line.colour],
        label=line.label,
    )


def _legend(figure: Figure, axes: Any, columns: int = 3) -> None:
    """One legend for several panels, each label once."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        labels = [plain(label) for label in entries]
        figure.legend(entries.values(), labels, loc="outside lower center", ncols=columns, frameon=False)
