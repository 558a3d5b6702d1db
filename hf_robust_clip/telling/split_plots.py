"""The plot of the splits that a defence notes down while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..record import Split
from .plots import COLUMNS, grid, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
#: Splits, and bars of a histogram, that are drawn at most.
PANELS, BARS = 6, 50
#: The lower end of a logarithmic axis of counts: one pair is a visible bar.
FLOOR = 0.6


def draw_splits(splits: Sequence[Split], colors: Mapping[str, str]) -> Figure:
    """The similarities of clean and of poisoned pairs at the first, the last and some other splits."""
    shown = [splits[i] for i in np.unique(np.linspace(0, len(splits) - 1, PANELS).round().astype(int))]
    counts = np.array([[split.histogram.clean, split.histogram.poisoned] for split in shown])  # (S, 2, B)
    edges, counts = _coarsened(counts)
    figure, panels = grid(len(shown), 0.6, 2.4, sharex=True, sharey=True)
    for panel, split, (clean, poisoned) in zip(panels.flat, shown, counts, strict=False):
        _draw_split(panel, split, clean, poisoned, edges, colors)
    panels[0, 0].set(yscale="log", ylim=(FLOOR, 2 * counts.max()), xlim=(edges[0], edges[-1]))
    panels[0, 0].yaxis.set_major_formatter("{x:g}")
    panels[0, 0].locator_params(axis="x", nbins=6)
    for panel in panels[:, 0]:
        panel.set_ylabel("pairs (log scale)")
    for panel in panels.flat[max(len(shown) - COLUMNS, 0) : len(shown)]:  # those with none below
        panel.set_xlabel("similarity of image and caption")
        panel.tick_params(labelbottom=True)
    legend(figure, panels.flat, columns=5)
    return figure


def _draw_split(
    panel: Axes, split: Split, clean: np.ndarray, poisoned: np.ndarray, edges: np.ndarray, colors: Mapping[str, str]
) -> None:
    from ..mixture import SimilarityMixture  # scikit-learn, which takes a second

    known = bool(poisoned.any())
    for values, label, color, alpha in (
        (clean, "clean pairs" if known else "pairs", "clean", 0.45),
        *([(poisoned, "poisoned pairs", "attack", 0.85)] if known else ()),
    ):
        heights = np.maximum(values, FLOOR)
        panel.stairs(heights, edges, baseline=FLOOR, fill=True, color=colors[color], alpha=alpha, lw=0, label=label)
    mixture = SimilarityMixture(
        *(
            np.array([getattr(split, f"{part}_{name}") for part in ("risky", "safe")])
            for name in ("mean", "variance", "weight")
        )
    )
    x = np.linspace(edges[0], edges[-1], 400)
    pairs = (clean.sum() + poisoned.sum()) * (edges[1] - edges[0])
    risky, safe = pairs * mixture.density(x)
    for density, label, dash in ((risky, "risky component", "--"), (safe, "safe component", "-")):
        panel.plot(x, np.maximum(density, 1e-9), dash, color=colors["text"], lw=1.1, label=label)
    if split.similarity_threshold is not None:
        panel.axvspan(split.similarity_threshold, edges[-1], color=colors["target"], alpha=0.13, lw=0)
        panel.axvline(split.similarity_threshold, color=colors["target"], lw=1.8, label="safe set, to the right")
    inside = f"safe: {split.safe_share:.0%} of the pairs"
    if split.poisons_in_safe_set is not None:
        inside += f", {round(split.poisons_in_safe_set * poisoned.sum())} of {poisoned.sum()} poisons"
    after = f"After {split.epoch} epoch{'s' if split.epoch != 1 else ''}"
    panel.set_title(f"{after}\n{inside}", loc="left", fontsize=9)


def _coarsened(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts `(..., bars)` of the part of the histograms that holds pairs, in at most `BARS` bars."""
    bins = counts.shape[-1]
    filled = np.flatnonzero(counts.reshape(-1, bins).sum(axis=0))
    first, last = max(filled[0] - 1, 0), min(filled[-1] + 2, bins)
    width = -(-(last - first) // BARS)
    bars = -(-(last - first) // width)
    padded = np.zeros((*counts.shape[:-1], bars * width), dtype=counts.dtype)
    padded[..., : last - first] = counts[..., first:last]
    edges = -1 + 2 / bins * (first + width * np.arange(bars + 1))
    return edges, padded.reshape(*counts.shape[:-1], bars, width).sum(axis=-1)
