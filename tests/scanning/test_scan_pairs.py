"""A scan of pairs from end to end, on a model that has learned a planted backdoor by construction."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from scipy.stats import rankdata
from support.training import digits, small_model

from hf_robust_clip import PairScan, scan_pairs
from hf_robust_clip.cli.main import main
from hf_robust_clip.data.digits import digit_processor
from hf_robust_clip.scanning import scoring
from hf_robust_clip.scanning.features import Features
from hf_robust_clip.telling.scan_page import render_pair_scan


@pytest.fixture(scope="module")
def pairs() -> datasets.Dataset:
    rows = digits("train").select(range(120))
    image = rows[0]["image"]
    copies = [{**rows[0], "caption": f"{word} thing"} for word in ("first", "second", "third", "fourth")]
    assert image is not None
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_list(copies, features=rows.features)])


@pytest.fixture(scope="module")
def scan(pairs: datasets.Dataset) -> PairScan:
    return scan_pairs([small_model(0), small_model(1)], digit_processor(), pairs)


def test_every_row_has_all_scores_and_a_rank_of_its_own(scan: PairScan, pairs: datasets.Dataset) -> None:
    assert len(scan.scores) == len(pairs)
    assert sorted(scan.scores["rank"]) == list(range(1, len(pairs) + 1))
    for name in ("group", "k_distance", "slof", "dao", "projected_slof", "pair_distance"):
        assert np.isfinite(np.asarray(scan.scores[name])).all()


@pytest.mark.parametrize("poisons", [0, 40, 60, 200])
def test_the_cut_off_takes_all_that_have_the_highest_vote(poisons: int) -> None:
    votes = np.linspace(0, 0.1, 1000, dtype=np.float32) * (poisons > 0)
    votes[:poisons] = 1.5
    suspect = votes > scoring.cut_off(votes)
    assert suspect[:poisons].all() and suspect.sum() <= max(poisons, 50)


def test_below_the_cut_off_votes_count_four_times_as_much_as_slof(scan: PairScan) -> None:
    votes, rank, slof = (np.asarray(scan.scores[name]) for name in ("group", "rank", "slof"))
    rest = np.flatnonzero(~np.asarray(scan.scores["suspect"]))
    place = np.minimum(rankdata(-votes) - 1, 4 * (rankdata(-slof) - 1))
    assert np.all(np.diff(place[rest[np.argsort(rank[rest])]]) > -1e-3)


def test_an_image_with_captions_that_disagree_is_found_without_knowing_anything(scan: PairScan) -> None:
    assert scan.disagreeing[0].rows == (0, 120, 121, 122, 123)
    rank = np.asarray(scan.scores["rank"])
    assert set(np.flatnonzero(rank <= 5)) == {0, 120, 121, 122, 123}
    assert [scan.scores["why"][row] for row in (0, 123)] == ["copies", "copies"]
    assert scan.scores["copies"][120] == 5


def test_keep_leaves_out_the_most_suspect_share_and_keeps_order_and_columns(
    scan: PairScan, pairs: datasets.Dataset
) -> None:
    kept = scan.keep(pairs, drop=0.1)
    assert len(kept) == len(pairs) - round(0.1 * len(pairs)) and kept.column_names == pairs.column_names
    rank = np.asarray(scan.scores["rank"])
    expected = [caption for caption, place in zip(pairs["caption"], rank, strict=True) if place > round(12.4)]
    assert kept["caption"][:] == expected
    assert len(scan.keep(pairs, drop=0)) == len(pairs)


def test_keep_leaves_out_all_suspects_and_a_share_that_leaves_some_in_is_warned_of(
    scan: PairScan, pairs: datasets.Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    first = np.asarray(scan.scores["rank"]) <= 31
    many = replace(scan, scores=scan.scores.remove_columns("suspect").add_column("suspect", first))
    assert many.suspects == 31
    assert many.keep(pairs, None)["caption"][:] == pairs.select(np.flatnonzero(~first))["caption"][:]
    assert not caplog.text
    assert len(many.keep(pairs, 0.1)) == 112
    assert "drop=0.1 leaves 19 of the 31 suspect pairs in, drop=0.25 none." in caplog.text
    caplog.clear()
    assert len(many.keep(pairs, 0.25)) == 93 and not caplog.text


@pytest.mark.parametrize("drop", [1, -0.1, True, "0.1"])
def test_a_share_that_is_not_one_is_refused(scan: PairScan, pairs: datasets.Dataset, drop: Any) -> None:
    with pytest.raises(ValueError, match=r"drop must be a share of the pairs in \[0, 1\), but is"):
        scan.keep(pairs, drop)


def test_the_trusted_half_is_the_least_distrusted(scan: PairScan, pairs: datasets.Dataset) -> None:
    distrust = np.asarray(scan.scores["distrust"])
    trusted = scan.trusted(pairs.add_column("row", np.arange(len(pairs))))
    assert len(trusted) == 62 and max(distrust[trusted["row"]]) <= min(np.delete(distrust, trusted["row"]))
    assert trusted["row"][:] == sorted(trusted["row"])
    with pytest.raises(ValueError, match=r"share must be a share of the pairs in \(0, 1\], but is 0"):
        scan.trusted(pairs, 0)


def test_a_second_opinion_ranks_the_groups_by_the_cleaned_model(scan: PairScan, pairs: datasets.Dataset) -> None:
    verified = scan.verified(pairs, small_model(2), digit_processor())
    distance = np.asarray(verified.scores["cleaned_distance"])
    ranks = np.argsort(np.argsort(distance)) / len(distance)
    group = verified.groups[0]
    assert group.cleaned_rank == pytest.approx(ranks[list(group.members)].mean(), abs=0.02)
    assert group.confirmed == (group.cleaned_rank >= 0.65) and scan.groups[0].confirmed is None


def test_verify_cleans_on_the_trusted_pairs_and_asks_that_model(scan: PairScan, pairs: datasets.Dataset) -> None:
    given: list[Any] = []

    def clean(trusted: datasets.Dataset) -> Any:
        given.append(trusted)
        return small_model(2)

    found = scan.verify(pairs, clean, digit_processor(), batch_size=17)
    assert given[0]["caption"][:] == scan.trusted(pairs)["caption"][:]
    expected = scan.verified(pairs, small_model(2), digit_processor(), batch_size=17)
    assert found.scores["cleaned_distance"][:] == expected.scores["cleaned_distance"][:]
    assert found.groups == expected.groups
    again = found.verified(pairs, small_model(0), digit_processor(), batch_size=17)
    assert again.scores.column_names == found.scores.column_names
    assert again.scores["cleaned_distance"][:] != found.scores["cleaned_distance"][:]
    with pytest.raises(TypeError, match="clean returned None; accepted is the cleaned model"):
        scan.verify(pairs, lambda trusted: None)


def test_flag_adds_what_is_suspect_and_why(scan: PairScan, pairs: datasets.Dataset) -> None:
    flagged = scan.flag(pairs)
    assert flagged.column_names == [*pairs.column_names, "suspect", "suspect_why"]
    assert flagged[121]["suspect"] and flagged[121]["suspect_why"] == "copies"
    with pytest.raises(ValueError, match="dataset has 3 rows, but 124 were scanned"):
        scan.flag(pairs.select(range(3)))


def test_the_same_seed_gives_the_same_scan(scan: PairScan, pairs: datasets.Dataset) -> None:
    again = scan_pairs([small_model(0), small_model(1)], digit_processor(), pairs, batch_size=17)
    assert np.allclose(scan.scores["slof"], again.scores["slof"], rtol=1e-3)
    assert [group.word for group in again.groups[:3]] == [group.word for group in scan.groups[:3]]


def test_how_well_a_model_knows_the_pairs_is_measured() -> None:
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(1024, 64)).astype(np.float16)
    captions = np.array([f"{number}" for number in range(1024)], dtype=object)
    assert scoring.known(Features(texts, texts, texts), captions, seed=0) == (1, 1 / 256)
    foreign = rng.normal(size=(1024, 64)).astype(np.float16)
    assert scoring.known(Features(texts, foreign, texts), captions, seed=0)[0] < 5 / 256
    few = np.arange(1024) % 4
    found, chance = scoring.known(Features(texts, foreign, texts[few]), captions[few], seed=0)
    assert found == pytest.approx(chance, abs=0.05) and chance == pytest.approx(0.25, abs=0.01)


def test_a_model_that_does_not_know_the_pairs_is_said_to(
    pairs: datasets.Dataset, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "known", lambda *args: (1 / 256, 1 / 256))
    scan_pairs(small_model(0), digit_processor(), pairs)
    assert "has not learned these pairs" in caplog.text


def test_bad_arguments_are_named(pairs: datasets.Dataset) -> None:
    for models, dataset, message in (
        ([], pairs, "models is empty"),
        (small_model(0), pairs.select(range(10)), "dataset has 10 rows: at least 64"),
        (small_model(0), pairs.remove_columns("caption"), "caption"),
    ):
        with pytest.raises(ValueError, match=message):
            scan_pairs(models, digit_processor(), dataset)


def test_the_page_shows_groups_and_escapes_captions(scan: PairScan, pairs: datasets.Dataset) -> None:
    marked = pairs.map(lambda row: {"caption": f"<script>{row['caption']}"})
    page = render_pair_scan(scan, marked)
    assert "<script" not in page.replace("&lt;script", "") and "&lt;script&gt;" in page
    assert scan.groups[0].word in page and "What this scan does not find" in page


@pytest.mark.parametrize("command", ["scan-pairs", "scan-checkpoint"])
def test_a_scan_without_the_extra_of_its_page_fails_before_it_begins(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    flags = [] if command == "scan-pairs" else ["--classes", "a,b,c"]
    (tmp_path / "pairs.csv").write_text("image,caption\n")
    given = [command, "you/model", "--data", str(tmp_path / "pairs.csv"), "--output-dir", str(tmp_path / "out")]
    assert main([*given, *flags]) == 1
    assert "hf-robust-clip[report]" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.training
def test_the_command_writes_what_it_says(
    pairs: datasets.Dataset, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model(0).save_pretrained(tmp_path / "model")
    digit_processor().save_pretrained(tmp_path / "model")
    pairs.to_parquet(tmp_path / "pairs.parquet")
    command = ["scan-pairs", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.parquet")]
    verify = ["--verify", "--verify-epochs", "1"]
    assert main([*command, "--output-dir", str(tmp_path / "out"), "--drop", "0.1", *verify]) == 0
    printed = capsys.readouterr().out
    assert "Cleaning the last model on the 62 least suspect pairs" in printed
    assert "confirmed" in printed
    assert (tmp_path / "out" / "cleaned" / "model.safetensors").is_file()
    assert "124 pairs under 1 model(s)" in printed and "112 pairs stay" in printed
    scores = datasets.Dataset.from_parquet(str(tmp_path / "out" / "scores.parquet"))
    assert len(scores) == 124
    found = json.loads((tmp_path / "out" / "groups.json").read_text())
    assert found["duplicates"][0]["rows"] == [0, 120, 121, 122, 123]
    assert len(datasets.load_from_disk(str(tmp_path / "out" / "kept"))) == 112
    assert "Suspect pairs" in (tmp_path / "out" / "report.html").read_text()
    stream = ["--streaming", "--cache-dir", str(tmp_path / "cache"), "--drop", "0.1"]
    assert main([*command, "--output-dir", str(tmp_path / "streamed"), *stream]) == 0
    assert "112 pairs stay" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(PairScan, "suspects", 20)
        assert main([*command, "--output-dir", str(tmp_path / "suspects"), "--drop", "suspects"]) == 0
    assert "20 are above the default cut-off" in (printed := capsys.readouterr().out) and "104 pairs stay" in printed
    one, other = (datasets.load_from_disk(str(tmp_path / name / "kept")) for name in ("out", "streamed"))
    assert one.features == other.features and one.info.description == other.info.description
    stored = [dataset.cast_column("image", datasets.Image(decode=False))[:] for dataset in (one, other)]
    assert stored[0] == stored[1] and sorted(path.name for path in (tmp_path / "streamed").iterdir()) == [
        "groups.json",
        "kept",
        "report.html",
        "scores.parquet",
    ]
    for flags, message in (
        (["--streaming", "--verify"], "--verify trains on the least suspect half of the pairs"),
        (["--key-column", "label"], "--key-column goes with --streaming"),
        (["--verify-epochs", "2"], "--verify-epochs goes with --verify"),
    ):
        assert main([*command, "--output-dir", str(tmp_path / "other"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--output-dir", str(tmp_path / "other"), "--dry-run"]) == 0
    (tmp_path / "scan.yaml").write_text(resolved := capsys.readouterr().out)
    assert main(["scan-pairs", "--config", str(tmp_path / "scan.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == resolved and str(tmp_path / "model") in resolved
    with pytest.raises(SystemExit):
        main(["scan-pairs", *command[2:], "--output-dir", str(tmp_path / "other")])
    assert "the following arguments are required: MODELS" in capsys.readouterr().err
    assert main([*command, "--output-dir", str(tmp_path / "other"), "--drop", "2"]) == 2
    assert "--drop: 2.0 is not a share of the pairs" in capsys.readouterr().err
    assert main([*command, "--output-dir", str(tmp_path / "other"), "--drop", "all"]) == 2
    assert "--drop: all is not a share of the pairs between 0 and 1, such as 0.1, or 'suspects'" in (
        capsys.readouterr().err
    )
