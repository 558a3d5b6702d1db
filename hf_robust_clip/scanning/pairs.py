"""Which pairs of a dataset are suspect, under a model that was trained on them, without knowing the attack."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from transformers.utils import logging

from ..columns import check_pairs
from ..data.rows import IndexedDataset, decode_row
from ..models import check_processor, load_dual_encoder, load_processor
from ..wording import shown
from .duplicates import Copies, find_copies, near_pairs, thumbnail
from .features import Features, captions_in_blocks, read_features
from .groups import COMPONENTS, Direction, Words, find_groups, votes
from .neighbours import LocalScores, draw_references, local_scores

logger = logging.get_logger(__name__)

#: Most rows on which directions are fitted and references drawn.
SAMPLE = 50_000
#: Rows that are scored at a time.
_BLOCK = 8192
#: Votes this many median absolute deviations above the median are suspect.
DEVIATIONS = 6.0
#: Rows with the image of a suspect set of copies, and the least disagreement of their captions.
LEAST_COPIES, LEAST_DISAGREEMENT = 3, 0.5
#: Mean rank of a group's members under a cleaned model from which on it is confirmed. Poisoned groups had 0.74 to 0.97
#: where it was chosen, natural ones 0.41 to 0.57.
CONFIRMED = 0.65
#: Pairs among which a pair's own caption is looked for, to see whether the model knows the pairs.
_CHOICES = 256
_TRIED = 16  # times
#: Times chance, below which a model is said to not know the pairs.
_KNOWN = 5


@dataclass(frozen=True)
class PairGroup:
    """
    A group of pairs: images that a model puts in one direction, and that share a word.

    Args:
        word (`str`): That they share.
        weight (`float`): At most 1: all of the group have the word, and nearly all pairs with the word lie elsewhere.
        coherence, closure, base (`float`): Share of the group with the word, of the pairs with the word that are in
            the group, and of all pairs with the word, in [0, 1].
        checkpoint (`int`): The number of the model, from 0.
        members (`tuple[int, ...]`): Rows inside that have the word, the farthest out first.
        others (`tuple[int, ...]`): Rows outside that have it: what the members are to be compared with.
        cleaned_rank (`float`, *optional*): The mean rank of the members by their distance under a cleaned model, as a
            share of the pairs, after [`PairScan.verified`]. Of a natural group it is about a half.
    """

    word: str
    weight: float
    coherence: float
    closure: float
    base: float
    checkpoint: int
    members: tuple[int, ...]
    others: tuple[int, ...]
    cleaned_rank: float | None = None

    @property
    def confirmed(self) -> bool | None:
        """Whether a cleaned model no longer puts its images and captions together; `None` before [`verified`]."""
        return None if self.cleaned_rank is None else self.cleaned_rank >= CONFIRMED


@dataclass(frozen=True)
class PairScan:
    """
    What [`scan_pairs`] found. It accuses nobody: look at the groups.

    Args:
        scores (`datasets.Dataset`): A row for each pair, in order. `group`: votes of the groups over all models, from
            0. `k_distance`, `slof`, `dao` of the pooled features and `projected_slof` of the embeddings, of the last
            model. `pair_distance`: 1 less the cosine of image and caption there. `copies`: pairs with the same image,
            itself included. `distrust`: the worst of three ranks as a share of the pairs, by votes, by SLOF and by
            `pair_distance`, each at its worst model. `suspect`: whether the default cut-off takes it, and `why`:
            `"group"`, `"copies"` or `""`. `rank`: 1 is the most suspect over all parts.
        groups (`list[PairGroup]`): The heaviest first, one for each word and checkpoint.
        duplicates (`list[Copies]`): Pairs with one image, the most suspect first.
        known (`float`): How often the last model finds a pair's caption among 256, in [0, 1]. Near 1/256 it has not
            learned the pairs, or was not trained on them, and the scan cannot know.
    """

    scores: datasets.Dataset
    groups: list[PairGroup]
    duplicates: list[Copies]
    known: float

    def keep(self, dataset: Any, drop: float = 0.1) -> Any:
        """
        The pairs that stay when the most suspect share is dropped, with all columns, in order.

        Args:
            dataset (`datasets.Dataset`): That was scanned.
            drop (`float`, defaults to 0.1): Share of the pairs, in [0, 1).

        Raises:
            `ValueError`: If `drop` is not such a share, or the dataset has another number of rows.
        """
        if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop < 1:
            raise ValueError(f"drop must be a share of the pairs in [0, 1), but is {shown(drop)}")
        self._check_rows(dataset)
        rank = np.asarray(self.scores["rank"])
        return dataset.select(np.flatnonzero(rank > round(drop * len(rank))).tolist())

    def flag(self, dataset: Any) -> Any:
        """
        The dataset with the columns `suspect` (bool) and `suspect_why` (`str`), as the default cut-off has them.

        Raises:
            `ValueError`: If the dataset has another number of rows.
        """
        self._check_rows(dataset)
        columns = {"suspect": self.scores["suspect"][:], "suspect_why": self.scores["why"][:]}
        return datasets.concatenate_datasets([dataset, datasets.Dataset.from_dict(columns)], axis=1)

    def trusted(self, dataset: Any, share: float = 0.5) -> Any:
        """
        The least distrusted share of the pairs: too blunt to accuse the others, and good to clean a model on.

        Args:
            dataset (`datasets.Dataset`): That was scanned.
            share (`float`, defaults to 0.5): Of the pairs, in (0, 1].

        Raises:
            `ValueError`: If `share` is not such a share, or the dataset has another number of rows.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"share must be a share of the pairs in (0, 1], but is {shown(share)}")
        self._check_rows(dataset)
        order = np.argsort(np.asarray(self.scores["distrust"]), kind="stable")
        return dataset.select(np.sort(order[: max(1, round(share * len(order)))]).tolist())

    def verified(
        self,
        dataset: Any,
        model: Any,
        processor: Any = None,
        image_column: str = "image",
        caption_column: str = "caption",
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> PairScan:
        """
        The scan with a second opinion: that of a model that was cleaned on the [`trusted`] pairs. Poisons are what it
        no longer puts together.

        Args:
            dataset (`datasets.Dataset`): That was scanned.
            model: The last of the scanned models after a cleaning run on the trusted pairs.
            processor, image_column, caption_column, batch_size, num_workers: As of [`scan_pairs`].

        Returns:
            [`PairScan`]: With the column `cleaned_distance` (1 less the cosine of image and caption under that model),
                and `cleaned_rank` of each group.
        """
        self._check_rows(dataset)
        processor = load_processor(model, processor, "processor")
        columns = (image_column, caption_column)
        with tempfile.TemporaryDirectory() as folder:
            encoder = load_dual_encoder(model)
            features, _ = read_features(encoder, processor, dataset, *columns, Path(folder), batch_size, num_workers)
            distance = _distances(features)
        ranks = rankdata(distance) / len(distance)
        groups = [
            replace(group, cleaned_rank=float(ranks[list(group.members)].mean())) if group.members else group
            for group in self.groups
        ]
        scores = self.scores.add_column("cleaned_distance", distance)
        return replace(self, scores=scores, groups=groups)

    @property
    def disagreeing(self) -> list[Copies]:
        """The duplicates that are suspect: at least three pairs whose captions share less than half of their words."""
        return [found for found in self.duplicates if is_suspect(found)]

    def described(self) -> dict[str, Any]:
        """Groups and duplicates, ready for JSON."""
        groups = [asdict(group) for group in self.groups]
        return {"known": self.known, "groups": groups, "duplicates": [asdict(found) for found in self.duplicates]}

    def _check_rows(self, dataset: Any) -> None:
        if len(dataset) != len(self.scores):
            raise ValueError(f"dataset has {len(dataset)} rows, but {len(self.scores)} were scanned")


def scan_pairs(
    models: Any,
    processor: Any = None,
    dataset: Any = None,
    image_column: str = "image",
    caption_column: str = "caption",
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> PairScan:
    """
    Score how suspect the pairs of a dataset are, with models that were trained on them.

    Three parts, each for what it finds. **Groups**: a backdoor is a set of images that the model puts in a direction
    of their own, whose captions share a word, while most other pairs with that word lie elsewhere. **Local outliers**:
    pairs far from their neighbors in random references, which finds sparse poisons such as warps. **Duplicates**:
    equal and near-equal images whose captions disagree, which are targeted poisons; they need no model.

    Each model embeds all pairs once; the features are kept in files. A foreign CLIP does not show the poison: take
    checkpoints of a training on these pairs, early and late ones.

    Args:
        models (model, `str` or sequence of them): One dual encoder or several checkpoints of one training, in order:
            objects, folders or Hub ids.
        processor (`ProcessorMixin`, *optional*): Of all of them. `None`: the one saved beside the first.
        dataset (map-style dataset): N pairs.
        image_column, caption_column (`str`): Its columns.
        batch_size (`int`, defaults to 64), num_workers (`int`, defaults to 0): Of embedding.
        seed (`int`, defaults to 0): Of the sample, the references and the decomposition.
        cache_dir (path, *optional*): Where features are kept while it runs, about 2 bytes a pair and dimension.
            `None`: a temporary folder.

    Returns:
        [`PairScan`]: The same for the same seed.

    Raises:
        `ValueError`: If there is no model, a model and the processor do not go together, or the dataset or a row of it
            cannot be used.
    """
    listed = list(models) if isinstance(models, list | tuple) else [models]
    if not listed:
        raise ValueError("models is empty: give one model that was trained on these pairs, or several checkpoints")
    check_pairs(dataset, {"image_column": image_column, "caption_column": caption_column}, "dataset")
    if len(dataset) < 64:
        raise ValueError(f"dataset has {len(dataset)} rows: at least 64 are needed to tell what is usual among them")
    processor = load_processor(listed[0], processor, "processor")
    check_processor(processor, "processor")
    columns = (image_column, caption_column)
    sample = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:SAMPLE])
    words = Words(_sampled_words(dataset, caption_column, sample))
    group_votes, worst = np.zeros(len(dataset), dtype=np.float32), np.zeros(len(dataset), dtype=np.float32)
    found: list[tuple[int, Direction, NDArray[np.int64], NDArray[np.int64]]] = []
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        for number, model in enumerate(listed):
            encoder = load_dual_encoder(model)
            place = Path(folder, str(number))
            features, prints = read_features(encoder, processor, dataset, *columns, place, batch_size, num_workers)
            directions = find_groups(features.pooled[sample], words, COMPONENTS, seed)
            strongest = _one_a_word(directions)
            members: dict[str, list[tuple[float, int]]] = {group.word: [] for group in strongest}
            others: dict[str, list[int]] = {group.word: [] for group in strongest}
            for block, rows in captions_in_blocks(dataset, caption_column, _BLOCK):
                pooled = features.pooled[block.start : block.stop]
                group_votes[block.start : block.stop] += votes(directions, pooled, rows)
                for group in strongest:
                    for row, where, has in zip(block, group.places(pooled), rows, strict=True):
                        if group.word in has and where > group.threshold:
                            members[group.word].append((-where, row))
                        elif group.word in has and len(others[group.word]) < _BLOCK:
                            others[group.word].append(row)
            for group in strongest:
                inside = np.array([row for _, row in sorted(members[group.word])], dtype=np.int64)
                found.append((number, group, inside, np.array(others[group.word], dtype=np.int64)))
            local, distance = _local(features, sample, seed), _distances(features)
            for values in (local["slof"], distance):
                np.maximum(worst, rankdata(values) / len(values), out=worst)
        known = _known(features, sample, seed)
    duplicates = _duplicates(prints, dataset, *columns)
    if known < _KNOWN / _CHOICES:
        logger.warning(
            f"The last model finds a pair's caption among {_CHOICES} in {known:.1%} of the cases, hardly more than by "
            "chance: it has not learned these pairs, or was not trained on them, and the scan cannot know which are "
            "poisoned. Scan with a checkpoint of a training on them."
        )
    groups = [
        PairGroup(
            group.word,
            group.weight,
            group.coherence,
            group.closure,
            group.base,
            number,
            tuple(inside.tolist()),
            tuple(outside.tolist()),
        )
        for number, group, inside, outside in sorted(found, key=lambda entry: -entry[1].weight)
    ]
    np.maximum(worst, rankdata(group_votes) / len(worst), out=worst)
    return PairScan(_scores(group_votes, local, distance, worst, duplicates), groups, duplicates, known)


