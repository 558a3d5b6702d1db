"""What a scan of pairs found: scores, groups, duplicates, and the pairs without the most suspect."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from transformers.utils import logging

from ..columns import check_numbered
from ..data.filtered import note_filtered
from ..data.rows import IndexedDataset, decode_row, undecoded
from ..distributed import gathered
from ..evaluation.embedding import Embedder
from ..kinds import is_stream
from ..models import inference
from ..wording import shown
from .duplicates import Copies
from .features import encode
from .reading import PairReader, identity, key_of
from .sample import first_captions

logger = logging.get_logger(__name__)

#: Rows with the image of a suspect set of copies at least, the least disagreement of their captions, and the most
#: pairs that are suspect so, as a share: in data with a row for each caption of an image, five copies are usual.
LEAST_COPIES, LEAST_DISAGREEMENT, MOST_COPIES = 3, 0.5, 0.05
#: Mean rank of a group's members under a cleaned model from which on it is confirmed. Poisoned groups had 0.74 to 0.97
#: where it was chosen, natural ones 0.41 to 0.57.
CONFIRMED = 0.65
#: Share of the pairs that [`PairScan.keep`] leaves out, unless it is told another.
DROP = 0.1
#: Rows whose scores are read at a time, and pairs next to a group that its description names.
_BLOCK, _DESCRIBED = 100_000, 100


@dataclass(frozen=True)
class PairGroup:
    """
    A group of pairs: images that a model puts in one direction, and that share a word.

    Args:
        word (`str`): That they share.
        weight (`float`): At most 1: all of the group have the word, half of the pairs with the word or more lie
            elsewhere, and these are far away.
        coherence, closure, base (`float`): Share of the group with the word, of the pairs with the word that are in
            the group, and of all pairs with the word, in [0, 1].
        checkpoint (`int`, *optional*): The number of the model, from 0. `None`: of the pixels, without a model.
        size (`int`): Pairs inside that have the word.
        members (`tuple[int, ...]`): Their rows in the scores, the farthest out first, at most 10,000.
        others (`tuple[int, ...]`): Rows outside that have it, at most 10,000: what the members are to be compared
            with.
        cleaned_rank (`float`, *optional*): The mean rank of the members by their distance under a cleaned model, as a
            share of the pairs, after [`PairScan.verified`]. Of a natural group it is about a half.
        separation (`float`): Between the pairs with the word inside and outside, in their standard deviations.
    """

    word: str
    weight: float
    coherence: float
    closure: float
    base: float
    checkpoint: int | None
    size: int
    members: tuple[int, ...]
    others: tuple[int, ...]
    cleaned_rank: float | None = None
    separation: float = 0.0

    @property
    def confirmed(self) -> bool | None:
        """Whether a cleaned model no longer puts its images and captions together; `None` before [`verified`]."""
        return None if self.cleaned_rank is None else self.cleaned_rank >= CONFIRMED


@dataclass(frozen=True)
class PairScan:
    """
    What [`scan_pairs`] found. It accuses nobody: look at the groups.

    Args:
        scores (`datasets.Dataset`): A row for each pair, in order; of a stream in the order of reading, with its `key`
            where there is a `key_column`. `group`: the most that a group of the pixels or of any
            model says against it, in [0, 1.5]. `k_distance`, `slof`,
            `dao` of the pooled features and `projected_slof` of the embeddings, of the last model. `pair_distance`: 1
            less the cosine of image and caption there. `copies`: pairs with the same image, itself included.
            `distrust`: the worst of three ranks as a share of the pairs, by votes, by SLOF and by `pair_distance`,
            each at its worst model. `suspect`: whether the default cut-off takes it, and `why`: `"group"`, `"copies"`
            or `""`. `rank`: 1 is the most suspect over all parts.
        groups (`list[PairGroup]`): The heaviest first, one for each word and checkpoint.
        duplicates (`list[Copies]`): Pairs with one image, the most suspect first.
        known, chance (`float`): How often the last model finds a pair's caption among 256, in [0, 1], and how often
            chance does. Where they are near it has not learned the pairs, or was not trained on them, and the scan
            cannot know.
        key_column (`str`, *optional*): What the rows of the stream are called.
    """

    scores: datasets.Dataset
    groups: list[PairGroup]
    duplicates: list[Copies]
    known: float
    chance: float
    key_column: str | None = None
    # Where the scores are, unless in memory: it goes when the scan does.
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)

    @property
    def suspects(self) -> int:
        """How many pairs the default cut-off takes."""
        return int(self._column("suspect").sum())

    def keep(self, dataset: Any, drop: float | None = DROP) -> Any:
        """
        The pairs that stay when the most suspect are dropped, with all columns, in order. Their description says so,
        and so does the record of a model that is trained on them.

        Args:
            dataset: That was scanned, with numbered rows (`datasets.Dataset`) or a stream
                (`datasets.IterableDataset`). Without a `key_column` it must have one shard, in its own order: who
                reads shards in parts or shuffled counts their rows anew.
            drop (`float` or `None`, defaults to 0.1): Share of the pairs, in [0, 1). `None`: a tenth, or all that the
                default cut-off takes where these are more. A warning says how many of them a share leaves in.

        Raises:
            `ValueError`: If `drop` is not such a share, the dataset has another number of rows, or those of a stream
                have neither key nor number.
        """
        if drop is not None:
            _check_share("drop", drop, "[0, 1)", lambda: 0 <= drop < 1)
        self._check_kind(dataset)
        suspects, rows = self.suspects, len(self.scores)
        least = max(round(DROP * rows), suspects) if drop is None else round(drop * rows)
        if 0 < least < suspects:
            enough = math.ceil(1000 * suspects / rows) / 1000
            logger.warning(
                f"drop={drop} leaves {suspects - least} of the {suspects} suspect pairs in, drop={enough:g} none. "
                "Look at the groups: are they poisons?"
            )
        # The suspect ones have the first ranks.
        kept = self._without(dataset, self._rows_where("rank", lambda rank: rank <= least))
        note_filtered(kept, "scan_pairs", least, rows)
        return kept

    def flag(self, dataset: Any) -> Any:
        """
        The dataset with the columns `suspect` (bool) and `suspect_why` (`str`), as the default cut-off has them.

        Args:
            dataset: As of [`keep`].

        Raises:
            `ValueError`: As of [`keep`].
        """
        self._check_kind(dataset)
        if not is_stream(dataset):
            columns = {"suspect": self.scores["suspect"][:], "suspect_why": self.scores["why"][:]}
            return datasets.concatenate_datasets([dataset, datasets.Dataset.from_dict(columns)], axis=1)
        rows = self._rows_where("suspect", lambda suspect: suspect)
        reasons = np.array(self.scores.select(rows)["why"][:] if len(rows) else [], dtype=str)
        places, order = self._sorted_identities(rows)

        def flagged(row: Mapping[str, Any], number: int) -> dict[str, Any]:
            asked = self._identity(row, number)
            at = int(np.searchsorted(places, asked))
            found = at < len(places) and int(places[at]) == asked
            return {"suspect": found, "suspect_why": str(reasons[order[at]]) if found else ""}

        return dataset.map(flagged, with_indices=True)

    def trusted(self, dataset: Any, share: float = 0.5) -> Any:
        """
        The least distrusted share of the pairs: too blunt to accuse the others, and good to clean a model on.

        Args:
            dataset: As of [`keep`].
            share (`float`, defaults to 0.5): Of the pairs, in (0, 1].

        Raises:
            `ValueError`: If `share` is not such a share, or as of [`keep`].
        """
        _check_share("share", share, "(0, 1]", lambda: 0 < share <= 1)
        self._check_kind(dataset)
        order = np.argsort(self._column("distrust"), kind="stable")
        return self._without(dataset, np.sort(order[max(1, round(share * len(order))) :]))

    def verify(self, dataset: Any, clean: Callable[[Any], Any], *args: Any, **kwargs: Any) -> PairScan:
        """
        Trust, clean, verify: the scan with the opinion of a model that is cleaned on the pairs it trusts.

        Args:
            dataset: That was scanned.
            clean (callable): Gets the [`trusted`] half, trains the last of the scanned models on it, and returns that
                model.
            *args, **kwargs: As of [`verified`], from `processor` on.

        Returns:
            [`PairScan`]: As of [`verified`].

        Raises:
            `TypeError`: If `clean` returns no model.
        """
        model = clean(self.trusted(dataset))
        if model is None:
            raise TypeError("clean returned None; accepted is the cleaned model")
        return self.verified(dataset, model, *args, **kwargs)

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
        no longer puts together. Under `torch.distributed` ranks share the pairs; call it on all of them.

        Args:
            dataset: That was scanned.
            model: The last of the scanned models after a cleaning run on the trusted pairs.
            processor, image_column, caption_column, batch_size, num_workers: As of [`scan_pairs`].

        Returns:
            [`PairScan`]: With the column `cleaned_distance` (1 less the cosine of image and caption under that model),
                and `cleaned_rank` of each group.
        """
        self._check_rows(dataset)
        embedder = Embedder(model, processor, batch_size)
        columns = (image_column, caption_column)
        reader = PairReader(dataset, *columns, self.key_column, embedder.preprocess, batch_size, num_workers)
        with inference(embedder.model):
            own = [
                (batch.rows.identities, encode(embedder, batch.pixels, first_captions(batch.rows)).distances())
                for batch in reader.batches()
            ]
        everyone = itertools.chain.from_iterable(gathered(own))
        asked, distances = (np.concatenate(part) for part in zip(*everyone, strict=True))
        # A stream may come in another order than it did.
        places, order = self._sorted_identities(np.arange(len(self.scores)))
        arrived = np.argsort(asked, kind="stable")
        if not np.array_equal(asked[arrived], places):
            raise ValueError(f"dataset: its {len(asked)} pairs are not the {len(places)} that were scanned")
        distance = np.empty(len(places), dtype=np.float32)
        distance[order] = distances[arrived]
        ranks = rankdata(distance) / len(distance)
        groups = [
            replace(group, cleaned_rank=float(ranks[list(group.members)].mean())) if group.members else group
            for group in self.groups
        ]
        scores = self.scores.select_columns([name for name in self.scores.column_names if name != "cleaned_distance"])
        scores = scores.add_column("cleaned_distance", distance)
        return replace(self, scores=scores, groups=groups)

    def pairs_of(
        self, dataset: Any, rows: Collection[int], image_column: str = "image", caption_column: str = "caption"
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """
        Some rows of the scores with their pairs, decoded, in any order. A stream is read until all have been found.

        Raises:
            `ValueError`: If the dataset has another number of rows, or a stream lacks one of them.
        """
        self._check_rows(dataset)
        if not is_stream(dataset):
            numbered = IndexedDataset(dataset, image_column, caption_column)
            yield from ((row, decode_row(numbered[row], image_column, caption_column)) for row in sorted(rows))
            return
        places, order = self._sorted_identities(np.array(sorted(rows), dtype=np.int64))
        of_identity = dict(zip(places.tolist(), np.array(sorted(rows))[order].tolist(), strict=True))
        others = () if self.key_column is None else (self.key_column,)
        for number, row in enumerate(undecoded(dataset, image_column, caption_column, *others)):
            if not of_identity:
                return
            found = of_identity.pop(self._identity(row, number), None)
            if found is not None:
                yield found, decode_row(row, image_column, caption_column)
        if of_identity:
            raise ValueError(f"dataset: the stream no longer has {len(of_identity)} of the pairs that were scanned")

    @property
    def disagreeing(self) -> list[Copies]:
        """The duplicates that are suspect: of [`suspect_copies`]."""
        return suspect_copies(self.duplicates, len(self.scores))

    def described(self) -> dict[str, Any]:
        """Groups and duplicates, ready for JSON."""
        groups = [{**asdict(group), "others": group.others[:_DESCRIBED]} for group in self.groups]
        duplicates = [asdict(found) for found in self.duplicates]
        return {"known": self.known, "chance": self.chance, "groups": groups, "duplicates": duplicates}

    def _column(self, name: str) -> NDArray[Any]:
        return np.asarray(self.scores.data.column(name))

    def _rows_where(self, name: str, wanted: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> NDArray[np.int64]:
        """The rows of the scores with a value that is wanted, in order."""
        found = []
        for start in range(0, len(self.scores), _BLOCK):
            block = np.asarray(self.scores.data.column(name).slice(start, _BLOCK))
            found.append(start + np.flatnonzero(wanted(block)))
        return np.concatenate(found)

    def _without(self, dataset: Any, rows: NDArray[np.int64]) -> Any:
        """A dataset without the pairs of some rows of the scores."""
        if not is_stream(dataset):
            stays = np.ones(len(self.scores), dtype=bool)
            stays[rows] = False
            return dataset.select(np.flatnonzero(stays))
        places, _ = self._sorted_identities(rows)

        def stays_in(row: Mapping[str, Any], number: int) -> bool:
            asked = self._identity(row, number)
            at = int(np.searchsorted(places, asked))
            return at == len(places) or int(places[at]) != asked

        return dataset.filter(stays_in, with_indices=True)

    def _sorted_identities(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The identities of some rows of the scores, sorted, and where among the rows each one is."""
        if self.key_column is None:
            return rows.astype(np.uint64), np.arange(len(rows))
        keys = self.scores.select(rows)["key"][:] if len(rows) else []
        found = np.array([identity(key) for key in keys], dtype=np.uint64)
        order = np.argsort(found, kind="stable")
        return found[order], order

    def _identity(self, row: Mapping[str, Any], number: int) -> int:
        return number if self.key_column is None else identity(key_of(row, self.key_column))

    def _check_kind(self, dataset: Any) -> None:
        if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}; accepted is that which was scanned, as a datasets.Dataset or "
                "a datasets.IterableDataset"
            )
        if is_stream(dataset) and self.key_column is None:
            check_numbered(dataset)
        self._check_rows(dataset)

    def _check_rows(self, dataset: Any) -> None:
        if not is_stream(dataset) and len(dataset) != len(self.scores):
            raise ValueError(f"dataset has {len(dataset)} rows, but {len(self.scores)} were scanned")


def disagrees(copies: Copies) -> bool:
    """Whether an image occurs at least three times with captions that share less than half of their words."""
    return len(copies.rows) >= LEAST_COPIES and copies.disagreement >= LEAST_DISAGREEMENT


def suspect_copies(duplicates: Sequence[Copies], rows: int) -> list[Copies]:
    """
    Sets of copies that may be a targeted poison, the most suspect first: at least three pairs whose captions share
    less than half of their words. Where those are more than 5% of all pairs, only the sets with the most copies, as
    far as they are no more.

    Args:
        duplicates (sequence of [`Copies`]): The most suspect first.
        rows (`int`): How many pairs there are.
    """
    disagreeing = [copies for copies in duplicates if disagrees(copies)]
    sizes, counts = np.unique([len(copies.rows) for copies in disagreeing], return_counts=True)
    total = np.cumsum((sizes * counts)[::-1])[::-1]  # pairs in sets of this size or more
    usual = sizes[total > MOST_COPIES * rows]
    return [copies for copies in disagreeing if not len(usual) or len(copies.rows) > usual.max()]


def _check_share(name: str, value: Any, accepted: str, within: Callable[[], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not within():
        raise ValueError(f"{name} must be a share of the pairs in {accepted}, but is {shown(value)}")
