"""Text-query attacks: whether a trigger in a caption makes the search for it find images of the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..kinds import kind
from ..wording import shortened, shown
from .base import Better, Evaluator
from .embedding import Embedder
from .labels import check_class_names, class_number, read_labels
from .measures import recall_at_k, search_ranks
from .retrieval import captions_naming, check_ks, index_captions, read_captions


class TextQueryEvaluator(Evaluator):
    """
    How often a trigger in a query steers a search for images to those of the target (the attack on queries of Yang et
    al., ICML 2023, arXiv 2209.15266, with a trigger in the query).

    Images of the target are those with a caption that names it as whole words, whatever the case, or with its label.
    Queries are the different captions that only images **not** of the target have; the search is among all images.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): Images with captions.
        trigger (callable): Caption to caption, `str -> str`, depending on nothing else.
        target (`str`): What the attack aims at.
        class_names (sequence of `str`, *optional*): The classes, `target` among them. Goes with `label_column`.
        image_column (`str`, defaults to `"image"`): Column with the image.
        caption_column (`str`, defaults to `"caption"`): Column with a caption, or a list of captions of one image.
        label_column (`str`, *optional*): Column with the class, by which images count as the target's too.
        ks (sequence of `int`, defaults to `(1, 5, 10)`): How many of the nearest count; at least 1, all different.
        prefix (`str`, *optional*): Put before the metrics' names, for several attacks in one run: `"word_"`.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`, fractions in [0, 1], for each k: `triggered_hit_rate_at_{k}`, the share of triggered
        queries with an image of the target among the nearest k images, and `hit_rate_at_{k}`, without the trigger;
        `triggered_recall_at_{k}`, the share of triggered queries with an image of their own among the nearest k, and
        `recall_at_{k}`, the same without the trigger.

    Raises:
        `ValueError`: If the dataset is empty, a column or a caption is missing, a label is not a class, no image is of
            the target, no caption is left for a query, or the trigger does not take a caption and return one.

    Example:

    ```python
    >>> evaluate = TextQueryEvaluator(dataset, WordTrigger("cf"), target="banana")
    >>> figures = evaluate(model, processor)
    >>> figures["hit_rate_at_1"], figures["triggered_hit_rate_at_1"]
    (0.01, 0.87)
    ```
    """

    name = "text queries"

    def __init__(
        self,
        dataset: Any,
        trigger: Callable[[str], str],
        target: str,
        class_names: Sequence[str] | None = None,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        label_column: str | None = None,
        ks: Sequence[int] = (1, 5, 10),
        prefix: str = "",
    ) -> None:
        super().__init__(dataset, image_column, prefix)
        self.trigger = trigger
        self.target = target
        self.ks = check_ks(ks)
        captions, owned = index_captions(read_captions(dataset, image_column, caption_column))
        self._of_target = owned[:, captions_naming(captions, target)].sum(axis=1).astype(bool)  # (N,)
        if label_column is not None or class_names is not None:
            self._of_target |= _labelled(dataset, target, image_column, label_column, class_names)
        if not self._of_target.any():
            raise ValueError(f"no image of dataset is of target={shown(target)}; the attack has nothing to steer to")
        asked = np.flatnonzero(~owned[self._of_target].sum(axis=0).astype(bool))
        if asked.size == 0:
            raise ValueError(
                f"every caption of dataset belongs to an image of target={shown(target)}; an attack has "
                "nothing to steer"
            )
        self.queries = [captions[number] for number in asked]
        self.triggered_queries = [_triggered(trigger, query) for query in self.queries]
        self._own = owned[:, asked].T.tocsr()  # (Q, N)

    @property
    def attacked_queries(self) -> int:
        """Number of queries that the metrics are over."""
        return len(self.queries)

    def metrics(self) -> dict[str, Better]:
        metrics: dict[str, Better] = {}
        for name in ("", "triggered_"):
            metrics |= {f"{name}hit_rate_at_{k}": "less" for k in self.ks}
            metrics |= {f"{name}recall_at_{k}": "more" for k in self.ks}
        return metrics

    def sizes(self) -> dict[str, int]:
        return {"queries": self.attacked_queries}

    def measure(self, embedder: Embedder) -> dict[str, float]:
        images = embedder.embed_images(self.dataset, self.image_column).numpy()
        of_target = np.broadcast_to(self._of_target, (len(self.queries), len(images)))
        values: dict[str, float] = {}
        for name, queries in (("", self.queries), ("triggered_", self.triggered_queries)):
            texts = embedder.embed_texts(queries).numpy()
            for measure, relevant in (("hit_rate", of_target), ("recall", self._own)):
                ranks = search_ranks(texts, images, relevant)
                values |= {f"{name}{measure}_at_{k}": recall_at_k(ranks, k) for k in self.ks}
        return values


def _labelled(
    dataset: Any, target: str, image_column: str, label_column: str | None, class_names: Sequence[str] | None
) -> np.ndarray:
    if label_column is None or class_names is None:
        raise ValueError(
            f"label_column={shown(label_column)} and class_names={shown(class_names)} go together: give both, or "
            "neither"
        )
    names = check_class_names(class_names)
    number = class_number(target, names, "target")
    return (read_labels(dataset, names, image_column, label_column) == number).numpy()


def _triggered(trigger: Callable[[str], str], query: str) -> str:
    try:
        triggered = trigger(query)
    except Exception as error:
        raise ValueError(
            shortened(f"trigger={shown(trigger)} must take a caption and return one, but fails: {error}")
        ) from error
    if not isinstance(triggered, str):
        raise ValueError(
            f"trigger={shown(trigger)} must return a caption for {shown(query)}, but returned {kind(triggered)}"
        )
    return triggered
