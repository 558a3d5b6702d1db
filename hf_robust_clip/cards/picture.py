"""The picture on a card: accuracy and the success of attacks over training."""

from __future__ import annotations

import base64
import importlib.util
from functools import partial
from io import BytesIO

from PIL import Image

from ..record import RunRecord
from ..report.plots import themed
from ..report.run_findings import Attack, accuracy_measure, attacks_of, evaluations_of
from ..report.run_plots import CoursePanel, Line, draw_course
from .figures import attack_text


def draw_picture(record: RunRecord) -> bytes | None:
    """
    Clean accuracy and attack success over a run, a panel for each attack, as a PNG with a white background.

    Returns:
        `bytes`, or `None` if no attack was measured at two steps or more, or without matplotlib.
    """
    panels, points = _panels(record), evaluations_of(record)
    if not panels or len(points) < 2 or importlib.util.find_spec("matplotlib") is None:
        return None
    uri = themed(partial(draw_course, panels, points))["light"]
    drawn = Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA")
    # The Hub has dark pages too, on which dark text on a transparent ground cannot be read.
    flat = Image.new("RGBA", drawn.size, "white")
    flat.alpha_composite(drawn)
    buffer = BytesIO()
    flat.convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def alternative_text(record: RunRecord) -> str:
    """The same in words: where each line starts and where it ends."""
    points = evaluations_of(record)
    ends = [points[0], points[-1]] if points else []
    spans = [
        f"{panel.title}, {line.label} from {values[0]:.1%} to {values[1]:.1%}"
        for panel in _panels(record)
        for line in panel.lines
        if len(values := [value for point in ends if (value := point.numbers.get(line.name)) is not None]) == 2
    ]
    return f"Line charts over training: {'; '.join(spans)}."


def _panels(record: RunRecord) -> list[CoursePanel]:
    measure = accuracy_measure(record)
    accuracy = [] if measure is None else [Line(measure.figures[0], "clean accuracy", "clean", "o", "-")]
    return [
        CoursePanel(_title(attack), [*accuracy, Line(attack.success, "attack success", "attack", "s", "--")])
        for attack in attacks_of(record)
    ]


def _title(attack: Attack) -> str:
    """A title that the plots' font can show, and a panel holds."""
    name = attack_text(attack.measure).partition(" (")[0]
    return f"Attack {attack.number}: {name[:30]}" if name.isascii() else f"Attack {attack.number}"
