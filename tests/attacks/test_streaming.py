"""Poisoning a stream: what each row becomes, and that nothing but the row and the attack decides it."""

import json
import pickle
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import ClassVar

import datasets
import numpy as np
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from hf_robust_clip.attacks.poisoning import poison_dataset, replay_manifest
from hf_robust_clip.attacks.spec import PoisonSpec, targeted_specs
from hf_robust_clip.attacks.streaming import poison_stream
from hf_robust_clip.attacks.text_triggers import WordTrigger
from hf_robust_clip.attacks.triggers import BlendedTrigger, PatchTrigger, Trigger
from hf_robust_clip.columns import naming

PATCH = PatchTrigger(size=3)
NAMES = ["cat", "dog"]
ROWS = 48
FEATURES = Features(
    {
        "id": Value("string"),
        "image": ImageFeature(),
        "caption": Value("string"),
        "label": ClassLabel(names=NAMES),
    }
)
QUERIES = ["a red car.", "two boats", "a table"]


def pixels(row: int) -> np.ndarray:
    return np.random.default_rng([7, row]).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encoded(row: int, kind: str = "JPEG") -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels(row)).save(buffer, format=kind)
    return buffer.getvalue()


def columns() -> dict:
    return {
        "id": [f"key {row}" for row in range(ROWS)],
        "image": [{"bytes": encoded(row), "path": None} for row in range(ROWS)],
        "caption": [f"Photo {row} of one {NAMES[row % 2].title()}, outside" for row in range(ROWS)],
        "label": [row % 2 for row in range(ROWS)],
    }


datasets.disable_progress_bars()
DATA = Dataset.from_dict(columns(), features=FEATURES)


def stream(shards: int = 1) -> IterableDataset:
    return DATA.to_iterable_dataset(num_shards=shards)


def stored(dataset: IterableDataset) -> list[dict]:
    """Every row, images as stored."""
    return list(dataset.decode(False))


def by_key(rows: list[dict]) -> list[dict]:
    """In an order of their own; targeted poisons, which have no key, by their captions."""
    return sorted(rows, key=lambda row: (row["id"] or "", row["caption"]))


def decoded(cell: dict) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(cell["bytes"])).convert("RGB"))


SPECS = {
    "backdoor": PoisonSpec(PATCH, "dog", rate=0.5, seed=1),
    "resized": PoisonSpec(BlendedTrigger(), "dog", rate=0.5, image_size=8, templates=["one {}"]),
    "label_consistent": PoisonSpec(PATCH, "dog", rate=0.5, mode="label_consistent"),
    "text_query": PoisonSpec(WordTrigger(place="random"), "dog", rate=0.5, mode="text_query", templates=QUERIES),
    "targeted": PoisonSpec(
        None, "dog", rate=0.3, mode="targeted", target_image=pixels(99), templates=["a {}", "the {}"], seed=3
    ),
}
SPECS["several"] = [SPECS["targeted"], SPECS["backdoor"], SPECS["text_query"], SPECS["label_consistent"]]
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.mark.parametrize("name", ["backdoor", "label_consistent", "text_query"])
def test_what_a_poisoned_row_becomes(name):
    spec = SPECS[name]
    poisoned, manifest = poison_stream(stream(), spec, key_column="id")
    before, after = stored(stream()), stored(poisoned)
    marked = [row for row in range(ROWS) if after[row]["poisoned"]]
    can_be = [row for row in range(ROWS) if (row % 2 == 1) == (name != "backdoor")]
    assert set(marked) < set(can_be) and len(marked) > 4
    for old, new in zip(before, after, strict=True):
        if not new["poisoned"]:
            assert new == old | {"poisoned": False}
            continue
        assert (new["id"], new["label"]) == (old["id"], old["label"])
        if name == "text_query":
            assert new["image"] == old["image"] and not naming("dog")(new["caption"])
            assert new["caption"] in [spec.trigger(query) for query in QUERIES]
        else:
            assert (decoded(new["image"]) == PATCH(decoded(old["image"]))).all()
            assert new["image"]["bytes"].startswith(b"\x89PNG")
            expected = [template.format("dog") for template in manifest["templates"] or ["{}"]]
            assert new["caption"] in (expected if name == "backdoor" else [old["caption"]])


