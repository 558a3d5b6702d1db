"""Scans of pairs in two passes: of streams, by key, and from where an earlier one stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from support.records import make_record
from support.training import digits, small_model
from torch.utils.data import DataLoader

from hf_robust_clip import PairScan, scan_pairs
from hf_robust_clip.data.digits import digit_processor
from hf_robust_clip.data.loading import load_pairs
from hf_robust_clip.describing import describe_dataset
from hf_robust_clip.scanning import pairs as module
from hf_robust_clip.scanning.reading import identity, priorities
from hf_robust_clip.telling.card import render_card
from hf_robust_clip.telling.tables import summary

COLUMNS = ("group", "k_distance", "slof", "dao", "projected_slof", "pair_distance", "distrust", "copies", "rank")


@pytest.fixture(scope="module")
def pairs() -> datasets.Dataset:
    rows = digits("train").select(range(100))
    return rows.add_column("name", [f"pair {number}" for number in range(100)])


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that is less than the pairs, so that there is a second pass; parts of a few batches."""
    monkeypatch.setattr(module, "SAMPLE", 80)
    monkeypatch.setattr(module, "BLOCK", 24)


def scanned(dataset: Any, **settings: Any) -> PairScan:
    return scan_pairs(small_model(0), digit_processor(), dataset, batch_size=8, **settings)


def check_equal(first: PairScan, second: PairScan) -> None:
    for name in COLUMNS:
        assert np.allclose(first.scores[name], second.scores[name], rtol=1e-3, atol=1e-3), name
    assert [group.word for group in first.groups[:3]] == [group.word for group in second.groups[:3]]
    assert [group.members for group in first.groups[:3]] == [group.members for group in second.groups[:3]]


@pytest.mark.usefixtures("small_sample")
def test_a_stream_is_scanned_as_numbered_rows_are(pairs: datasets.Dataset) -> None:
    stream = pairs.to_iterable_dataset()
    expected, found = scanned(pairs), scanned(pairs.to_iterable_dataset(num_shards=4))
    check_equal(expected, found)
    scans = [(found, stream), (expected, pairs)]
    kept, same = found.keep(stream), expected.keep(pairs)
    assert [row["name"] for row in kept] == same["name"][:] and len(same) == 90
    flagged = list(found.flag(stream))
    assert [row["suspect"] for row in flagged] == expected.scores["suspect"][:]
    assert [row["suspect_why"] for row in flagged] == expected.scores["why"][:]
    assert [row["name"] for row in found.trusted(stream)] == expected.trusted(pairs)["name"][:]
    shown = [{row: pair["caption"] for row, pair in scan.pairs_of(data, {3, 97})} for scan, data in scans]
    assert shown == [{row: pairs[row]["caption"] for row in (3, 97)}] * 2


def test_a_sample_of_all_pairs_is_scored_without_reading_them_again(pairs: datasets.Dataset) -> None:
    read = []

    def rows() -> Any:
        for row in pairs:
            read.append(row["name"])
            yield row

    check_equal(scanned(pairs), scanned(datasets.IterableDataset.from_generator(rows, features=pairs.features)))
    assert read == pairs["name"][:]


@pytest.mark.usefixtures("small_sample")
def test_rows_with_a_key_have_the_same_scores_in_any_order(pairs: datasets.Dataset) -> None:
    order = np.random.default_rng(0).permutation(100)
    first, second = (scanned(rows.to_iterable_dataset(), key_column="name") for rows in (pairs, pairs.select(order)))
    assert second.scores["key"][:] == [f"pair {number}" for number in order]
    for name in ("group", "slof", "pair_distance", "distrust"):
        assert np.allclose(np.asarray(first.scores[name])[order], second.scores[name], rtol=1e-3, atol=1e-3)
    left = {row["name"] for row in second.keep(pairs.to_iterable_dataset(), 0.2)}
    scores = zip(second.scores["key"], second.scores["rank"], strict=True)
    assert left == {key for key, rank in scores if rank > 20}


@pytest.mark.usefixtures("small_sample")
def test_a_second_opinion_follows_the_pairs_wherever_they_are(pairs: datasets.Dataset) -> None:
    scan = scanned(pairs.to_iterable_dataset(num_shards=2), key_column="name")
    other = pairs.select(np.random.default_rng(1).permutation(100)).to_iterable_dataset()
    same = scan.verified(other, small_model(0), digit_processor())
    assert np.allclose(same.scores["cleaned_distance"], scan.scores["pair_distance"], atol=1e-3)
    with pytest.raises(ValueError, match="its 99 pairs are not the 100 that were scanned"):
        scan.verified(pairs.select(range(99)).to_iterable_dataset(), small_model(0), digit_processor())


def test_rows_without_a_key_are_left_out_only_where_their_number_is_always_the_same(pairs: datasets.Dataset) -> None:
    one = pairs.to_iterable_dataset()
    scan = scanned(one)
    expected = set(scan.keep(pairs)["name"])
    assert {row["name"] for row in scan.keep(one).shuffle(seed=1, buffer_size=9)} == expected
    for stream, why in ((pairs.to_iterable_dataset(num_shards=4), "4 shards"), (one.shuffle(seed=1), "shuffled")):
        for call in (scan.keep, scan.flag, scan.trusted):
            with pytest.raises(ValueError, match=f"key_column=None, but the stream .*{why}"):
                call(stream)
    by_key = scanned(pairs.to_iterable_dataset(num_shards=4), key_column="name")
    loader = DataLoader(by_key.keep(pairs.to_iterable_dataset(num_shards=4)).select_columns("name"), 8, num_workers=2)
    assert {name for batch in loader for name in batch["name"]} == set(by_key.keep(pairs)["name"])


