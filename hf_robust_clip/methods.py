"""What a defence says of itself: its paper and its limits, what is drawn of its log, what it finds in a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

ANYTHING = (
    "Nobody can measure a trigger that they did not think of: low success of those tried says nothing of others."
)
WORDS = (
    "It was not made against words in captions as triggers; no defence in hf_robust_clip was. ToxicTextCLIP, which "
    "poisons captions, kept {} attack success under it (arXiv 2511.00446)."
)
CONSISTENT = (
    "It does not stop label-consistent poisons, whose caption fits the image: they look like clean pairs, and nothing "
    "in hf_robust_clip stops them."
)
FIRST = (
    "It comes too late for what was learned before {}: what a model has learned of poisons by then it tends to keep."
)


@dataclass(frozen=True)
class Method:
    """
    A method of training.

    Args:
        name (`str`): As the paper writes it.
        what (`str`): What it does, in a sentence or two.
        kind (`str`): `"none"`, no defence; `"fine-tuning"`, which cleans a model that may be poisoned;
            `"pre-training"` on pairs that may be; `"own"`, one that this package does not know.
        limits (`tuple[str, ...]`): What it is known not to stop, and what it costs, a sentence each.
        paper (`str`, *optional*): In a few words, with the arXiv number.
        bibtex (`str`, *optional*): Its entry.
    """

    name: str
    what: str
    kind: str
    limits: tuple[str, ...]
    paper: str | None = None
    bibtex: str | None = None


@dataclass(frozen=True)
class Statement:
    """
    A sentence or two on a run.

    Args:
        kind (`str`): `"gap"`, which says what the metrics do not allow to conclude, `"warning"` or `"result"`.
        head (`str`): Its first words, for whom reads no further.
        rest (`str`): What follows, from its comma or full stop on.
        hint (`str`): What whoever trains can do about it.
    """

    kind: Literal["gap", "warning", "result"]
    head: str
    rest: str
    hint: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.head}{self.rest}{f' {self.hint}' if self.hint else ''}"


class Line(NamedTuple):
    """A metric in a plot: its name, its label, and its color: `"clean"`, `"attack"`, `"target"` or `"text"`."""

    name: str
    label: str
    color: str = "clean"


class Panel(NamedTuple):
    """Metrics that are drawn together, under a title; `percent`: shares in [0, 1], drawn from 0 to 100."""

    title: str
    lines: tuple[Line, ...]
    percent: bool = False


class Series(NamedTuple):
    """
    What a report draws of a defence over training.

    Args:
        heading, caption (`str`): Of the plot.
        panels (`tuple` of [`Panel`]): Side by side.
        source (`str`): The entries that have the metrics: `"log"`, or what the defence's `notes` call a list of them,
            each with its `epoch`.
        shaded (`str`): A metric. The stretches of training that have it are shaded.
        missing (`str`): What stands in the place of the plot where there are no entries.
    """

    heading: str
    caption: str
    panels: tuple[Panel, ...]
    source: str = "log"
    shaded: str = ""
    missing: str = "nothing was logged during training. logging_steps sets how often it is."
