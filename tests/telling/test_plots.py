"""The plots draw what the record says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.records import split

from hf_robust_clip.record import Split
from hf_robust_clip.telling import plots
from hf_robust_clip.telling.split_plots import _coarsened, draw_splits


def splits(*given: dict[str, Any]) -> list[Split]:
    return [Split(**entry) for entry in given]


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (2, 2), (4, 4), (6, 6), (11, 6)])
def test_the_first_and_the_last_split_are_drawn(count, panels):
    figure = draw_splits(splits(*(split(epoch=epoch) for epoch in range(6, 6 + count))), plots.THEMES["light"])
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert len(titles) == panels
    assert "After 6 epochs" in titles[0] and f"After {5 + count} epochs" in titles[-1]
    assert "safe: 25% of the pairs, 75 of 750 poisons" in titles[0]


def test_a_split_without_a_safe_pair_is_drawn():
    nothing: dict[str, Any] = {
        "similarity_threshold": None,
        "safe_share": 0.0,
        "auroc": None,
        "poisons_in_safe_set": None,
    }
    histogram = {"clean": split()["histogram"]["clean"], "poisoned": [0] * 200}
    figure = draw_splits(splits(split(histogram=histogram, **nothing)), plots.THEMES["dark"])
    assert "safe: 0% of the pairs" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize(("first", "last"), [(0, 199), (100, 100), (3, 77), (150, 199)])
def test_no_pair_is_lost_in_coarser_histograms(first, last):
    counts = np.zeros((2, 2, 200), dtype=int)
    counts[:, :, first], counts[:, :, last] = 3, 5
    edges, coarse = _coarsened(counts)
    assert coarse.shape[-1] == len(edges) - 1 <= 50
    assert coarse.sum() == counts.sum()
    for bin_, low in ((first, -1 + first / 100), (last, -1 + last / 100)):
        bar = np.searchsorted(edges, low + 0.005) - 1
        assert coarse[0, 0, bar] >= counts[0, 0, bin_]
