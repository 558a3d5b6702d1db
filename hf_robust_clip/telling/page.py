"""The page of any run: its record and the trainer's pictures, as HTML that loads nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..columns import naming
from ..record import Logged, Measured, RunRecord, checked
from .facts import Attack, Facts, defence_of, facts_of
from .html import data_uri, picture, templates
from .picture import course_panels, course_text
from .plots import EmbeddingPanel, draw_course, draw_embeddings, draw_losses, draw_series, series_text, themed
from .sentences import statements
from .split_plots import draw_splits
from .tables import course_table, figure_groups, settings, summary

if TYPE_CHECKING:
    import markupsafe


class MatchedPair(NamedTuple):
    """A training pair, poisoned or not (`None`: unknown), and the caption of the pool that it is matched with."""

    image: Image.Image
    caption: str
    matched: str
    poisoned: bool | None


class TriggeredImage(NamedTuple):
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


class AttackPictures(NamedTuple):
    """
    What an attack looks like: a few images that are not of the target class, what their differences were multiplied
    with to be seen, and the embeddings `(N, D)` of test images, as they are and with the trigger. `is_target (N,)`,
    bool, says which of these are of the target class.
    """

    images: Sequence[TriggeredImage]
    amplification: float
    clean: np.ndarray
    triggered: np.ndarray
    is_target: np.ndarray


class RunPictures(NamedTuple):
    """
    What a report shows that takes the model and the data, not the record alone: attacks by the name of their success
    rate, a few training pairs with their matches, if the defence matches, and the defence's own pictures by name.
    """

    attacks: Mapping[str, AttackPictures] = {}
    matches: Sequence[MatchedPair] = ()
    own: Mapping[str, Image.Image] = {}


class Control(NamedTuple):
    """Another run to compare with, and what it is, in a few words."""

    label: str
    record: RunRecord
    pictures: RunPictures | None = None


class PoisonedPair(NamedTuple):
    """A poisoned training pair: its image with the trigger, its caption before and after."""

    image: Image.Image
    caption_before: str
    caption: str


class Study(NamedTuple):
    """
    The experiment that a run is part of: what was done, in order; what it does not show; a few training pairs; and in
    the banner what a reader must know first.
    """

    title: str
    steps: Sequence[str]
    limits: Sequence[str]
    pairs: Sequence[PoisonedPair] = ()
    banner: str | None = None


def check_report_extra() -> None:
    """Raise `ModuleNotFoundError` with the way to install it unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "the report needs matplotlib, not installed here: pip install 'hf-robust-clip[report]'"
        )


def run_facts(record: RunRecord, controls: Sequence[Control] = ()) -> Facts:
    """
    The facts of a run and its controls.

    A control with the metrics from before training is where training started from, which has a column already.
    """
    others = [control for control in controls if control.record.after and control.record.after != record.before]
    measured = [{"control": c.label, "measures": c.record.measures, "figures": c.record.after} for c in others]
    return facts_of(record, [checked(Measured, entry, "controls") for entry in measured])


def render_run_report(
    record: RunRecord,
    pictures: RunPictures | None = None,
    controls: Sequence[Control] = (),
    study: Study | None = None,
) -> str:
    """
    The report of a run as HTML, in one file: images, styles and the record itself are within.

    Args:
        record ([`RunRecord`]): What was done and what came out.
        pictures ([`RunPictures`], *optional*): What the record does not hold; without them the page says what is
            missing.
        controls (sequence of [`Control`]): Other runs, whose metrics stand next to those of this one.
        study ([`Study`], *optional*): The experiment that these runs make.
    """
    facts = run_facts(record, controls)
    used = facts.method
    model = record.model.name or f"a model of {record.model.parameters / 1e6:.3g} million parameters"
    title = f"Training of {model} without a defence" if used.kind == "none" else f"{used.name} on {model}"
    panels = [panel for control in controls for panel in course_panels(facts_of(control.record), control.label)]
    panels = [*panels, *course_panels(facts, used.name if panels else "")]
    said = statements(facts)
    environment = templates(autoescape=True)  # by file name it would pass over the ending .j2
    environment.filters["breakable"] = _breakable
    return environment.get_template("run_report.html.j2").render(
        title=study.title if study else title,
        method=used,
        study=study,
        pairs=[{"image": picture(pair.image), "pair": pair} for pair in study.pairs] if study else [],
        headlines=[statement.text for statement in said if statement.kind == "gap"],
        download=data_uri(record.to_json().encode(), "application/json"),
        findings=[statement for statement in said if statement.kind != "gap"],
        columns=[column.label for column in facts.columns],
        groups=figure_groups(facts),
        guessed_before=facts.before is not None and facts.before.guesses(),
        course_plot=themed(partial(draw_course, panels)) if panels else None,
        course_alt=course_text(panels),
        course_table=course_table(facts),
        unmeasured=facts.unmeasured,
        facts=summary(record),
        settings=settings(record),
        **_attacks(facts, pictures, controls),
        **_defence(record, pictures),
        loss_plot=themed(partial(draw_losses, record.log)) if record.log else None,
    )


