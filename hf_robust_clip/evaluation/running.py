"""Several evaluators on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..kinds import check_callable
from ..wording import listed
from .embedding import Embedder
from .pixels import ImageRequest


def evaluator_list(evaluators: Any) -> list[Callable[..., dict[str, float]]]:
    """No evaluator, one or several, as a list; `ValueError` for what cannot be called, and for a class."""
    if evaluators is None:
        return []
    one = callable(evaluators) or not isinstance(evaluators, Iterable) or isinstance(evaluators, str | Mapping)
    given = [evaluators] if one else list(evaluators)
    for evaluator in given:
        check_callable("evaluators", evaluator, "one evaluator or a list of them, such as ZeroShotEvaluator(...)")
    return given


def run_evaluators(
    evaluators: Sequence[Callable[..., dict[str, float]]], processor: Any, embedder: Embedder
) -> dict[str, float]:
    """
    Run evaluators on an embedder's model, in turn. Embeddings that several of them need are computed once; for those
    with a method `image_requests`, in one pass over each dataset.

    Args:
        evaluators (sequence of callables): Each `(model, processor, embedder) -> dict[str, float]`.
        processor (`ProcessorMixin`): That of the model.
        embedder ([`~evaluation.embedding.Embedder`]): Of the model as it is; what is requested of it grows.

    Returns:
        `dict[str, float]`: The metrics of all of them.

    Raises:
        `ValueError`: If two of them report a metric of the same name.
    """
    for evaluator in evaluators:
        if hasattr(evaluator, "image_requests"):
            embedder.requests += [ImageRequest(*request) for request in evaluator.image_requests()]
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        found = evaluator(embedder.model, processor, embedder)
        twice = sorted(metrics.keys() & found.keys())
        if twice:
            names = listed(twice, most=5, longest=60)
            raise ValueError(f"two evaluators report {names}: give one of them a prefix, for example prefix='patch_'")
        metrics.update(found)
    return metrics
