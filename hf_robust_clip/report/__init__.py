"""The demo's report: what its results say, and one HTML file that needs nothing beside it."""

from .findings import MODELS, TITLES, Finding, findings, matching_course, models_of, results_table, split_course
from .page import Example, MatchedPair, ModelEmbeddings, Pictures, PoisonedPair, check_report_extra, render_demo_report

__all__ = [
    "MODELS",
    "TITLES",
    "Example",
    "Finding",
    "MatchedPair",
    "ModelEmbeddings",
    "Pictures",
    "PoisonedPair",
    "check_report_extra",
    "findings",
    "matching_course",
    "models_of",
    "render_demo_report",
    "results_table",
    "split_course",
]