def _attacks(facts: Facts, pictures: RunPictures | None, controls: Sequence[Control]) -> dict[str, Any]:
    """The triggers, what the models call their images, and where these move them; of this run, after its controls."""
    runs = [*((control.label, control.pictures) for control in controls), (facts.method.name, pictures)]
    shown = [
        (
            attack,
            [(label, made.attacks[attack.success]) for label, made in runs if made and attack.success in made.attacks],
        )
        for attack in facts.attacks
        if pictures is not None and attack.success in pictures.attacks
    ]
    panels = [
        EmbeddingPanel(_panel_title(attack, label, facts, made), found.clean, found.triggered, found.is_target)
        for attack, made in shown
        for label, found in made
    ]
    return {
        "attacks": [
            {
                "number": attack.number,
                "title": attack.title,
                "target": attack.measure.target,
                "amplification": made[-1][1].amplification,
                "images": [
                    {
                        "name": image.name,
                        **{face: picture(getattr(image, face)) for face in ("clean", "triggered", "difference")},
                    }
                    for image in made[-1][1].images
                ],
                "called": [
                    (
                        f"{label}, {face}" if len(made) > 1 else f"Called, {face}",
                        [getattr(image, f"called_{face}") for image in found.images],
                    )
                    for label, found in made
                    for face in ("clean", "triggered")
                ],
            }
            for attack, made in shown
        ],
        "embedding_plot": themed(partial(draw_embeddings, panels, "the target class")) if panels else None,
        "embedded": max((len(panel.clean) for panel in panels), default=0),
        "no_pictures": _why_missing(pictures, "none of the evaluators is an AttackSuccessEvaluator."),
    }


def _panel_title(attack: Attack, label: str, facts: Facts, made: Sequence[Any]) -> str:
    several = [label] if len(made) > 1 else []
    return ": ".join([*several, *([attack.short] if len(facts.attacks) > 1 or not several else [])])


def _matches(matches: Sequence[MatchedPair], targets: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs and their matches as the template draws them; targets are words that adversarial captions contain."""
    named = [naming(target) for target in targets if target.split()]
    return [
        {
            "image": picture(match.image),
            "match": match,
            # A clean pair that meets a caption of the target class has met no trap.
            "hijacked": match.poisoned is True and any(names(match.matched) for names in named),
        }
        for match in matches
    ]


def _defence(record: RunRecord, pictures: RunPictures | None) -> dict[str, Any]:
    """What the defence has drawn of its training, its splits, and what its pool matches pairs with."""
    defence, splits = defence_of(record), record.details.splits or []
    series = defence.series if defence is not None else None
    entries: Sequence[Logged] = record.log
    if series is not None and series.source != "log":
        found = record.details.model_dump().get(series.source) or []
        entries = [Logged.model_validate(_numbers(entry)) for entry in found]
    phrase = record.defence.get("adversarial_phrase")
    targets = [phrase] if phrase else [measure.target for measure in record.measures if measure.target]
    return {
        "series": series,
        "series_plot": themed(partial(draw_series, series, entries)) if series and entries else None,
        "series_alt": series_text(series) if series else "",
        "splits_plot": themed(partial(draw_splits, splits)) if splits else None,
        "poisons_known": any(any(split.histogram.poisoned) for split in splits),
        "own_pictures": {} if pictures is None else {name: picture(image) for name, image in pictures.own.items()},
        "matching": record.defence.get("matching"),
        "matches": [] if pictures is None else _matches(pictures.matches, targets),
        "no_matches": _why_missing(
            pictures, "the pool was empty, or its captions are not rows of a dataset that can be read again."
        ),
    }


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is None or isinstance(value, int | float)}


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
