"""Accuracy and the success of attacks over training: what is drawn of it on a page, and as the picture of a card."""

from __future__ import annotations

import importlib.util
from functools import partial
from io import BytesIO

from PIL import Image

from ..methods import Line
from ..record import RunRecord
from .facts import Facts, evaluations_of, facts_of
from .plots import CoursePanel, draw_course, drawn


def course_panels(facts: Facts, label: str = "") -> list[CoursePanel]:
    """
    A panel for each attack, with the accuracy; without attacks, one of the accuracy; none of a single evaluation.

    Args:
        facts ([`Facts`]): Of the run.
        label (`str`): What to call the run, where it is one of several.
    """
    points = evaluations_of(facts.record)
    if len(points) < 2:
        return []
    accuracy = [Line(name, "accuracy on clean images", "clean") for _, name in facts.accuracies[:1]]
    panels = []
    for attack in facts.attacks:
        lines = [*accuracy, Line(attack.success, "attack success rate", "attack")]
        right = attack.success.replace("attack_success_rate", "triggered_accuracy")
        if right != attack.success and right in attack.measure.figures:
            lines.append(Line(right, "accuracy in spite of the trigger", "target"))
        several = len(facts.attacks) > 1 or not label
        title = f"{label}: {attack.short}" if label and several else label or attack.short
        panels.append(CoursePanel(title, lines, points))
    return panels or ([CoursePanel(label, accuracy, points)] if accuracy else [])


def course_text(panels: list[CoursePanel]) -> str:
    """The same in words: where each line starts and where it ends."""
    spans = []
    for panel in panels:
        for line in panel.lines:
            ends = (panel.points[place].numbers.get(line.name) for place in (0, -1))
            first, last = (f"{value:.1%}" if value is not None else "not measured" for value in ends)
            spans.append(f"{f'{panel.title}, ' if panel.title else ''}{line.label} from {first} to {last}")
    return f"Line charts over training: {'; '.join(spans)}."


def draw_picture(record: RunRecord) -> bytes | None:
    """
    What [`course_panels`] has of attacks, as a PNG with a white background.

    Returns:
        `bytes`, or `None` if no attack was measured at two steps or more, or without matplotlib.
    """
    facts = facts_of(record)
    panels = course_panels(facts) if facts.attacks else []
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return None
    plot = Image.open(BytesIO(drawn(partial(draw_course, panels), "light"))).convert("RGBA")
    # The Hub has dark pages too, on which dark text on a transparent ground cannot be read.
    flat = Image.new("RGBA", plot.size, "white")
    flat.alpha_composite(plot)
    buffer = BytesIO()
    flat.convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
