"""The page of any run: what its record says, beside what the trainer's pictures show, as HTML that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..record import RunRecord
from .course_plots import draw_splits, draw_splits_course
from .html import data_uri, picture, templates
from .page import MatchedPair, shown_matches
from .plots import EmbeddingPanel, draw_embeddings, themed
from .run_findings import (
    Attack,
    accuracy_measure,
    attacks_of,
    evaluations_of,
    headlines,
    method,
    run_findings,
    unmeasured,
)
from .run_plots import CoursePanel, Line, draw_course, draw_losses, draw_match_log
from .run_tables import Setting, course_table, defence_settings, facts, figure_groups, figure_text, value_text

if TYPE_CHECKING:
    import markupsafe

#: Longest name of a trigger in a plot.
_TITLE = 30


@dataclass(frozen=True)
class TriggeredImage:
    """
    A test image of class `name` as the model takes it, with and without trigger, what the trigger changes, and what
    the trained model calls both.
    """

    name: str
    clean: Image.Image
    triggered: Image.Image
    difference: Image.Image
    called_clean: str
    called_triggered: str


@dataclass(frozen=True)
class AttackPictures:
    """
    What an attack looks like.

    Args:
        images (sequence of [`TriggeredImage`]): A few images that are not of the target class.
        amplification (`float`): What the differences were multiplied with to be seen.
        clean, triggered (`np.ndarray` of shape `(N, D)`): Embeddings of test images, as they are and with the trigger.
        is_target (`np.ndarray` of shape `(N,)`, bool): Which of them are of the target class.
    """

    images: Sequence[TriggeredImage]
    amplification: float
    clean: np.ndarray
    triggered: np.ndarray
    is_target: np.ndarray


@dataclass(frozen=True)
class RunPictures:
    """
    What a report shows that takes the model and the data, not the record alone.

    Args:
        attacks (mapping of `str` to [`AttackPictures`]): By the name of the attack's success rate.
        matches (sequence of [`MatchedPair`]): A few training pairs and RoCLIP's matches, if it was trained.
    """

    attacks: Mapping[str, AttackPictures] = field(default_factory=dict)
    matches: Sequence[MatchedPair] = ()


def render_run_report(record: RunRecord, pictures: RunPictures | None = None) -> str:
    """
    The report of a run as HTML, in one file: images, styles and the record itself are within.

    Args:
        record ([`RunRecord`]): What was done and what came out.
        pictures ([`RunPictures`], *optional*): What the record does not hold; without them the page says what is
            missing.
    """
    used = method(record)
    model = record.model.name or f"a model of {record.model.parameters / 1e6:.3g} million parameters"
    title = f"Training of {model} without a defence" if used.kind == "none" else f"{used.name} on {model}"
    environment = templates()
    environment.filters["breakable"] = _breakable
    return environment.get_template("run_report.html.j2").render(
        title=title,
        method=used,
        headlines=headlines(record),
        download=data_uri(record.to_json().encode(), "application/json"),
        findings=run_findings(record),
        groups=figure_groups(record),
        course_table=course_table(record),
        unmeasured=unmeasured(record),
        facts=facts(record),
        settings=[
            *defence_settings(record),
            *(Setting(name, value_text(value)) for name, value in record.settings.items()),
        ],
        command=record.environment.command,
        **_course(record),
        **_attacks(record, pictures),
        **_roclip(record, pictures),
        **_safeclip(record),
        loss_plot=themed(partial(draw_losses, record.log)) if record.log else None,
    )


def _course(record: RunRecord) -> dict[str, Any]:
    points, panels = evaluations_of(record), _course_panels(record)
    if len(points) < 2 or not panels:
        return {"course_plot": None, "course_alt": ""}
    spans = [
        f"{line.label} from {figure_text(line.name, points[0].numbers.get(line.name))} to "
        f"{figure_text(line.name, points[-1].numbers.get(line.name))}"
        for panel in panels
        for line in panel.lines
    ]
    return {
        "course_plot": themed(partial(draw_course, panels, points)),
        "course_alt": f"Line charts over training: {'; '.join(spans)}.",
    }


def _course_panels(record: RunRecord) -> list[CoursePanel]:
    """A panel for each attack, with the accuracy; without attacks, one of the accuracy."""
    measure = accuracy_measure(record)
    accuracy = [] if measure is None else [Line(measure.figures[0], "accuracy on clean images", "clean", "o", "-")]
    panels = []
    for attack in attacks_of(record):
        lines = [*accuracy, Line(attack.success, "attack success rate", "attack", "s", "--")]
        right = attack.success.replace("attack_success_rate", "triggered_accuracy")
        if right != attack.success and right in attack.measure.figures:
            lines.append(Line(right, "accuracy in spite of the trigger", "target", "^", ":"))
        panels.append(CoursePanel(_plot_title(attack), lines))
    return panels or ([CoursePanel("", accuracy)] if accuracy else [])


def _plot_title(attack: Attack) -> str:
    """A title that the plots' font can show, and a panel holds."""
    trigger = attack.measure.trigger
    name = trigger.name if trigger else "targeted"
    return f"{attack.number}. {name[:_TITLE]}" if name.isascii() else f"Attack {attack.number}"