def is_suspect(copies: Copies) -> bool:
    """Whether an image occurs so often, with captions that disagree so much, that it may be a targeted poison."""
    return len(copies.rows) >= LEAST_COPIES and copies.disagreement >= LEAST_DISAGREEMENT


def _sampled_words(dataset: Any, caption_column: str, sample: NDArray[np.int64]) -> list[set[str]]:
    picked = dataset.select(sample.tolist()) if hasattr(dataset, "select") else [dataset[int(row)] for row in sample]
    return [words for _, block in captions_in_blocks(picked, caption_column, _BLOCK) for words in block]


def _one_a_word(directions: Sequence[Direction]) -> list[Direction]:
    """The heaviest direction of each word, of those that weigh anything."""
    heaviest: dict[str, Direction] = {}
    for direction in directions:
        if direction.weight > 0:
            heaviest.setdefault(direction.word, direction)
    return list(heaviest.values())


def _local(features: Features, sample: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.float32]]:
    scores = {}
    for prefix, rows in (("", features.pooled), ("projected_", features.images)):
        references = draw_references(np.asarray(rows[sample], dtype=np.float32), sample, seed=seed)
        parts: list[LocalScores] = []
        for block in _blocks(len(rows)):
            part = np.asarray(rows[block.start : block.stop], dtype=np.float32)
            parts.append(local_scores(references, part, np.arange(block.start, block.stop)))
        for name, values in zip(LocalScores._fields, zip(*parts, strict=True), strict=True):
            scores[prefix + name] = np.concatenate(values)
    return scores


