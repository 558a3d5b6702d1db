"""The plots of the tables and of the checks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")


def plot_figures(variants: Sequence[Mapping[str, Any]], title: str, axis: str, logarithmic: bool, path: Path) -> None:
    """
    Clean accuracy and attack success of the variants: against `x` where they have one, else as bars.

    Args:
        variants (sequence of mappings): With `label`, `line`, `x`, and the lists `accuracy` and `attack_success`.
        title, axis (`str`): What the plot and its axis are called.
        logarithmic (`bool`): Whether that axis is.
        path (`Path`): Of the PNG file.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    placed = [variant for variant in variants if variant["x"] is not None]
    for panel, name, heading in zip(
        panels, ("accuracy", "attack_success"), ("clean accuracy", "attack success"), strict=True
    ):
        panel.set_title(heading, fontsize=10)
        if placed:
            _lines(panel, variants, placed, name)
            panel.set_xlabel(axis)
            if logarithmic:
                panel.set_xscale("log")
                places = sorted({variant["x"] for variant in placed})
                panel.set_xticks(places, [f"{place:g}" for place in places])
                panel.minorticks_off()
        else:
            _bars(panel, variants, name)
        figures, limits = (panel.yaxis, panel.set_ylim) if placed else (panel.xaxis, panel.set_xlim)
        limits(-0.03, 1.03)
        figures.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.grid(axis="y" if placed else "x", alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_table(
    figures: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
    titles: Mapping[str, str],
    accuracy: str,
    path: Path,
) -> None:
    """
    Attack success and accuracy of each row of a table, a panel an attack: dots for the means, small ones for seeds.

    Args:
        figures (mapping): Of (attack, row) to what [`~bench.table.table_figures`] says of it.
        titles (mapping): Of row to what it is called, in order.
        accuracy (`str`): What the accuracy is called.
        path (`Path`): Of the PNG file.
    """
    attacks = list(dict.fromkeys(attack for attack, _ in figures))
    across = min(4, len(attacks))
    down = math.ceil(len(attacks) / across)
    size = (1.6 + 2.6 * across, 0.9 + down * (0.5 + 0.27 * len(titles)))
    plot, panels = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    blue, orange = COLORS[:2]
    for panel, attack in zip(panels.flat, attacks, strict=False):
        for place, row in enumerate(titles):
            shown = figures.get((attack, row))
            if shown is None:
                continue
            if shown["placebos"]:
                panel.plot(shown["placebos"], [place] * 2, color="#cbd5e0", linewidth=6, solid_capstyle="butt")
            panel.plot(shown["interval"], [place] * 2, color=orange, linewidth=1.2)
            for name, color, marker in (("accuracy", blue, "D"), ("success", orange, "o")):
                values = shown[name]
                panel.plot([statistics.mean(values)], [place], marker, color=color, markersize=5)
                if len(values) > 1:
                    panel.plot(values, [place] * len(values), "|", color=color, markersize=7)
        panel.set_title(attack, fontsize=10)
        panel.set_xlim(-0.03, 1.03)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.set_xticks([0, 0.5, 1])
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(titles)), titles.values(), fontsize=9)
        panel.set_ylim(len(titles) - 0.5, -0.5)  # the first one on top
    for panel in panels.flat[len(attacks) :]:
        panel.set_visible(False)
    legend = [
        plt.Line2D([], [], color=blue, marker="D", linestyle="", label=accuracy),
        plt.Line2D([], [], color=orange, marker="o", label="attack success, 95% interval"),
        plt.Line2D([], [], color="#cbd5e0", linewidth=6, label="placebos, lowest to highest"),
    ]
    plot.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    plot.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(plot)


def plot_courses(variants: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """
    Mean similarity of clean and of poisoned pairs over the epochs, a panel a variant, with 5% to 95% of the pairs.

    Args:
        variants (sequence of mappings): With `label` and `course`, the records of one seed's
            [`~hf_robust_clip.PairSimilarityCallback`].
        title (`str`): What the plot is called.
        path (`Path`): Of the PNG file.
    """
    figure, panels = plt.subplots(
        1, len(variants), figsize=(3 * len(variants), 3.4), sharey=True, layout="constrained"
    )
    for panel, variant in zip(panels, variants, strict=True):
        epochs = [record["epoch"] for record in variant["course"]]
        for kind, color in (("clean", COLORS[0]), ("poisoned", COLORS[1])):
            mean, low, high = (
                [record[f"{kind}_similarity{name}"] for record in variant["course"]] for name in ("", "_q05", "_q95")
            )
            panel.plot(epochs, mean, color=color, label=f"{kind} pairs")
            panel.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set_title(variant["label"], fontsize=10)
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("similarity of image and caption")
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(panel: Any, variants: Sequence[Mapping[str, Any]], placed: Sequence[Mapping[str, Any]], name: str) -> None:
    lines = list(dict.fromkeys(variant["line"] for variant in variants))
    for line, color in zip(lines, COLORS, strict=False):
        members = [variant for variant in placed if variant["line"] == line]
        if members:
            panel.plot(
                [v["x"] for v in members], [statistics.mean(v[name]) for v in members], "o-", color=color, label=line
            )
            for member in members:
                panel.plot([member["x"]] * len(member[name]), member[name], ".", color=color, alpha=0.5)
        for variant in variants:
            if variant["line"] == line and variant["x"] is None:
                panel.axhline(statistics.mean(variant[name]), color=color, linestyle="--", label=variant["label"])
    panel.legend(fontsize=8)


def _bars(panel: Any, variants: Sequence[Mapping[str, Any]], name: str) -> None:
    places = range(len(variants))
    panel.barh(places, [statistics.mean(variant[name]) for variant in variants], color=COLORS[0])
    for place, variant in zip(places, variants, strict=True):
        panel.plot(variant[name], [place] * len(variant[name]), ".", color="black")
    panel.set_yticks(places, [variant["label"] for variant in variants], fontsize=8)
    panel.set_ylim(len(variants) - 0.4, -0.6)  # the first one on top
