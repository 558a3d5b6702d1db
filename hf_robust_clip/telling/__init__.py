"""The account of a run: its facts, worked out once, and the model card and the page that show them."""

from .card import MARKER, render_card
from .page import (
    AttackPictures,
    Control,
    MatchedPair,
    PoisonedPair,
    RunPictures,
    Study,
    TriggeredImage,
    check_report_extra,
    render_run_report,
)
from .writing import PICTURE, kept_card, license_of, write_card

__all__ = [
    "MARKER",
    "PICTURE",
    "AttackPictures",
    "Control",
    "MatchedPair",
    "PoisonedPair",
    "RunPictures",
    "Study",
    "TriggeredImage",
    "check_report_extra",
    "kept_card",
    "license_of",
    "render_card",
    "render_run_report",
    "write_card",
]