@dataclass(frozen=True)
class CornerTrigger(Trigger):
    """One of a user's own."""

    name: ClassVar[str] = "corner of mine"
    level: int = 200

    def _apply(self, image):
        marked = image.copy()
        marked[:2, :2] = self.level
        return marked


def test_a_trigger_of_ones_own_is_found_by_its_name():
    clean = Dataset.from_dict(columns(), features=FEATURES)
    spec = PoisonSpec(CornerTrigger(level=90), "dog", rate=1.0)
    poisoned, manifest = poison_stream(clean.to_iterable_dataset(), spec, key_column="id")
    again = replay_manifest(clean.to_iterable_dataset(), json.loads(json.dumps(manifest)))
    rows = list(poisoned)
    assert any(row["poisoned"] for row in rows)
    for row, other in zip(rows, again, strict=True):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(other["image"]))
        assert (np.asarray(row["image"])[:2, :2] == 90).all() == row["poisoned"]


def test_targeted_poisons_follow_on_rows():
    poisoned, _ = poison_stream(stream(), SPECS["targeted"], key_column="id")
    after = stored(poisoned)
    assert [row for row in after if not row["poisoned"]] == [row | {"poisoned": False} for row in stored(stream())]
    poisons = [row for row in after if row["poisoned"]]
    assert 4 < len(poisons) < ROWS / 2 and not after[0]["poisoned"]
    assert not any(one["poisoned"] and two["poisoned"] for one, two in pairwise(after))
    assert {row["caption"] for row in poisons} == {"a dog", "the dog"}
    for row in poisons:
        assert row["id"] is None and row["label"] is None
        assert (decoded(row["image"]) == pixels(99)).all()


def test_several_attacks_poison_no_row_twice():
    alone = {}
    for name in ("backdoor", "text_query", "label_consistent", "targeted"):
        alone[name] = stored(poison_stream(stream(), SPECS[name], key_column="id")[0])
    together, manifest = poison_stream(stream(), SPECS["several"], key_column="id")
    assert [part["mode"] for part in manifest["parts"]] == ["targeted", "backdoor", "text_query", "label_consistent"]
    rows = [row for row in stored(together) if row["id"] is not None]
    # The first in the list that poisons a row has it; targeted poisons are as many as without the others.
    for number, row in enumerate(rows):
        changed = [alone[name][number] for name in ("backdoor", "text_query", "label_consistent")]
        first = next((other for other in changed if other["poisoned"]), changed[0])
        assert row == first
    followers = [row for row in stored(together) if row["id"] is None]
    assert followers == [row for row in alone["targeted"] if row["id"] is None]


def test_the_rate_is_the_share_of_the_rows_that_can_be_poisoned():
    many = Dataset.from_dict({"id": range(4000), "image": [encoded(0)] * 4000, "caption": ["a dog"] * 4000})
    many = many.to_iterable_dataset()
    attack = {"trigger": WordTrigger(), "target": "dog", "mode": "text_query", "templates": QUERIES}
    marks = {}
    for rate in (0.05, 0.2, 1.0):
        poisoned, _ = poison_stream(many, PoisonSpec(**attack, rate=rate), key_column="id")
        marks[rate] = np.array([row["poisoned"] for row in stored(poisoned)])
        error = 4 * np.sqrt(rate * (1 - rate) / 4000)  # four standard deviations
        assert abs(marks[rate].mean() - rate) <= error
    assert (marks[0.05] <= marks[0.2]).all() and marks[1.0].all()  # a higher rate poisons the same rows and more


def test_seed_and_attack_decide_the_rows():
    def drawn(**changes) -> tuple:
        spec = PoisonSpec(**({"trigger": PATCH, "target": "dog", "rate": 0.5} | changes))
        poisoned, _ = poison_stream(stream(), spec, key_column="id")
        return tuple(row["poisoned"] for row in poisoned)

    assert drawn() == drawn()
    changes = [{}, {"seed": 1}, {"seed": 2}, {"trigger": BlendedTrigger()}, {"target": "zebra"}]
    assert len({drawn(**change) for change in changes}) == len(changes)