def _attacks(record: RunRecord, pictures: RunPictures | None) -> dict[str, Any]:
    given = (
        []
        if pictures is None
        else [
            (attack, pictures.attacks[attack.success])
            for attack in attacks_of(record)
            if attack.success in pictures.attacks
        ]
    )
    panels = [
        EmbeddingPanel(_plot_title(attack), shown.clean, shown.triggered, shown.is_target) for attack, shown in given
    ]
    return {
        "attacks": [
            {
                "number": attack.number,
                "title": attack.title,
                "target": attack.measure.target,
                "amplification": shown.amplification,
                "images": [
                    {
                        **{name: getattr(image, name) for name in ("name", "called_clean", "called_triggered")},
                        **{name: picture(getattr(image, name)) for name in ("clean", "triggered", "difference")},
                    }
                    for image in shown.images
                ],
            }
            for attack, shown in given
        ],
        "embedding_plot": themed(partial(draw_embeddings, panels, "the target class")) if panels else None,
        "embedded": max((len(panel.clean) for panel in panels), default=0),
        "no_pictures": _why_missing(pictures, "none of the evaluators is an AttackSuccessEvaluator."),
    }


def _roclip(record: RunRecord, pictures: RunPictures | None) -> dict[str, Any]:
    phrase = record.defence.get("adversarial_phrase")
    targets = [phrase] if phrase else [measure.target for measure in record.measures if measure.target]
    is_roclip = "matching" in record.defence
    return {
        "is_roclip": is_roclip,
        "match_plot": themed(partial(draw_match_log, record.log)) if is_roclip and record.log else None,
        "matches": [] if pictures is None else shown_matches(pictures.matches, targets),
        "matched_by_caption": record.defence.get("matching") == "unimodal",
        "no_matches": _why_missing(
            pictures, "the pool was empty, or its captions are no rows of a dataset that can be read again."
        ),
    }


def _safeclip(record: RunRecord) -> dict[str, Any]:
    splits = record.details.splits or []
    return {
        "is_safeclip": record.details.splits is not None,
        "splits_plot": themed(partial(draw_splits, splits)) if splits else None,
        "splits_course_plot": themed(partial(draw_splits_course, splits)) if splits else None,
        "poisons_known": any(any(split.histogram.poisoned) for split in splits),
    }


def _breakable(name: str) -> markupsafe.Markup:
    """A name that may go on on the next line after each underscore."""
    import markupsafe

    return markupsafe.Markup("_<wbr>").join(name.split("_"))


def _why_missing(pictures: RunPictures | None, otherwise: str) -> str:
    if pictures is None:
        return (
            "this page was made from the record of the run alone. trainer.save_report() shows it, with model and data."
        )
    return otherwise
