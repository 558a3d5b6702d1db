"""The page of a scan of pairs: groups with their pictures, what each score finds most suspect, duplicates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..columns import captions_of
from ..scanning.found import PairScan, disagrees
from ..wording import shortened
from .html import picture, templates
from .page import check_report_extra
from .plots import grid, themed

#: Groups and duplicates that are shown, members of each and pairs next to them, the most suspect by each score.
GROUPS, COPIES, MEMBERS, FIRST = 12, 12, 12, 12
#: Pixels of the longer side of a picture, and characters of a caption.
_SIDE, _CAPTION = 96, 120
#: Scores with a histogram and a list, and what they are called.
SCORES = {
    "group": "votes of the groups",
    "slof": "local outlier factor (SLOF) of the pooled features",
    "dao": "dimensionality-aware outlier score (DAO)",
    "k_distance": "distance to the 16th neighbor",
    "pair_distance": "distance of image and caption",
}


def render_pair_scan(
    scan: PairScan, dataset: Any, image_column: str = "image", caption_column: str = "caption"
) -> str:
    """
    The page of a scan as HTML, in one file that loads nothing.

    Args:
        scan ([`PairScan`]): Of [`scan_pairs`].
        dataset, image_column, caption_column (`str`): The pairs that were scanned. A stream is read until all pairs
            that are shown have been found.

    Raises:
        `ModuleNotFoundError`: Without the extra `report`.
    """
    check_report_extra()
    values = {name: np.asarray(scan.scores.data.column(name)) for name in SCORES}
    most = {name: np.argsort(-values[name], kind="stable")[:FIRST].tolist() for name in SCORES}
    members = [group.members[:MEMBERS] for group in scan.groups[:GROUPS]]
    others = [_spread(group.others, MEMBERS) for group in scan.groups[:GROUPS]]
    copies = [found.rows[:MEMBERS] for found in scan.duplicates[:COPIES]]
    wanted = {number for numbers in (*members, *others, *copies, *most.values()) for number in numbers}
    pairs: dict[int, dict[str, Any]] = {}
    for number, row in scan.pairs_of(dataset, wanted, image_column, caption_column):
        image = row[image_column].convert("RGB")
        image.thumbnail((_SIDE, _SIDE))
        caption = shortened(" | ".join(captions_of(row[caption_column])), _CAPTION)
        pairs[number] = {"row": number, "image": picture(image), "caption": caption}

    def shown(numbers: Iterable[int]) -> list[dict[str, Any]]:
        return [pairs[number] for number in numbers]

    groups = [
        {"group": group, "members": shown(inside), "others": shown(outside)}
        for group, inside, outside in zip(scan.groups[:GROUPS], members, others, strict=True)
    ]
    duplicates = [
        {"copies": found, "pairs": shown(rows)} for found, rows in zip(scan.duplicates[:COPIES], copies, strict=True)
    ]
    firsts = [{"name": name, "label": label, "pairs": shown(most[name])} for name, label in SCORES.items()]
    environment = templates(autoescape=True)
    return environment.get_template("pair_scan.html.j2").render(
        pairs=len(scan.scores),
        suspect=scan.suspects,
        known=scan.known,
        chance=scan.chance,
        groups=groups,
        duplicates=duplicates,
        disagreeing=sum(map(disagrees, scan.duplicates)),
        suspect_copies=len(scan.disagreeing),
        firsts=firsts,
        histograms=themed(lambda _: _draw_histograms(values)),
    )


def _spread(rows: tuple[int, ...], most: int) -> list[int]:
    """At most so many rows, evenly spaced."""
    if len(rows) <= most:
        return list(rows)
    return [rows[place] for place in np.linspace(0, len(rows) - 1, most).astype(int)]


def _draw_histograms(values: dict[str, np.ndarray]) -> Any:
    figure, axes = grid(len(values), 0.0, 2.2)
    for axis, (name, scores) in zip(axes.flat, values.items(), strict=False):
        axis.hist(scores, bins=60)
        axis.set_yscale("log")
        axis.set_title(name)
    return figure
