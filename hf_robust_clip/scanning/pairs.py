"""Which pairs of a dataset are suspect, under a model that was trained on them, without knowing the attack."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers.utils import logging

from ..attacks.fields import check_int
from ..columns import check_columns, check_pairs
from ..data.shards import write_shard
from ..distributed import rank, world_size
from ..evaluation.embedding import Embedder
from ..kinds import is_stream
from ..models import inference, load_processor
from ..wording import shown
from .duplicates import Copies, find_copies, near_pairs, partitions
from .features import Features, encode
from .found import PairGroup, PairScan, disagrees, suspect_copies
from .groups import words_of
from .neighbours import NEIGHBORS, REFERENCES, ROUNDS
from .parts import Parts, check_settings, read_parts
from .reading import PairReader
from .sample import Sample, draw_sample, first_captions
from .scoring import BLOCK, CHOICES, Scorer

logger = logging.get_logger(__name__)

#: Most rows on which directions are fitted and references drawn, and the least that a scan makes sense of.
SAMPLE, LEAST_ROWS = 50_000, 64
#: Members, and pairs next to them, that a group lists.
LISTED = 10_000
FOUND_FILE = "found.arrow"
#: How often a model finds a pair's caption, beyond chance and as a share of what is left to find, below which it is
#: said to not know the pairs.
_KNOWN = 0.01


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
    key_column: str | None = None,
    reference_sizes: Sequence[int] = REFERENCES,
    reference_rounds: int = ROUNDS,
) -> PairScan:
    """
    Score how suspect the pairs of a dataset are, with models that were trained on them.

    Three parts, each for what it finds. **Groups**: a backdoor is a set of images that the model puts in a direction
    of their own, whose captions share a word, while half of the pairs with it or more lie far away.
    **Local outliers**: pairs far from their neighbors in random references, which finds sparse poisons such as warps.
    **Duplicates**: equal and near-equal images whose captions disagree, which are targeted poisons; they need no
    model.

    A first pass draws a sample of at most 50,000 pairs, on which directions and references are fitted. A second one
    scores all pairs, each image decoded once for all models, unless the sample has them all. Memory does not grow with
    the number of pairs but for 12 bytes each, and what copies there are. A foreign CLIP does not show the poison: take
    checkpoints of a training on these pairs, early and late ones.

    Under `torch.distributed`, ranks share the pairs. Call it on all of them; all get the whole scan.

    Args:
        models (model, `str` or sequence of them): One dual encoder or several checkpoints of one training, in order:
            objects, folders or Hub ids. All of them are held at once.
        processor (`ProcessorMixin`, *optional*): Of all of them. `None`: the one saved beside the first.
        dataset: N pairs: a dataset with numbered rows, or a stream (`datasets.IterableDataset` or torch's).
        image_column, caption_column (`str`): Its columns.
        batch_size (`int`, defaults to 64), num_workers (`int`, defaults to 0): Of embedding.
        seed (`int`, defaults to 0): Of the sample, the references and the decomposition.
        cache_dir (path, *optional*): A folder that keeps what is done, about 400 bytes a pair. A scan that was stopped
            goes on there, between batches. Several ranks need one, which they share. `None`: a temporary folder.
            A `datasets.Dataset` is known again by its fingerprint, a stream by its first 16 rows, and other data by
            these and their number: give data that changed a folder of its own.
        key_column (`str`, *optional*): Of a stream, the column that tells rows apart. `None`: their running number,
            which only one process knows.
        reference_sizes (sequence of `int`, each at least 18), reference_rounds (`int`): Pairs of a reference, and how
            often they are drawn. Fewer are faster.

    Returns:
        [`PairScan`]: The same for the same seed.

    Raises:
        `ValueError`: If there is no model, a model and the processor do not go together, the dataset or a row of it
            cannot be used, or `cache_dir` holds another scan.
    """
    given = list(models) if isinstance(models, list | tuple) else [models]
    if not given:
        raise ValueError("models is empty: give one model that was trained on these pairs, or several checkpoints")
    if not isinstance(reference_sizes, list | tuple) or not reference_sizes:
        raise ValueError(
            f"reference_sizes={shown(reference_sizes)}; accepted is a list of whole numbers, at least one"
        )
    for size in reference_sizes:
        check_int("reference_sizes", size, minimum=NEIGHBORS + 2)
    for name, value, least in (
        ("reference_rounds", reference_rounds, 1),
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
        ("seed", seed, 0),
    ):
        check_int(name, value, minimum=least)
    columns = {"image_column": image_column, "caption_column": caption_column}
    check_pairs(dataset, columns, "dataset", streams=True)
    if is_stream(dataset) and key_column is not None:
        check_columns(dataset, {"key_column": key_column}, "rows with a key", "dataset", streams=True)
    if not is_stream(dataset):
        key_column = None
        _check_rows(len(dataset))
    if world_size() > 1 and cache_dir is None:
        raise ValueError(f"cache_dir is missing: {world_size()} processes put together in it what they find")
    processor = load_processor(given[0], processor, "processor")
    embedders = [Embedder(model, processor, batch_size) for model in given]
    preprocess = embedders[0].preprocess
    reader = PairReader(dataset, image_column, caption_column, key_column, preprocess, batch_size, num_workers)

    def encoded(pixels: torch.Tensor, captions: Sequence[str]) -> list[Features]:
        return [encode(embedder, pixels, captions) for embedder in embedders]

    folder = None if cache_dir is None else Path(cache_dir)
    if folder is not None and rank() == 0:
        settings = {
            **columns,
            "key_column": key_column,
            "dataset": getattr(dataset, "_fingerprint", None) or reader.first(),
            "processor": _print_of_processor(processor),
            "models": [_print_of(embedder.model) for embedder in embedders],
            "seed": seed,
            "reference_sizes": list(reference_sizes),
            "reference_rounds": reference_rounds,
            "processes": world_size(),
            "num_workers": num_workers if is_stream(dataset) else 0,
            "batch_size": batch_size if is_stream(dataset) else None,
        }
        check_settings(folder, settings)
    _wait()
    with ExitStack() as stack:
        for embedder in embedders:
            stack.enter_context(inference(embedder.model))
        sample = draw_sample(reader, encoded, len(embedders), SAMPLE, seed, folder, BLOCK)
        _check_rows(len(sample.arrivals))
        scorer = Scorer(sample, reference_sizes, reference_rounds, seed)
        held = None
        if sample.complete:
            table = _scored(sample, scorer)
        else:
            held = tempfile.TemporaryDirectory() if folder is None else None
            folder = Path(held.name) if held is not None else folder
            assert folder is not None
            _score_all(reader, encoded, scorer, Parts(folder, rank()))
            _wait()
            table = read_parts(folder)
    if scorer.known - scorer.chance < _KNOWN * (1 - scorer.chance) or scorer.chance == 1:
        logger.warning(
            f"The last model finds a pair's caption among {min(CHOICES, len(sample.arrivals))} in {scorer.known:.1%} "
            f"of the cases, and chance in {scorer.chance:.1%}: it has not learned these pairs, or was not trained on "
            "them, and the scan cannot know which are poisoned. Scan with a checkpoint of a training on them."
        )
    found, groups, duplicates = judged(table, scorer, key_column)
    scores = datasets.Dataset(pa.concat_tables(found)) if sample.complete else _on_disk(folder, found)
    return PairScan(scores, groups, duplicates, scorer.known, scorer.chance, key_column, held)


def judged(
    table: pa.Table, scorer: Scorer, key_column: str | None = None
) -> tuple[Iterator[pa.Table], list[PairGroup], list[Copies]]:
    """
    What follows from the scores of all pairs: the scores that a user sees, block by block, groups, and duplicates.

    Args:
        table (`pa.Table`): Of [`Scorer.table`], of all pairs.
        scorer ([`Scorer`]): Of it.
        key_column (`str`, *optional*): Of a stream.
    """
    if key_column is not None:
        _check_keys(table)
    duplicates = _duplicates(table)
    suspect = suspect_copies(duplicates, len(table))
    if len(suspect) < sum(map(disagrees, duplicates)):
        logger.warning(
            "Many images occur several times with captions that disagree. That is usual in data with a row for each "
            "caption of an image, and says nothing of targeted poisons: give each image one row with all its captions."
        )
    return _ranked(table, duplicates, suspect, scorer.cut, key_column), _groups(table, scorer), duplicates


def _check_rows(rows: int) -> None:
    if rows < LEAST_ROWS:
        raise ValueError(f"dataset has {rows} rows: at least {LEAST_ROWS} are needed to tell what is usual among them")


def _print_of(model: torch.nn.Module) -> str:
    """What tells two states of a model apart: a hash of some values of each parameter."""
    found = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        found.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return found.hexdigest()


def _print_of_processor(processor: Any) -> str:
    """What tells two processors apart: what they make of an image's settings and of a text."""
    settings = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
    tokens = processor.tokenizer(["A photo of two cats, one of them asleep."])["input_ids"]
    return hashlib.blake2b(f"{settings}{tokens}".encode(), digest_size=8).hexdigest()


def _check_keys(table: pa.Table) -> None:
    """That each pair has a key of its own."""
    identities = table.column("identity").to_numpy()
    for rows in partitions(identities, 64):
        rows = rows[np.argsort(identities[rows], kind="stable")]
        twice = rows[1:][np.diff(identities[rows]) == 0]
        if len(twice):
            key = shown(table.column("key")[int(twice[0])].as_py())
            raise ValueError(
                f"key_column: several pairs have the key {key}; accepted is a column in which each row has its own"
            )


def _wait() -> None:
    if world_size() > 1:
        dist.barrier()


def _scored(sample: Sample, scorer: Scorer) -> pa.Table:
    """The scores of a sample that has all pairs, in the order of reading."""
    order = np.argsort(sample.arrivals, kind="stable")
    blocks = [order[start : start + BLOCK] for start in range(0, len(order), BLOCK)]
    return pa.concat_tables(
        scorer.table([features.at(block) for features in sample.features], sample.rows.at(block)) for block in blocks
    )


def _score_all(reader: PairReader, encoded: Any, scorer: Scorer, parts: Parts) -> None:
    """Score this rank's pairs from where an earlier call stopped."""
    places = {place.worker: place for place in parts.places()}
    tables: list[pa.Table] = []
    for batch in reader.batches(list(places.values())):
        places[batch.place.worker] = batch.place
        tables.append(scorer.table(encoded(batch.pixels, first_captions(batch.rows)), batch.rows))
        if sum(map(len, tables)) >= BLOCK:
            parts.write(tables, list(places.values()))
            tables = []
    if tables:
        parts.write(tables, list(places.values()))


def _duplicates(table: pa.Table) -> list[Copies]:
    pairs = near_pairs(table.column("fingerprint").to_numpy())
    rows = np.unique(pairs)
    if not len(rows):
        return []
    picked = table.select(["thumbnail", "captions"]).take(pa.array(rows))
    thumbnails = np.stack([np.frombuffer(value, dtype=np.uint8) for value in picked["thumbnail"].to_pylist()])
    return find_copies(pairs, rows, thumbnails, [words_of([text]) for text in picked["captions"].to_pylist()])


def _groups(table: pa.Table, scorer: Scorer) -> list[PairGroup]:
    """The listed groups with their members."""
    count = len(scorer.groups)
    sizes = np.zeros(count, dtype=np.int64)
    members: list[tuple[Any, Any]] = [(np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64))] * count
    others: list[list[int]] = [[] for _ in range(count)]
    start = 0
    for part in table.select(["groups", "places"]).to_batches():
        groups = part.column("groups")
        rows = start + pc.list_parent_indices(groups).to_numpy().astype(np.int64)
        numbers, places = groups.flatten().to_numpy(), part.column("places").flatten().to_numpy()
        start += len(part)
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(count + 1))
        for number in range(count):
            of_group = order[bounds[number] : bounds[number + 1]]
            inside, outside = of_group[places[of_group] > 1], of_group[places[of_group] <= 1]
            sizes[number] += len(inside)
            found = [
                np.concatenate(both) for both in zip(members[number], (places[inside], rows[inside]), strict=True)
            ]
            members[number] = _farthest(*found) if len(found[0]) > 2 * LISTED else (found[0], found[1])
            others[number] += rows[outside][: LISTED - len(others[number])].tolist()
    return [
        PairGroup(
            group.word,
            group.weight,
            group.coherence,
            group.closure,
            group.base,
            checkpoint,
            int(size),
            tuple(_farthest(*inside)[1].tolist()),
            tuple(outside),
            separation=group.separation,
        )
        for (checkpoint, group), size, inside, outside in zip(scorer.groups, sizes, members, others, strict=True)
    ]


