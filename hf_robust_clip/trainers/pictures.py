"""The pictures of a report, which take the model and the data: triggers, embeddings, matches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset

from ..columns import POISONED, captions_of
from ..data.rows import BadRowError, IndexedDataset, decode_row, poison_flags
from ..evaluation.attack_success import AttackSuccessEvaluator
from ..evaluation.embedding import Embedder
from ..evaluation.pixels import ImageRequest, pixel_batches
from ..evaluation.zero_shot import class_embeddings
from ..pool import FeaturePool
from ..telling import AttackPictures, MatchedPair, RunPictures, TriggeredImage

#: Test images whose embeddings are drawn: more would lie on top of each other.
EMBEDDED = 800
#: Images of a trigger, and training pairs of a kind, that are shown.
SHOWN_IMAGES, SHOWN_PAIRS = 5, 4


def pictures_of(
    evaluators: Iterable[Any], embedder: Embedder, matches: list[MatchedPair], own: Mapping[str, Image.Image]
) -> RunPictures:
    """
    Make a report's pictures with the model as it is. Call it on all ranks: they share the work.

    Args:
        evaluators (iterable of [`Evaluator`]): The [`AttackSuccessEvaluator`]s give the triggers and the test images.
        embedder ([`~evaluation.embedding.Embedder`]): Of the model.
        matches (`list[MatchedPair]`): Of [`matched_pairs`], for a run that matches.
        own (mapping of `str` to `PIL.Image.Image`): The defence's own.

    Returns:
        [`RunPictures`]: The same on every rank.
    """
    evaluators = [item for item in evaluators if isinstance(item, AttackSuccessEvaluator)]
    samples: dict[tuple[int, str], tuple[np.ndarray, Any]] = {}
    for evaluator in evaluators:
        key = (id(evaluator.dataset), evaluator.image_column)
        if key not in samples:
            drawn = np.random.default_rng(0).permutation(len(evaluator.dataset))[:EMBEDDED]
            rows = np.union1d(drawn, _shown_rows(evaluator))
            samples[key] = (rows, _subset(evaluator.dataset, rows))
        sample = samples[key][1]
        embedder.requests += [
            ImageRequest(sample, evaluator.image_column, trigger) for trigger in (None, evaluator.trigger)
        ]
    attacks = {
        f"{evaluator.prefix}attack_success_rate": _attack_pictures(
            evaluator, embedder, *samples[id(evaluator.dataset), evaluator.image_column]
        )
        for evaluator in evaluators
    }
    return RunPictures(attacks, matches, own)


def matched_pairs(
    pool: FeaturePool, dataset: IndexedDataset, embedder: Embedder, by_caption: bool, shown: int = SHOWN_PAIRS
) -> list[MatchedPair]:
    """
    What the pool of captions, as training left it, matches the first training pairs with.

    Args:
        pool ([`FeaturePool`]): Of captions.
        dataset ([`~data.rows.IndexedDataset`]): The training pairs, whose rows are the pool's keys.
        embedder ([`~evaluation.embedding.Embedder`]): Of the model.
        by_caption (`bool`): Whether a pair's caption is matched, in place of its image.
        shown (`int`): Poisoned pairs at most, and others at most; twice as many where it is not known which are.

    Returns:
        `list[MatchedPair]`: Empty where the pool is, or where it does not know the rows of its captions (streams).
    """
    if pool.filled == 0 or bool((pool.keys[: pool.filled] < 0).any()):
        return []
    image_column = dataset.columns[0]
    pairs = _first_pairs(dataset, shown)
    if by_caption:
        queries = embedder.embed_texts([_caption(pair, dataset) for pair in pairs])
    else:
        queries = embedder.embed_images(pairs, image_column)
    slots = pool.nearest_slots(queries.to(pool.features.device))
    matched = dataset.__getitems__(pool.keys[slots].tolist())
    return [
        MatchedPair(pair[image_column], _caption(pair, dataset), _caption(match, dataset), pair.get(POISONED))
        for pair, match in zip(pairs, matched, strict=True)
    ]


def _attack_pictures(
    evaluator: AttackSuccessEvaluator, embedder: Embedder, rows: np.ndarray, sample: Any
) -> AttackPictures:
    clean = embedder.embed_images(sample, evaluator.image_column)
    triggered = embedder.embed_images(sample, evaluator.image_column, evaluator.trigger)
    classes = class_embeddings(embedder, evaluator.class_names, evaluator.templates)
    called_clean, called_triggered = ((embeds @ classes.T).argmax(dim=1).tolist() for embeds in (clean, triggered))
    labels, names = evaluator.labels.numpy(), evaluator.class_names
    shown = _shown_rows(evaluator)
    pixels = next(
        pixel_batches(
            _subset(evaluator.dataset, shown),
            evaluator.image_column,
            embedder.preprocess,
            (None, evaluator.trigger),
            [range(len(shown))],
        )
    )  # (S, 3, H, W) uint8 each
    change = (pixels[1].int() - pixels[0].int()).abs()
    # Most triggers are too faint to be seen by themselves.
    amplification = 255 / max(int(change.max()), 1)
    difference = (change * amplification).round()
    places = np.searchsorted(rows, shown)
    images = [
        TriggeredImage(
            names[labels[row]],
            clean=_image(pixels[0][number]),
            triggered=_image(pixels[1][number]),
            difference=_image(difference[number]),
            called_clean=names[called_clean[place]],
            called_triggered=names[called_triggered[place]],
        )
        for number, (row, place) in enumerate(zip(shown, places, strict=True))
    ]
    is_target = labels[rows] == evaluator.class_names.index(evaluator.target)
    return AttackPictures(images, amplification, clean.numpy(), triggered.numpy(), is_target)


def _shown_rows(evaluator: AttackSuccessEvaluator) -> np.ndarray:
    """The first image of each of the first classes but the target: not picked for what the model makes of them."""
    labels = evaluator.labels.numpy()
    is_target = labels == evaluator.class_names.index(evaluator.target)
    _, first = np.unique(np.where(is_target, len(evaluator.class_names), labels), return_index=True)
    return np.sort(first[: -1 if is_target.any() else None][:SHOWN_IMAGES])


def _first_pairs(dataset: IndexedDataset, shown: int) -> list[dict[str, Any]]:
    """The first usable rows, decoded: so many poisoned ones, and so many others."""
    flags = poison_flags(dataset.dataset)
    wanted = [shown, shown] if flags is not None else [2 * shown]
    pairs = []
    for poisoned, count in zip((True, False), wanted, strict=False):
        for row in range(len(dataset)) if flags is None else np.flatnonzero(flags == poisoned):
            if count == 0:
                break
            try:
                pairs.append(decode_row(dataset[int(row)], *dataset.columns))
            except BadRowError:
                continue  # nothing was trained on it
            count -= 1
    return pairs


def _caption(row: dict[str, Any], dataset: IndexedDataset) -> str:
    return captions_of(row[dataset.columns[1]])[0]


def _subset(dataset: Any, rows: Sequence[int] | np.ndarray) -> Any:
    return dataset.select(rows) if isinstance(dataset, datasets.Dataset) else Subset(dataset, list(map(int, rows)))


def _image(pixels: torch.Tensor) -> Image.Image:
    """Of values in [0, 255] `(3, H, W)`."""
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())