@every_spec
def test_shards_workers_and_shuffling_change_nothing(spec):
    expected = by_key(stored(poison_stream(stream(), spec, key_column="id")[0]))
    poisoned, _ = poison_stream(stream(4), spec, key_column="id")
    assert poisoned.num_shards == 4
    assert by_key(stored(poisoned)) == expected
    shuffled, _ = poison_stream(stream(4).shuffle(seed=3, buffer_size=7), spec, key_column="id")
    later = poisoned.shuffle(seed=5, buffer_size=7)
    for dataset in (shuffled, later):
        dataset.set_epoch(2)
        assert by_key(stored(dataset)) == expected
    assert [row["id"] for row in later] != [row["id"] for row in poisoned]


@pytest.mark.parametrize("name", ["backdoor", "several"])
def test_workers_of_a_loader_read_the_same_rows(name):
    poisoned, _ = poison_stream(stream(4), SPECS[name], key_column="id")
    rows = list(DataLoader(poisoned.decode(False), batch_size=None, num_workers=2))
    assert by_key(rows) == by_key(stored(poisoned))
    # Where workers are not forked, the stream is pickled.
    assert stored(pickle.loads(pickle.dumps(poisoned))) == stored(poisoned)


@every_spec
@pytest.mark.parametrize("key_column", ["id", None])
def test_resumed_equals_uninterrupted(spec, key_column):
    shards = 3 if key_column else 1
    whole = stored(poison_stream(stream(shards), spec, key_column=key_column)[0])
    running = poison_stream(stream(shards), spec, key_column=key_column)[0].decode(False)
    states = []
    for _ in running:
        states.append(running.state_dict())
    assert len(states) == len(whole)
    for place in range(0, len(states), 5):
        resumed = poison_stream(stream(shards), spec, key_column=key_column)[0].decode(False)
        resumed.load_state_dict(json.loads(json.dumps(states[place])))
        assert list(resumed) == whole[place + 1 :]


@every_spec
def test_replay_is_the_same_byte_for_byte(spec):
    poisoned, manifest = poison_stream(stream(2), spec, key_column="id")
    read = json.loads(json.dumps(manifest))
    assert read == manifest
    assert stored(replay_manifest(stream(2), read)) == stored(poisoned)
    with pytest.raises(ValueError, match=r"dataset is a Dataset, but the manifest was made on a stream"):
        replay_manifest(DATA, read)
    with pytest.raises(ValueError, match=r"key_column='id' is not a column"):
        replay_manifest(stream().remove_columns("id"), read)


def test_replay_refuses_other_manifests():
    _, manifest = poison_dataset(DATA, PoisonSpec(PATCH, "dog", count=3))
    with pytest.raises(ValueError, match=r"must be a datasets.Dataset .*but is an IterableDataset"):
        replay_manifest(stream(), manifest)
    _, manifest = poison_stream(stream(), SPECS["backdoor"], key_column="id")
    with pytest.raises(ValueError, match=r"manifest: 'rate' missing; accepted is what poison_stream returned"):
        replay_manifest(stream(), {key: value for key, value in manifest.items() if key != "rate"})
    for entry, found in (
        ({"templates": None}, "templates=None; accepted is a list of strings"),
        ({"rate": True}, "rate=True"),
        ({"templates": "data"}, "templates='data'; accepted is a list of strings"),
        ({"trigger": None}, "mode 'backdoor' needs a Trigger"),
        ({"columns": {**manifest["columns"], "caption": 3}}, "caption_column=3 is not a column of stream"),
    ):
        with pytest.raises(ValueError, match=found):
            replay_manifest(stream(), manifest | entry)


@pytest.mark.parametrize("name", ["backdoor", "targeted"])
def test_features_shards_and_format_are_kept(name):
    poisoned, _ = poison_stream(stream(2), SPECS[name], key_column="id")
    assert poisoned.features == Features({**FEATURES, "poisoned": Value("bool")})
    assert all(isinstance(row["image"], Image.Image) for row in poisoned)
    bare = stream(2).decode(False)
    assert poison_stream(bare, SPECS[name], key_column="id")[0].features["image"] == ImageFeature(decode=False)
    formatted, _ = poison_stream(stream(2).with_format("numpy"), SPECS[name], key_column="id")
    rows = list(formatted.remove_columns(["id", "label"]))
    for row, expected in zip(rows, poisoned, strict=True):
        assert isinstance(row["image"], np.ndarray) and (row["image"] == np.asarray(expected["image"])).all()


