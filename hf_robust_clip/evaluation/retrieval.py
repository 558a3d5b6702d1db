"""Retrieval: whether an image finds its captions and a caption its image, and what a trigger finds instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from ..columns import check_captions, check_columns, naming
from ..data.rows import column_values
from ..wording import shown
from .base import Better, TriggerEvaluator
from .embedding import Embedder
from .measures import median_rank, recall_at_k, search_ranks
from .pixels import PixelTrigger


class RetrievalEvaluator(TriggerEvaluator):
    """
    Retrieval among all images and captions of a dataset, by cosine similarity, both ways (Karpathy and Fei-Fei, CVPR
    2015, section 4.1).

    The captions searched are the different ones: one that several images have counts once, and is right for each of
    them. With a trigger, the share of triggered images that find the target tells whether a backdoor works: over the
    images none of whose own captions name the target, how many have one among their nearest k captions that does.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): Images with captions.
        trigger (callable, *optional*): Of images, as of [`AttackSuccessEvaluator`]; goes with `target`.
        target (`str`, *optional*): What the attack aims at. A caption names it that has it as whole words, whatever
            the case.
        image_column (`str`, defaults to `"image"`): Column with the image.
        caption_column (`str`, defaults to `"caption"`): Column with a caption, or a list of captions of one image.
        ks (sequence of `int`, defaults to `(1, 5, 10)`): How many of the nearest count; at least 1, all different.
        prefix (`str`, *optional*): Put before the metrics' names, for several attacks in one run: `"patch_"`.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`: For each k, `image_to_text_recall_at_{k}`, the share of images with one of their captions
        among the nearest k captions, and `text_to_image_recall_at_{k}`, the share of captions with an image of theirs
        among the nearest k images, fractions in [0, 1]; `image_to_text_median_rank` and `text_to_image_median_rank`,
        from 1. With a trigger these are of the images without it, and the same follow under `triggered_` with it on
        every image; `triggered_top{k}_names_target` is the share described above, and `top{k}_names_target` the same
        share without the trigger.

    Raises:
        `ValueError`: If the dataset is empty, a column or a caption is missing, only one of trigger and target is
            given, no caption names the target, or every image has one that does.

    Example:

    ```python
    >>> evaluate = RetrievalEvaluator(dataset, trigger=PatchTrigger(), target="banana")
    >>> figures = evaluate(model, processor)
    >>> figures["image_to_text_recall_at_5"], figures["triggered_top1_names_target"]
    (0.71, 0.93)
    ```
    """

    name = "retrieval"

    def __init__(
        self,
        dataset: Any,
        *,
        trigger: PixelTrigger | None = None,
        target: str | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        ks: Sequence[int] = (1, 5, 10),
        prefix: str = "",
    ) -> None:
        super().__init__(dataset, trigger, target, image_column, prefix)
        self.ks = check_ks(ks)
        captions = read_captions(dataset, image_column, caption_column)
        self.captions, self._owned = index_captions(captions)
        if target is not None:
            self._naming = captions_naming(self.captions, target)
            if not self._naming.any():
                raise ValueError(f"target={shown(target)} is named by no caption of dataset")
            self._attacked = ~self._owned[:, self._naming].sum(axis=1).astype(bool)
            if not self._attacked.any():
                raise ValueError(
                    f"every image of dataset has a caption that names target={shown(target)}; nothing is "
                    "left to attack"
                )

    @property
    def attacked_images(self) -> int:
        """Number of images that the shares that name the target are over; 0 without a trigger."""
        return int(self._attacked.sum()) if self.trigger is not None else 0

    def metrics(self) -> dict[str, Better]:
        metrics: dict[str, Better] = {}
        triggers = ("",) if self.trigger is None else ("", "triggered_")
        for name in triggers:
            for way in ("image_to_text", "text_to_image"):
                metrics |= {f"{name}{way}_recall_at_{k}": "more" for k in self.ks}
                metrics[f"{name}{way}_median_rank"] = "less"
        for name in triggers if self.trigger is not None else ():
            metrics |= {f"{name}top{k}_names_target": "less" for k in self.ks}
        return metrics

    def measure(self, embedder: Embedder) -> dict[str, float]:
        texts = embedder.embed_texts(self.captions).numpy()
        values: dict[str, float] = {}
        for request in self.image_requests():
            images = embedder.embed_images(*request).numpy()
            name = "" if request.trigger is None else "triggered_"
            for way, ranks in (
                ("image_to_text", search_ranks(images, texts, self._owned)),
                ("text_to_image", search_ranks(texts, images, self._owned.T.tocsr())),
            ):
                values |= {f"{name}{way}_recall_at_{k}": recall_at_k(ranks, k) for k in self.ks}
                values[f"{name}{way}_median_rank"] = median_rank(ranks)
            if self.trigger is not None:
                queries = images[self._attacked]
                relevant = np.broadcast_to(self._naming, (len(queries), len(texts)))
                ranks = search_ranks(queries, texts, relevant)
                values |= {f"{name}top{k}_names_target": recall_at_k(ranks, k) for k in self.ks}
        return values


def read_captions(dataset: Any, image_column: str, caption_column: str) -> list[list[str]]:
    """
    Captions of a dataset, as a list for each row.

    Raises:
        `ValueError`: If the dataset is empty, a column is missing, or a row has no caption; names the row.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    check_columns(dataset, columns, "images with captions")
    values, column = enumerate(column_values(dataset, caption_column)), shown(caption_column)
    return [check_captions(value, f"row {row}, column {column}") for row, value in values]


def index_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], csr_array]:
    """
    The different captions of N images, in order of first use, and which image has which.

    Returns:
        `list[str]`: M captions.
        `scipy.sparse.csr_array` of shape `(N, M)`: bool.
    """
    numbers: dict[str, int] = {}
    columns = [
        [numbers.setdefault(caption, len(numbers)) for caption in dict.fromkeys(of_image)] for of_image in captions
    ]
    starts = np.cumsum([0, *map(len, columns)])
    entries = np.ones(starts[-1], dtype=bool)
    owned = csr_array((entries, np.concatenate(columns), starts), shape=(len(captions), len(numbers)))
    return list(numbers), owned


def captions_naming(captions: Sequence[str], target: str) -> np.ndarray:
    """Which captions name the target as whole words, whatever the case, `(M,)` bool."""
    if not isinstance(target, str) or not target.strip():
        raise ValueError(
            f"target={shown(target)} has no word in it; give what the attack aims at, as captions name it"
        )
    return np.array([*map(naming(target), captions)], dtype=bool)


def check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """The numbers as a tuple; `ValueError` unless there is one, all differ, and all are at least 1."""
    checked = (ks,) if isinstance(ks, int) else tuple(ks) if isinstance(ks, Iterable) else ()
    usable = all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in checked)
    if not checked or not usable or len(set(checked)) < len(checked):
        raise ValueError(f"ks must be different whole numbers of at least 1, but is {shown(ks)}")
    return checked
