"""Reports: what a run or the demo says, and one HTML file of each that needs nothing beside it."""

from .findings import MODELS, TITLES, Finding, findings, matching_course, models_of, results_table, split_course
from .page import Example, MatchedPair, ModelEmbeddings, Pictures, PoisonedPair, check_report_extra, render_demo_report
from .run_page import AttackPictures, RunPictures, TriggeredImage, render_run_report

__all__ = [
    "MODELS",
    "TITLES",
    "AttackPictures",
    "Example",
    "Finding",
    "MatchedPair",
    "ModelEmbeddings",
    "Pictures",
    "PoisonedPair",
    "RunPictures",
    "TriggeredImage",
    "check_report_extra",
    "findings",
    "matching_course",
    "models_of",
    "render_demo_report",
    "render_run_report",
    "results_table",
    "split_course",
]