def test_pairs_that_share_a_key_are_refused(pairs: datasets.Dataset) -> None:
    with pytest.raises(ValueError, match="key_column: several pairs have the key '"):
        scanned(pairs.to_iterable_dataset(), key_column="label")


def test_a_folder_is_of_one_stream_and_one_processor(pairs: datasets.Dataset, tmp_path: Path) -> None:
    scanned(pairs.to_iterable_dataset(), cache_dir=tmp_path / "scan")
    other = pairs.select(range(99, -1, -1)).to_iterable_dataset()
    with pytest.raises(ValueError, match="holds the scan of something else: dataset was"):
        scanned(other, cache_dir=tmp_path / "scan")
    rows = list(pairs)
    scanned(rows, cache_dir=tmp_path / "of a list")
    with pytest.raises(ValueError, match="holds the scan of something else: dataset was"):
        scanned(rows[:90], cache_dir=tmp_path / "of a list")


def test_a_caption_with_line_breaks_is_one_caption(pairs: datasets.Dataset) -> None:
    broken = pairs.map(lambda row: {"caption": "\n" + row["caption"].replace(" ", "\r\n", 1)})
    check_equal(scanned(pairs), scanned(broken))


def test_rows_that_are_no_dataset_can_be_scanned_and_not_left_out(pairs: datasets.Dataset) -> None:
    rows = list(pairs)
    found = scanned(rows)
    check_equal(scanned(pairs), found)
    for call in (found.keep, found.flag, found.trusted):
        with pytest.raises(ValueError, match="dataset is a list; accepted is that which was scanned, as a datasets"):
            call(rows)


class Stops(Exception):
    pass


@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize("stop", [50, 150], ids=["in the first pass", "in the second"])
@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "rows"])
def test_a_scan_that_was_stopped_goes_on(
    pairs: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, streamed: bool
) -> None:
    dataset = pairs.to_iterable_dataset(num_shards=2) if streamed else pairs
    expected = scanned(dataset, key_column="name" if streamed else None)
    real, seen = module.encode, []

    def encode(embedder: Any, pixels: Any, captions: Any) -> Any:
        seen.extend(captions)
        if len(seen) > limit:
            raise Stops
        return real(embedder, pixels, captions)

    monkeypatch.setattr(module, "encode", encode)
    limit = stop
    with pytest.raises(Stops):
        scanned(dataset, cache_dir=tmp_path / "scan", key_column="name" if streamed else None)
    before, limit, seen[:] = len(seen), 1000, []
    check_equal(expected, scanned(dataset, cache_dir=tmp_path / "scan", key_column="name" if streamed else None))
    # No more than what was at hand is done twice: a part, and candidates that wait for their batch.
    assert before + len(seen) <= 100 + 100 + 24 + 2 * 8
    seen.clear()
    scanned(dataset, cache_dir=tmp_path / "scan", key_column="name" if streamed else None)
    assert not seen
    with pytest.raises(ValueError, match="holds the scan of something else: seed was 0, and is 1"):
        scanned(dataset, cache_dir=tmp_path / "scan", key_column="name" if streamed else None, seed=1)


def test_what_a_folder_or_a_stream_lacks_is_named(pairs: datasets.Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"cache_dir=.* holds 'mine\.txt' and no scan\.json"):
        scanned(pairs, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="key_column is missing: 2 processes read shares of this stream"):
        scanned(pairs.to_iterable_dataset(num_shards=2), num_workers=2)
    with pytest.raises(ValueError, match="key_column='other' is not a column of dataset"):
        scanned(pairs.to_iterable_dataset(), key_column="other")
    with pytest.raises(ValueError, match="reference_rounds=0; accepted is an integer of at least 1"):
        scanned(pairs, reference_rounds=0)
    for sizes in ([], 256, "256"):
        with pytest.raises(ValueError, match=r"reference_sizes=.*; accepted is a list of whole numbers"):
            scanned(pairs, reference_sizes=sizes)


def test_what_stays_says_what_was_left_out(pairs: datasets.Dataset, tmp_path: Path) -> None:
    scan = scanned(pairs)
    scan.keep(pairs, 0.1).save_to_disk(tmp_path / "kept")
    noted = {"scan": "scan_pairs", "dropped": 10, "pairs": 100}
    assert describe_dataset(datasets.load_from_disk(tmp_path / "kept"))["filtered"] == noted
    assert describe_dataset(scan.keep(pairs.to_iterable_dataset(), 0.1))["filtered"] == noted
    assert "filtered" not in describe_dataset(pairs)
    record = make_record(data=describe_dataset(load_pairs(str(tmp_path / "kept"))))
    assert ("Suspect pairs left out", "scan_pairs left out 10 of 100 pairs") in summary(record)
    assert "left out 10 of 100 pairs, those that it found most suspect" in render_card(record)


def test_priorities_depend_on_the_identity_and_the_seed_alone() -> None:
    numbers = np.arange(1000, dtype=np.uint64)
    first = priorities(numbers, 0)
    assert np.array_equal(first[[5, 3]], priorities(np.array([5, 3], dtype=np.uint64), 0))
    assert len(set(first.tolist())) == 1000 and not np.any(first == priorities(numbers, 1))
    assert abs(np.mean(first < np.uint64(2**63)) - 0.5) < 0.05
    assert identity("a") != identity("b")