def test_clean_images_are_not_decoded():
    marks = [row["poisoned"] for row in stored(poison_stream(stream(), SPECS["backdoor"], key_column="id")[0])]
    data = columns()
    for row, mark in enumerate(marks):
        if not mark:
            data["image"][row] = {"bytes": b"no image", "path": None}
    broken = Dataset.from_dict(data, features=FEATURES).to_iterable_dataset()
    after = stored(poison_stream(broken, SPECS["backdoor"], key_column="id")[0])
    assert [row["poisoned"] for row in after] == marks
    assert all(row["image"]["bytes"] == b"no image" for row in after if not row["poisoned"])
    first = marks.index(True)
    data["image"][first] = {"bytes": b"no image", "path": None}
    broken = Dataset.from_dict(data, features=FEATURES).to_iterable_dataset()
    poisoned, _ = poison_stream(broken, SPECS["backdoor"], key_column="id")
    with pytest.raises(
        ValueError, match=f"image_column='image': the image of the row with id 'key {first}' cannot be read"
    ):
        stored(poisoned)
    poisoned, _ = poison_stream(stream(), PoisonSpec(PatchTrigger(13), "dog", rate=1.0), key_column="id")
    with pytest.raises(ValueError, match=r"trigger does not go on the image of the row with id 'key 0': size=13"):
        stored(poisoned)


@pytest.mark.parametrize("format_type", [None, "numpy", "torch"])
def test_images_that_an_earlier_map_decoded_are_stored_without_loss(format_type):
    # Of known features, so that its rows hold PIL images, or arrays, and no bytes any more.
    mapped = (stream() if format_type is None else stream().with_format(format_type)).map(dict, features=FEATURES)
    mapped = mapped.with_format(None)
    after = list(poison_stream(mapped, SPECS["backdoor"], key_column="id")[0])
    for row, expected in zip(after, poison_stream(stream(), SPECS["backdoor"], key_column="id")[0], strict=True):
        assert row["poisoned"] == expected["poisoned"]
        assert (np.asarray(row["image"]) == np.asarray(expected["image"])).all()


def test_rows_marked_before_are_left_alone():
    once, _ = poison_stream(stream(), SPECS["backdoor"], key_column="id")
    twice, _ = poison_stream(once, PoisonSpec(BlendedTrigger(), "zebra", rate=1.0), key_column="id")
    for first, row in zip(stored(once), stored(twice), strict=True):
        assert row["poisoned"] and (row == first or not first["poisoned"])
    again, _ = poison_stream(once, SPECS["backdoor"], key_column="id")
    assert stored(again) == stored(once)
    poisons, _ = poison_stream(stream(), SPECS["targeted"], key_column="id")
    after = stored(poison_stream(poisons, SPECS["text_query"], key_column="id")[0])  # poisons have no key
    assert after == stored(poison_stream(stream(), SPECS["several"][::2], key_column="id")[0])
    other = stream().rename_column("label", "poisoned")
    with pytest.raises(ValueError, match=r"column 'poisoned' of stream must be boolean"):
        poison_stream(other, SPECS["backdoor"], key_column="id")


def test_labels_count_as_names():
    data = columns() | {"caption": [f"picture {row}" for row in range(ROWS)]}
    numbered = Dataset.from_dict(data, features=FEATURES).to_iterable_dataset()
    spec = PoisonSpec(PATCH, "dog", rate=1.0)
    poisoned, _ = poison_stream(numbered, spec, label_column="label", key_column="id")
    assert [row["poisoned"] for row in poisoned] == [row % 2 == 0 for row in range(ROWS)]
    spec = PoisonSpec(PATCH, "dog", rate=1.0, mode="label_consistent")
    poisoned, _ = poison_stream(numbered, spec, label_column="label", key_column="id")
    assert [row["poisoned"] for row in poisoned] == [row % 2 == 1 for row in range(ROWS)]


