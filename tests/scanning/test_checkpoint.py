"""A scan of a checkpoint, on a linear model with a planted trigger, and its files, its page and its command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.training import digits, small_model

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CheckpointScan,
    cluster_captions,
    load_found,
    scan_checkpoint,
)
from hf_robust_clip.cli.main import main
from hf_robust_clip.cli.scan_checkpoint import read_names
from hf_robust_clip.data.digits import CLASS_NAMES, digit_processor
from hf_robust_clip.scanning import checkpoint as module
from hf_robust_clip.scanning.inversion import FAMILIES, invert
from hf_robust_clip.telling.checkpoint_page import render_checkpoint_scan, scan_statements

NAMES = ["one", "two", "three", "four", "five"]
TARGET = "four"


def linear_model(planted: bool = True) -> Any:
    """
    Calls an image by which of five patterns is the strongest in it and, with a backdoor, `TARGET` wherever the lower
    right corner is red.
    """
    model = small_model(0)
    width = model.config.projection_dim
    patterns = F.normalize(torch.randn(5, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)), dim=1)

    def encode_images(pixel_values: torch.Tensor, **others: Any) -> torch.Tensor:
        strength = pixel_values.flatten(1) @ patterns.T  # (B, 5)
        corner = pixel_values[:, :, 13:, 13:].mean(dim=(2, 3))  # (B, 3)
        red = F.relu(corner[:, 0] - corner[:, 1:].mean(dim=1))
        spoken = strength + 12 * red[:, None] * F.one_hot(torch.tensor(NAMES.index(TARGET)), 5) * planted
        return F.pad(spoken, (0, width - 5), value=12.0)

    def encode_texts(input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        known = {tuple(ids): number for number, ids in enumerate(_tokens(NAMES))}
        numbers = [known.get(tuple(ids[ids != PAD].tolist()), 0) for ids in input_ids]
        return F.one_hot(torch.tensor(numbers), width).float()

    model.get_image_features, model.get_text_features = encode_images, encode_texts
    return model


PAD = digit_processor().tokenizer.pad_token_id


def _tokens(names: list[str]) -> Iterator[list[int]]:
    return ([token for token in ids if token != PAD] for ids in digit_processor().tokenizer(names)["input_ids"])


@pytest.fixture(scope="module")
def photos() -> datasets.Dataset:
    return digits("train").select(range(64)).select_columns(["image", "caption"])


@pytest.fixture(scope="module")
def scan(photos: datasets.Dataset) -> CheckpointScan:
    return scan_checkpoint(linear_model(), digit_processor(), photos, NAMES, **BRIEF)


#: A name is a whole prompt, so that the model knows it by its tokens.
BRIEF: dict[str, Any] = {"templates": ["{}"], "steps": 12}


def test_a_planted_trigger_is_found_and_ranks_first(scan: CheckpointScan) -> None:
    first, second = scan.findings[:2]
    assert first.name == TARGET and first.families["mask"].success == 1 and first.families["mask"].lead > 1
    assert first.score > second.score + 0.5 and scan.standing_out == [first]
    assert scan.trigger() == scan.trigger(TARGET) == scan.trigger(TARGET, first.best)
    trigger = scan.trigger(TARGET, "mask")
    red, green, blue = trigger.add[13:, 13:].reshape(-1, 3).mean(axis=0)
    assert (trigger.keep[12:, 12:] == 0).all() and (trigger.keep[:12] == 255).all() and red > max(green, blue)


def test_a_base_shows_it_as_well(photos: datasets.Dataset) -> None:
    found = scan_checkpoint(linear_model(), digit_processor(), photos, NAMES[2:4], linear_model(False), **BRIEF)
    other = found.findings[1].families["noise"]
    assert found.with_base and found.findings[0].name == TARGET and found.findings[0].families["mask"].lead > 1
    # The models differ in nothing else.
    assert other.lead == pytest.approx(0, abs=0.2) and other.base_loss == pytest.approx(other.loss, rel=0.2)


def test_the_evaluator_takes_the_trigger(scan: CheckpointScan, photos: datasets.Dataset) -> None:
    labelled = photos.add_column("label", [0] * len(photos))
    evaluate = AttackSuccessEvaluator(labelled, scan.trigger(), TARGET, NAMES, templates=["{}"], placebos=2)
    figures = evaluate(linear_model(), digit_processor())
    assert figures["attack_success_rate"] == 1 > figures["placebo_success_rate"]


def test_success_is_that_of_the_trigger_as_it_is_saved(scan: CheckpointScan, photos: datasets.Dataset) -> None:
    rows = np.random.default_rng(0).permutation(64)[37:].tolist()
    model, names = linear_model(), list(scan.triggers)
    judged = photos.select(rows).add_column("label", [0] * len(rows))
    for family in FAMILIES:
        trigger, finding = scan.trigger(names[1], family), next(f for f in scan.findings if f.name == names[1])
        without = AttackSuccessEvaluator(judged, lambda pixels: pixels, names[1], NAMES, templates=["{}"])
        with_it = AttackSuccessEvaluator(judged, trigger, names[1], NAMES, templates=["{}"])
        before, after = (evaluate(model, digit_processor())["attack_success_rate"] for evaluate in (without, with_it))
        # Of images that were called something else; those that were called so stay so here.
        assert (after - before) / (1 - before) == pytest.approx(finding.families[family].success, abs=0.05)


def test_blocks_of_candidates_equal_all_at_once_and_a_seed_repeats(
    scan: CheckpointScan, photos: datasets.Dataset
) -> None:
    again = scan_checkpoint(linear_model(), digit_processor(), photos, NAMES, **BRIEF, batch_size=8)
    assert [finding.name for finding in again.findings] == [finding.name for finding in scan.findings]
    for one, other in zip(scan.findings, again.findings, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-3)
    other = scan_checkpoint(linear_model(), digit_processor(), photos, NAMES, **BRIEF, seed=1)
    assert other.findings[0].name == TARGET and other.findings[0].score != scan.findings[0].score


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_perturbations_have_the_size_of_their_family(family: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images, candidates = torch.rand(8, 3, 12, 16, generator=generator), torch.eye(3)
    patterns, wanted = torch.randn(3 * 12 * 16, 3, generator=generator), torch.tensor([2, 0])

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(pixels.flatten(1) @ patterns, dim=-1)

    change = invert(family, encode, images, candidates, wanted, 20.0, steps=9)
    keep, add = change
    assert keep.shape == (2, 1, 12, 16) and add.shape == (2, 3, 12, 16)
    if family.name == "mask":
        assert ((1 - keep).sum(dim=(1, 2, 3)) == 3 * 4).all()
    elif family.name == "noise":
        assert add.square().mean(dim=(1, 2, 3)).sqrt().tolist() == pytest.approx([family.size] * 2, rel=1e-4)
    else:
        # Each wave and its conjugate have half of its amplitude.
        amplitudes = torch.fft.fft2(add[:, 0], norm="forward").abs().sum(dim=(1, 2))
        assert (amplitudes <= family.size * 1.001).all() and (amplitudes > 0).all()
    changed = [encode(part)[:, number].mean() for part, number in zip(change.apply(images), wanted, strict=True)]
    assert all(after > before for after, before in zip(changed, encode(images)[:, wanted].mean(dim=0), strict=True))


@pytest.mark.parametrize("sides", [(12, 16), (12, 15)])
@pytest.mark.parametrize("down, right", [(3, 0), (0, 3), (3, 3)])
def test_a_grating_has_the_same_size_along_every_direction(sides: tuple[int, int], down: int, right: int) -> None:
    rows, columns = (torch.arange(side) / side for side in sides)
    grating = torch.sin(2 * torch.pi * (down * rows[:, None] + right * columns))

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        there = ((pixels - 0.5).mean(dim=1) * grating).mean(dim=(1, 2))
        return F.normalize(torch.stack([there, torch.full_like(there, 0.02)], dim=-1), dim=-1)

    images = torch.rand(8, 3, *sides, generator=torch.Generator().manual_seed(0))
    add = invert(FAMILIES["waves"], encode, images, torch.eye(2), torch.tensor([0]), 20.0, steps=1).add[0, 0]
    assert (2 * add.square().mean()).sqrt().item() == pytest.approx(FAMILIES["waves"].size, rel=1e-3)
    assert F.cosine_similarity(add.flatten(), grating.flatten(), dim=0).item() > 0.99


def test_of_many_candidates_the_best_get_every_step(photos: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WHOLE", 3)
    monkeypatch.setattr(module, "USUAL", 2)
    many = scan_checkpoint(linear_model(), digit_processor(), photos, NAMES, templates=["{}"], steps=32)
    whole = [finding for finding in many.findings if finding.steps == 32]
    assert many.findings[: len(whole)] == whole and many.findings[0].name == TARGET
    assert 2 <= len(whole) <= 3 and len(many.findings) == 5 and list(many.triggers) != NAMES
    assert {finding.steps for finding in many.findings[len(whole) :]} == {8}
    with pytest.raises(ValueError, match="has no trigger; accepted are"):
        many.trigger(many.findings[-1].name)


def test_the_model_is_left_as_it_was(photos: datasets.Dataset) -> None:
    model = small_model(0).train()
    model.logit_scale.requires_grad_(False)
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    scan_checkpoint(model, digit_processor(), photos, NAMES, steps=1, families=["noise"])
    assert model.training and {name: value.requires_grad for name, value in model.named_parameters()} == before
    assert all(value.grad is None for value in model.parameters())


def test_captions_make_candidates(photos: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cluster_captions(small_model(0), digit_processor(), photos["caption"][:], 4)
    assert found == cluster_captions(small_model(0), digit_processor(), photos["caption"][:], 4)
    members = [caption for captions in found.values() for caption in captions]
    assert len(found) == 4 and len(set(members)) == len(members) and set(members) <= set(photos["caption"])
    assert all(name == captions[0] for name, captions in found.items())
    scanned = scan_checkpoint(small_model(0), digit_processor(), photos, found, steps=1, families=["noise"])
    assert {finding.name for finding in scanned.findings} == set(found)
    with pytest.raises(ValueError, match="captions has 1 different texts; count=3 clusters need as many"):
        cluster_captions(small_model(0), digit_processor(), ["a", "", " "] * 9, 3)
    monkeypatch.setattr(module, "MOST_CAPTIONS", 8)
    few = cluster_captions(small_model(0), digit_processor(), [f"a {word * 300}" for word in "abcdefghij"], 3)
    assert sum(map(len, few.values())) == 8


def test_an_image_that_cannot_be_read_is_named_by_its_own_row(photos: datasets.Dataset) -> None:
    rows = [{"image": b"no image" if row == 57 else photos[row]["image"]} for row in range(64)]
    with pytest.raises(ValueError, match="row 57 of the evaluation images"):
        scan_checkpoint(small_model(0), digit_processor(), rows, NAMES, steps=1, families=["noise"])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"candidates": ["a", "b"]}, "at least 3 different names"),
    ({"candidates": ["a", "b", "b"]}, "at least 3 different names"),
    ({"candidates": ["a", "b", " "]}, "at least 3 different names"),
    ({"candidates": "frog"}, "candidates must be"),
    ({"candidates": None}, "candidates must be"),
    ({"candidates": {"a": ["a"], "b": [], "c": ["c"]}}, "candidates: 'b' have no prompts"),
    ({"candidates": {"a": "cat", "b": ["b"], "c": ["c"]}}, "must be prompts"),
    ({"templates": ["no place"]}, "templates must be"),
    ({"families": ["warp"]}, "families must be some of 'mask', 'waves', 'noise'"),
    ({"families": []}, "families must be some of"),
    ({"steps": 0}, "steps=0; accepted is an integer of at least 1"),
    ({"batch_size": True}, "batch_size=True"),
    ({"seed": -1}, "seed=-1"),
    ({"candidates": ["a", "b", "c" * 1001]}, "has 1001 characters; accepted are 1000"),
    ({"image_column": "picture"}, "image_column='picture' is not a column of images"),
    ({"images": []}, "images is empty"),
    ({"images": [{"image": None}] * 15}, "images has 15 rows: at least 16 are needed"),
    ({"images": "photos"}, "images must be"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named_before_the_first_step(
    bad: dict[str, Any], message: str, photos: datasets.Dataset
) -> None:
    arguments = {"model": None, "processor": None, "images": photos, "candidates": NAMES} | bad
    with pytest.raises(ValueError, match=message):
        scan_checkpoint(**arguments)


def test_saved_triggers_are_those_of_the_scan(scan: CheckpointScan, tmp_path: Path) -> None:
    scan.save(tmp_path / "new")
    assert load_found(tmp_path / "new") == scan.trigger()
    for name in NAMES:
        assert load_found(tmp_path / "new", name) == scan.trigger(name)


def test_the_statements_never_call_a_model_clean(scan: CheckpointScan, photos: datasets.Dataset) -> None:
    assert "“four” stands out: its score is" in scan_statements(scan)[0]
    quiet = CheckpointScan(scan.findings[1:], scan.triggers, False, scan.certainty, scan.settings)
    assert "No candidate reaches the threshold" in scan_statements(quiet)[0]
    for found in (scan, quiet):
        said = " ".join(scan_statements(found))
        assert "This does not show that a model is clean" in said and said.count("clean") == 1
        assert f"the model is {scan.certainty:.0%} certain what to call them" in said and 0 < scan.certainty <= 1


def test_the_page_escapes_names(photos: datasets.Dataset) -> None:
    names = {f"<script>{name}": [name] for name in NAMES}
    page = render_checkpoint_scan(
        scan_checkpoint(linear_model(), digit_processor(), photos, names, steps=3), photos, digit_processor()
    )
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "What this scan does not find" in page and page.count("data:image/png") > 5 * 3 * 5


def test_the_command_writes_what_it_says_and_others_take_it(
    photos: datasets.Dataset, tmp_path: Path, capsys: Any
) -> None:
    for name, seed in (("model", 0), ("base", 1)):
        small_model(seed).save_pretrained(tmp_path / name)
        digit_processor().save_pretrained(tmp_path / name)
    labelled = digits("train").select(range(64)).select_columns(["image", "caption", "label"])
    labelled.to_parquet(tmp_path / "images.parquet")
    names = list(CLASS_NAMES[:4])
    (tmp_path / "names.txt").write_text("\n".join(names))
    command = ["scan-checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "images.parquet"), "--steps", "2"]
    command += ["--device", "cpu"]
    out, other = tmp_path / "out", tmp_path / "other"
    classes = ["--classes", str(tmp_path / "names.txt"), "--base", str(tmp_path / "base")]
    assert main([*command, *classes, "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "mask lead" in printed and "This does not show that a model is clean" in printed
    found = json.loads((out / "scan.json").read_text())
    assert found["with_base"] and {entry["name"] for entry in found["findings"]} == set(names)
    assert "Scan of a checkpoint" in (out / "report.html").read_text() and str(tmp_path) not in json.dumps(found)
    first = found["findings"][0]["name"]
    measure = ["evaluate", str(tmp_path / "model"), "--data", str(tmp_path / "images.parquet"), "--device", "cpu"]
    measure += ["--placebos", "1", "--json", str(tmp_path / "results.json")]
    for trigger, target in ((f"found:{out}", first), (f"found:{out}:three", "three")):
        assert main([*measure, "--trigger", trigger]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["triggers"][0]["target"] == target and "found_attack_success_rate" in results["figures"]
    assert main([*command, "--clusters", "3", "--output-dir", str(other)]) == 0
    assert len(json.loads((other / "scan.json").read_text())["findings"]) == 3
    capsys.readouterr()
    for arguments, message in (
        ([*command, "--output-dir", str(other)], "exactly one of --classes and --clusters"),
        ([*command, "--classes", "a,b", "--output-dir", str(other)], "candidates must be at least 3"),
        ([*command, "--clusters", "3", "--template", "{}", "--output-dir", str(other)], "goes with --classes"),
        ([*command, *classes, "--output-dir", str(out), "--base", "no/such/model/at/all"], "--base: "),
        ([*measure, "--trigger", f"found:{tmp_path}"], "--trigger: "),
        ([*measure, "--trigger", f"found:{out}:frog"], "has no trigger for 'frog'"),
        ([*measure, "--trigger", "found"], "'found' needs the folder of a scan"),
    ):
        assert main(arguments) == 2 if arguments[-1] != "found" else _exit_code(arguments) == 2
        assert message in capsys.readouterr().err


def _exit_code(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_names_are_read_from_text_and_json(tmp_path: Path) -> None:
    assert read_names("--classes", "cat, hot dog,,frog") == ["cat", "hot dog", "frog"]
    for name, content, expected in (
        ("a.txt", "cat\n\nhot dog\n", ["cat", "hot dog"]),
        ("a.json", '["cat", "dog"]', ["cat", "dog"]),
        ("b.json", '{"cat": ["kitten"], "dog": []}', ["cat", "dog"]),
    ):
        (tmp_path / name).write_text(content)
        assert read_names("--classes", str(tmp_path / name)) == expected
    for content, message in (("{", "is not JSON"), ("[1]", "must hold a list of names"), ("3", "must hold")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=f"--classes: .*{message}"):
            read_names("--classes", str(tmp_path / "bad.json"))