def _blocks(rows: int) -> Iterator[range]:
    return (range(start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK))


def _distances(features: Features) -> NDArray[np.float32]:
    """1 less the cosine of each pair `(N,)`."""
    found = [
        (features.images[block.start : block.stop].astype(np.float32) * features.texts[block.start : block.stop]).sum(
            axis=1
        )
        for block in _blocks(len(features.images))
    ]
    return 1 - np.concatenate(found)


def _known(features: Features, sample: NDArray[np.int64], seed: int) -> float:
    """How often an image is at least as near to its own caption as to those of 255 other pairs."""
    choices = min(_CHOICES, len(sample))
    drawn = np.random.default_rng(seed).permutation(sample)[: _TRIED * choices]
    right = []
    for start in range(0, len(drawn) - choices + 1, choices):
        rows = np.sort(drawn[start : start + choices])
        similarity = features.images[rows].astype(np.float32) @ features.texts[rows].astype(np.float32).T
        right.append((np.diag(similarity) >= similarity.max(axis=1)).mean())
    return float(np.mean(right))


def _duplicates(prints: NDArray[np.uint64], dataset: Any, image_column: str, caption_column: str) -> list[Copies]:
    pairs = near_pairs(prints)
    rows = np.unique(pairs).tolist()
    read = IndexedDataset(dataset, image_column, caption_column)
    thumbnails = {row: thumbnail(decode_row(read[row], image_column, caption_column)[image_column]) for row in rows}
    picked = np.array(rows, dtype=np.int64)
    words = dict(zip(rows, _sampled_words(dataset, caption_column, picked), strict=True)) if rows else {}
    return find_copies(pairs, thumbnails, words)