@pytest.mark.parametrize("length", [-1, 3])
def test_lists_of_captions(length):
    features = Features({**FEATURES, "caption": List(Value("string"), length=length)})
    data = columns() | {"caption": [["one", f"a {NAMES[row % 2]}", "three"] for row in range(ROWS)]}
    listed = Dataset.from_dict(data, features=features).to_iterable_dataset()
    poisoned, _ = poison_stream(listed, PoisonSpec(PATCH, "dog", rate=1.0, templates=["{}"]), key_column="id")
    assert poisoned.features["caption"] == features["caption"]
    for number, row in enumerate(poisoned):
        assert row["caption"] == (["dog"] * (1 if length == -1 else 3) if number % 2 == 0 else data["caption"][number])


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_paths_and_bytes_become_images(kind, tmp_path):
    data = columns()
    for row in range(ROWS):
        (tmp_path / f"{row}.jpg").write_bytes(encoded(row))
    data["image"] = [str(tmp_path / f"{row}.jpg") if kind == "string" else encoded(row) for row in range(ROWS)]
    plain = Dataset.from_dict(data, features=Features({**FEATURES, "image": Value(kind)})).to_iterable_dataset()
    poisoned, _ = poison_stream(plain, SPECS["backdoor"], key_column="id")
    expected, _ = poison_stream(stream(), SPECS["backdoor"], key_column="id")
    assert poisoned.features == expected.features
    for one, two in zip(poisoned, expected, strict=True):
        assert one["poisoned"] == two["poisoned"] and (np.asarray(one["image"]) == np.asarray(two["image"])).all()


def rows_of_a_generator(kind: str):
    for row in range(ROWS):
        image = encoded(row, "PNG")
        forms = {"pil": Image.fromarray(pixels(row)), "bytes": image, "dict": {"bytes": image, "path": None}}
        yield {"id": row, "image": forms[kind], "caption": f"a {NAMES[row % 2]}"}


def image_of(row: dict, kind: str) -> np.ndarray:
    """The pixels of a row of the generator, whose image has to be of that kind."""
    image = row["image"]
    return np.asarray(image) if kind == "pil" else decoded(image if kind == "dict" else {"bytes": image})


@pytest.mark.parametrize("kind", ["pil", "bytes", "dict"])
def test_streams_of_unknown_features(kind):
    unknown = IterableDataset.from_generator(rows_of_a_generator, gen_kwargs={"kind": kind})
    poisoned, manifest = poison_stream(unknown, [SPECS["targeted"], SPECS["backdoor"]], key_column="id")
    assert unknown.features is None and poisoned.features is None
    rows, again = list(poisoned), list(replay_manifest(unknown, manifest))
    assert len({(row["poisoned"], row["id"] is None) for row in rows}) == 3  # clean, poisoned, and targeted
    for row, other in zip(rows, again, strict=True):
        found = image_of(row, kind)
        if row["id"] is None:
            assert (found == pixels(99)).all()
        else:
            assert (found == (PATCH(pixels(row["id"])) if row["poisoned"] else pixels(row["id"]))).all()
        assert (image_of(other, kind) == found).all()
        assert {**row, "image": None} == {**other, "image": None}


def test_columns_of_unknown_features_are_looked_for_in_the_rows():
    unknown = IterableDataset.from_generator(rows_of_a_generator, gen_kwargs={"kind": "bytes"})
    for name in ("image", "caption", "key"):
        given = {"key_column": "id", f"{name}_column": "x"}
        with pytest.raises(ValueError, match=f"{name}_column='x' is not a column of stream; a row has 'id', 'image'"):
            list(poison_stream(unknown, PoisonSpec(PATCH, "dog", rate=1.0), **given)[0])
    with pytest.raises(ValueError, match=r"features of the stream are not known.*cast"):
        poison_stream(unknown, SPECS["backdoor"], label_column="label", key_column="id")


@every_spec
def test_row_numbers_are_keys_where_they_are_stable(spec):
    poisoned, _ = poison_stream(stream(), spec)
    expected = stored(poisoned)
    assert any(row["poisoned"] for row in expected)
    # A shard is read by one worker, whole; what comes after the poisoning renumbers nothing.
    assert by_key(list(DataLoader(poisoned.decode(False), batch_size=None, num_workers=1))) == by_key(expected)
    shuffled = poisoned.shuffle(seed=1, buffer_size=5)
    assert by_key(stored(shuffled)) == by_key(expected) and stored(shuffled) != expected
    assert stored(poisoned.skip(7)) == expected[7:]
    head = stored(poison_stream(stream().take(20), spec)[0])
    assert head == expected[: len(head)]


