"""The demo's page: what the results say beside what pictures show, as HTML that loads nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..attacks.rows import naming
from ..record import Split
from .course_plots import draw_matching, draw_splits, draw_splits_course
from .findings import TITLES, findings, models_of, results_table
from .html import picture, templates
from .plots import EmbeddingPanel, draw_curves, draw_embeddings, themed


class ModelEmbeddings(NamedTuple):
    """Embeddings of the test images as they are and with the trigger, each `(N, D)`."""

    clean: np.ndarray
    triggered: np.ndarray


@dataclass(frozen=True)
class PoisonedPair:
    """A poisoned training pair: its image with the trigger, its caption before and after."""

    image: Image.Image
    caption_before: str
    caption: str


@dataclass(frozen=True)
class Example:
    """A test image of class `name`, with and without trigger, and what each model calls it with the trigger."""

    name: str
    clean: Image.Image
    triggered: Image.Image
    predictions: Mapping[str, str]


@dataclass(frozen=True)
class MatchedPair:
    """A training pair, poisoned or not (`None`: unknown), and the caption of the pool that RoCLIP matches it with."""

    image: Image.Image
    caption: str
    matched: str
    poisoned: bool | None


@dataclass(frozen=True)
class Pictures:
    """
    What the report shows beside the results.

    Args:
        pairs (sequence of [`PoisonedPair`]): A few training pairs.
        examples (sequence of [`Example`]): A few test images.
        embeddings (mapping of `str` to [`ModelEmbeddings`]): For each model.
        is_target (`np.ndarray` of shape `(N,)`, bool): Whether each test image is of the target class.
        matches (sequence of [`MatchedPair`]): A few training pairs and RoCLIP's matches, if it was trained.
        target_caption_share (`float`): How many of the training captions are of the target class.
    """

    pairs: Sequence[PoisonedPair]
    examples: Sequence[Example]
    embeddings: Mapping[str, ModelEmbeddings]
    is_target: np.ndarray
    matches: Sequence[MatchedPair] = ()
    target_caption_share: float = 0.0


def check_report_extra() -> None:
    """Raise `ModuleNotFoundError` with the way to install it unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "the report needs matplotlib, not installed here: pip install 'hf-robust-clip[report]'"
        )


def render_demo_report(results: Mapping[str, Any], pictures: Pictures, command: str) -> str:
    """
    The report as HTML, images and styles included.

    Args:
        results (mapping): As in `results.json`.
        pictures ([`Pictures`]): What it shows.
        command (`str`): What was run.
    """
    environment = templates()
    environment.filters.update(ordinal=_ordinal, spelled=_spelled)
    setup, models = results["setup"], models_of(results)
    table = results_table(results)
    return environment.get_template("demo_report.html.j2").render(
        title=TITLES[setup["defence"]],
        setup=setup,
        headings=table[0],
        rows=table[1:],
        findings=findings(results),
        models=models,
        pairs=[{"image": picture(pair.image), "pair": pair} for pair in pictures.pairs],
        examples=[
            {"clean": picture(example.clean), "triggered": picture(example.triggered), "example": example}
            for example in pictures.examples
        ],
        matches=shown_matches(pictures.matches, [setup["target"]]),
        curves=themed(partial(draw_curves, results["curves"], models)),
        embedding_plot=themed(
            partial(
                draw_embeddings,
                [
                    EmbeddingPanel(label, *pictures.embeddings[model], pictures.is_target)
                    for model, label in models.items()
                ],
                f"“{setup['target']}”, the target",
            )
        ),
        target_caption_share=pictures.target_caption_share,
        **_courses(results, pictures.target_caption_share),
        command=command,
    )


def shown_matches(matches: Sequence[MatchedPair], targets: Sequence[str]) -> list[dict[str, Any]]:
    """
    Pairs and their matches as the template draws them.

    Args:
        matches (sequence of [`MatchedPair`]): The pairs.
        targets (sequence of `str`): What captions of an adversarial class contain, as whole words.
    """
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


def _courses(results: Mapping[str, Any], target_caption_share: float) -> dict[str, Any]:
    """The plots of what a defence noted down; `None` for those that did not run."""
    matching = results.get("matching")
    splits = [Split.model_validate(split) for split in results.get("splits", [])]
    target = results["setup"]["target"]
    return {
        "matching_plot": (
            themed(partial(draw_matching, matching, target, target_caption_share)) if matching else None
        ),
        "splits_plot": themed(partial(draw_splits, splits)) if splits else None,
        "splits_course_plot": themed(partial(draw_splits_course, splits)) if splits else None,
    }


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _spelled(number: int) -> str:
    return {3: "three", 6: "six"}.get(number, str(number))