def _scores(
    group: NDArray[np.float32],
    local: dict[str, NDArray[np.float32]],
    distance: NDArray[np.float32],
    distrust: NDArray[np.float32],
    duplicates: Sequence[Copies],
) -> datasets.Dataset:
    copies = np.ones(len(group), dtype=np.int64)
    suspicion = np.zeros(len(group))
    for found in duplicates:
        copies[list(found.rows)] = len(found.rows)
        if is_suspect(found):
            suspicion[list(found.rows)] = found.suspicion
    middle = np.median(group)
    cut = middle + DEVIATIONS * np.median(np.abs(group - middle))
    by_group, by_copies = group > max(cut, 0), suspicion > 0
    # Copies that disagree first, then the votes, then what is far from its neighbors.
    rest = np.maximum(rankdata(group), rankdata(local["slof"]))
    order = np.lexsort((-rest, np.where(by_group, -group, 0), ~by_group, -suspicion))
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(1, len(group) + 1)
    why = np.where(by_copies, "copies", np.where(by_group, "group", ""))
    return datasets.Dataset.from_dict(
        {
            "group": group,
            "k_distance": local["k_distance"],
            "slof": local["slof"],
            "dao": local["dao"],
            "projected_slof": local["projected_slof"],
            "pair_distance": distance,
            "copies": copies,
            "distrust": distrust,
            "suspect": by_group | by_copies,
            "why": why.tolist(),
            "rank": rank,
        }
    )