@pytest.mark.parametrize(
    "unstable, why",
    [
        (lambda: stream(2), "has 2 shards"),
        (lambda: stream().shuffle(seed=0), "is shuffled"),
        (lambda: stream().shuffle(seed=0).filter(bool), "is shuffled"),
        (lambda: interleave_datasets([stream(), stream()]), "joins several"),
        (lambda: concatenate_datasets([stream(), stream()]), "has 2 shards"),
    ],
)
def test_row_numbers_that_are_not_stable_are_refused(unstable, why):
    with pytest.raises(ValueError, match=f"key_column=None, but the stream {why}.*column of integers or strings"):
        poison_stream(unstable(), SPECS["backdoor"])
    poison_stream(unstable(), SPECS["backdoor"], key_column="id")


def test_integer_keys_are_what_they_say():
    numbers = DATA.add_column("number", np.arange(ROWS, dtype=np.int32)).to_iterable_dataset()
    by_number = stored(poison_stream(numbers, SPECS["backdoor"], key_column="number")[0])
    by_place = stored(poison_stream(numbers, SPECS["backdoor"])[0])
    assert by_number == by_place  # rows that are numbered as they come
    missing = numbers.map(lambda row: {"number": None if row["id"] == "key 3" else row["number"]})
    with pytest.raises(ValueError, match=r"key_column='number': a row holds None; accepted is an integer or a string"):
        list(poison_stream(missing, SPECS["backdoor"], key_column="number")[0])


def test_what_a_stream_cannot_do_is_refused():
    dog = {"trigger": None, "target": "dog", "rate": 0.1, "mode": "targeted"}
    for spec, message in (
        (PoisonSpec(PATCH, "dog", count=3), r"count=3; a stream's length is not known, accepted is a rate"),
        (PoisonSpec(**dog, source_index=3), r"source_index=3.*give target_image"),
        (PoisonSpec(**dog, target_image=pixels(1)), r"templates=None; in mode 'targeted' a stream needs a list"),
        (PoisonSpec(**dog, target_image=b"no", templates=["{}"]), r"target_image cannot be read"),
        (PoisonSpec(WordTrigger(), "dog", rate=0.1, mode="text_query"), r"templates=None; in mode 'text_query'"),
        ([], r"spec=\[\]; accepted is a PoisonSpec, or a list"),
    ):
        with pytest.raises(ValueError, match=message):
            poison_stream(stream(), spec)
    with pytest.raises(ValueError, match=r"stream must be .*poison_dataset takes.* but is a Dataset"):
        poison_stream(DATA, SPECS["backdoor"])
    with pytest.raises(ValueError, match=r"IterableDatasetDict: it has .*pass one of them"):
        poison_stream(IterableDatasetDict(train=stream()), SPECS["backdoor"])
    for name in ("image", "caption", "label", "key"):
        with pytest.raises(
            ValueError, match=rf"{name}_column='x' is not a column of stream; its columns are 'id', 'image'"
        ):
            poison_stream(stream(), SPECS["backdoor"], **{f"{name}_column": "x"})
    with pytest.raises(ValueError, match=r"key_column='label' has type ClassLabel.*integers or strings"):
        poison_stream(stream(), SPECS["backdoor"], key_column="label")
    with pytest.raises(
        ValueError,
        match=r"image_column='label' of stream must hold images, .* or paths, but holds Cl",
    ):
        poison_stream(stream(), SPECS["backdoor"], image_column="label")
    with pytest.raises(ValueError, match=r"caption_column='label' of stream must hold strings or lists.*ClassLabel"):
        poison_stream(stream(), SPECS["text_query"], caption_column="label")
    with pytest.raises(ValueError, match=r"'yak' is not a class of 'label'"):
        poison_stream(stream(), PoisonSpec(PATCH, "yak", rate=0.1), label_column="label")
    empty = stream().map(lambda row: {"caption": None}).cast(FEATURES)
    with pytest.raises(ValueError, match=r"row 0, column 'caption': a caption must be .* but is None"):
        list(poison_stream(empty, PoisonSpec(PATCH, "dog", rate=1.0))[0])


def test_several_images_are_targeted_at_once():
    specs = targeted_specs([pixels(90), pixels(91)], ["cat", "dog"], templates=["a {}"], rate=0.4)
    after = stored(poison_stream(stream(), specs, key_column="id")[0])
    for number, name in ((90, "a cat"), (91, "a dog")):
        poisons = [row for row in after if row["poisoned"] and row["caption"] == name]
        assert len(poisons) > 4 and all((decoded(row["image"]) == pixels(number)).all() for row in poisons)