def _farthest(places: NDArray[np.float32], rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """As many members as are listed, the farthest out first."""
    first = np.lexsort((rows, -places))[:LISTED]
    return places[first], rows[first]


def _on_disk(folder: Path | None, tables: Iterator[pa.Table]) -> datasets.Dataset:
    """Tables, of which memory holds none; the first rank writes them for all."""
    assert folder is not None
    path = folder / FOUND_FILE
    if rank() == 0:
        first = next(tables)
        write_shard(path, first.schema, itertools.chain([first], tables))
    _wait()
    return datasets.Dataset.from_file(str(path))


def _ranked(
    table: pa.Table, duplicates: Sequence[Copies], suspect: Sequence[Copies], cut: float, key_column: str | None
) -> Iterator[pa.Table]:
    """The scores that a user sees, with the ranks over all parts, block by block."""
    suspicious: dict[int, float] = {}
    copied: dict[int, int] = {}
    for found in duplicates:
        copied |= dict.fromkeys(found.rows, len(found.rows))
    for found in suspect:
        suspicious |= dict.fromkeys(found.rows, found.suspicion)
    rank_of = _ranks(table, suspicious, cut)
    names = ["group", "k_distance", "slof", "dao", "projected_slof", "pair_distance", "distrust"]
    start = 0
    for part in table.to_batches(max_chunksize=BLOCK):
        rows = range(start, start + len(part))
        start += len(part)
        by_group = part.column("group").to_numpy() > cut
        by_copies = np.array([row in suspicious for row in rows], dtype=bool)
        why = np.where(by_copies, "copies", np.where(by_group, "group", ""))
        columns = {name: part.column(name) for name in names} | {
            "copies": pa.array([copied.get(row, 1) for row in rows], pa.int64()),
            "suspect": pa.array(by_group | by_copies),
            "why": pa.array(why.tolist(), pa.string()),
            "rank": pa.array(rank_of[rows.start : rows.stop].astype(np.int64)),
        }
        yield pa.table(columns | ({} if key_column is None else {"key": part.column("key")}))


def _ranks(table: pa.Table, suspicious: dict[int, float], cut: float) -> NDArray[np.int32]:
    """From 1, the most suspect first: copies that disagree, then the votes, then what is far from its neighbors."""
    # One number of 8 bytes a row, sorted in place: how little suspect it is, then the row.
    packed = np.empty(len(table), dtype=np.uint64)
    start = 0
    for part in table.select(["group", "usual"]).to_batches(max_chunksize=BLOCK):
        group, usual = (part.column(name).to_numpy() for name in ("group", "usual"))
        by_group = group > cut
        value = np.where(by_group, group, usual)
        level = by_group + value / (1 + value)
        for row in range(start, start + len(part)):
            if row in suspicious:
                level[row - start] = 2 + suspicious[row] / (1 + suspicious[row])
        bits = np.float32(3) - level.astype(np.float32)
        packed[start : start + len(part)] = bits.view(np.uint32).astype(np.uint64) << np.uint64(32)
        packed[start : start + len(part)] |= np.arange(start, start + len(part), dtype=np.uint64)
        start += len(part)
    packed.sort()
    ranks = np.empty(len(packed), dtype=np.int32)
    for first in range(0, len(packed), BLOCK):
        rows = (packed[first : first + BLOCK] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        ranks[rows] = np.arange(first + 1, first + 1 + len(rows))
    return ranks
