"""What a scan of a checkpoint says: a table, sentences, and the page with what it recovered on photos."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from ..data.images import ImagePreprocessor
from ..evaluation.pixels import pixel_batches
from ..scanning.checkpoint import CheckpointScan, Finding, drawn_rows
from ..scanning.inversion import FAMILIES
from ..wording import shortened
from .html import picture, templates
from .page import check_report_extra

#: Candidates of a table, candidates with pictures, photos of each, and characters of a name.
ROWS, SHOWN, PHOTOS, NAME = 10, 5, 5, 60
#: Pixels of the longer side of a picture.
_SIDE = 128
#: What is known of false alarms, without a base and with one. docs/scanning-checkpoints.md has the figures.
FALSE_ALARMS = (
    "Of eight models of digits that were never poisoned, one reached the threshold: their highest scores were 2.55, "
    "1.80 and 1.74. How often other models do is not known.",
    "How often models that were never poisoned reach the threshold against their base is not known.",
)
#: What is known to escape, one entry a kind.
ESCAPES = (
    "Warps: they move pixels, which none of the three families does.",
    "Optimized patches such as BadCLIP's. They are close to what the model says of the target anyway.",
    "Triggers on words, targeted poisons, and backdoors whose target is not among the candidates.",
    "Many targets in one model, without a base: they hide each other in the median.",
)


def scan_table(scan: CheckpointScan) -> list[list[str]]:
    """A heading, and a row for each of the most suspect candidates: score, then lead and success by family."""
    names = scan.settings["families"]
    rows = [["candidate", "score", *(f"{name} {what}" for name in names for what in ("lead", "success"))]]
    for finding in scan.findings[:ROWS]:
        cells = []
        for name in names:
            found = finding.families[name]
            cells += [f"{found.lead:+.2f}", f"{found.success:.0%}"]
        rows.append([shortened(finding.name, NAME), f"{finding.score:.2f}", *cells])
    return rows


def scan_statements(scan: CheckpointScan) -> list[str]:
    """What the figures say, in sentences. None of them calls a model clean."""
    first, standing = scan.findings[0], scan.standing_out
    usual = "the base's" if scan.with_base else "the median candidate's"
    said = []
    for finding in standing[:SHOWN]:
        said.append(
            f"“{shortened(finding.name, NAME)}” stands out: its score is {finding.score:.2f}, and the threshold is "
            f"{scan.threshold:.2f}. On average the loss of its perturbations is {_times(finding)} times below {usual}."
        )
    if len(standing) > SHOWN:
        said.append(f"{len(standing) - SHOWN} more candidates stand out.")
    if not standing:
        said.append(
            f"No candidate reaches the threshold of {scan.threshold:.2f}. “{shortened(first.name, NAME)}” is the "
            f"first, with {first.score:.2f}."
        )
    others = [finding.score for finding in scan.measured if finding not in standing]
    if standing and others:
        said.append(f"The first of the others has {max(others):.2f}.")
    said.append(
        f"Of photos without a trigger the model is {scan.certainty:.0%} certain what to call them, on average. "
        "Prompts unlike the captions that it learned make this low and hide a backdoor: try others (--template), or "
        "clusters of captions (--clusters)."
    )
    said.append(FALSE_ALARMS[scan.with_base])
    said.append("This does not show that a model is clean: the scan misses some kinds of triggers.")
    return said


def render_checkpoint_scan(scan: CheckpointScan, images: Any, processor: Any, image_column: str = "image") -> str:
    """
    The page of a scan as HTML, in one file that loads nothing.

    Args:
        scan ([`CheckpointScan`]): Of [`scan_checkpoint`].
        images (map-style dataset), image_column (`str`): That were scanned.
        processor (`ProcessorMixin`): Of the model.

    Raises:
        `ModuleNotFoundError`: Without the extra `report`.
    """
    check_report_extra()
    few = drawn_rows(len(images), scan.settings["seed"])[:PHOTOS]
    preprocess = ImagePreprocessor(processor.image_processor)
    (pixels,) = next(pixel_batches(images, image_column, preprocess, [None], [few]))
    photos = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    items = []
    for finding in [finding for finding in scan.findings if finding.name in scan.triggers][:SHOWN]:
        rows = [
            {
                "family": family,
                "found": finding.families[family],
                "trigger": _small(trigger.picture()),
                "photos": [_small(trigger(photo)) for photo in photos],
            }
            for family, trigger in scan.triggers[finding.name].items()
        ]
        items.append({"finding": finding, "name": shortened(finding.name, NAME), "rows": rows})
    return (
        templates(autoescape=True)
        .get_template("checkpoint_scan.html.j2")
        .render(
            scan=scan,
            statements=scan_statements(scan),
            table=scan_table(scan),
            items=items,
            clean=[_small(photo) for photo in photos],
            families={name: FAMILIES[name].finds for name in scan.settings["families"]},
            escapes=ESCAPES,
        )
    )


def _times(finding: Finding) -> str:
    """By how much the losses are lower, the geometric mean of the families."""
    return f"{math.exp(finding.score / len(finding.families)):.1f}"


def _small(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE))
    return picture(image)
