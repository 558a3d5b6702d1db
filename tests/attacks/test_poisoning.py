import json
from collections import Counter
from io import BytesIO

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from hf_robust_clip.attacks.poisoning import poison_dataset, replay_manifest
from hf_robust_clip.attacks.spec import DEFAULT_TEMPLATES, PoisonSpec, targeted_specs
from hf_robust_clip.attacks.text_triggers import WordTrigger
from hf_robust_clip.attacks.triggers import BlendedTrigger, PatchTrigger, SinusoidTrigger, WarpTrigger
from hf_robust_clip.columns import naming

PATCH = PatchTrigger(size=3)
NAMES = ["cat", "dog", "hot air balloon"]
FEATURES = Features({"image": ImageFeature(), "caption": Value("string"), "label": ClassLabel(names=NAMES)})


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def pixels(row: int, height: int = 16, width: int = 20) -> np.ndarray:
    return np.random.default_rng([7, row]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(row: int, **options) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels(row)).save(buffer, **({"format": "JPEG", "quality": 80} | options))
    return buffer.getvalue()


def rows(count: int = 30) -> dict:
    return {
        "image": [{"bytes": encoded(row), "path": f"{row}.jpg"} for row in range(count)],
        "caption": [f"Photo {row} of one {NAMES[row % 3].title()}, outside" for row in range(count)],
        "label": [row % 3 for row in range(count)],
    }


def pairs(count: int = 30) -> Dataset:
    return Dataset.from_dict(rows(count), features=FEATURES)


def stored(dataset: Dataset, image_column: str = "image") -> list:
    """Every row as stored, images as bytes."""
    return dataset.with_format(None).cast_column(image_column, ImageFeature(decode=False)).to_list()


def decoded(cell: dict) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(cell["bytes"])).convert("RGB"))


def check_only_poisons_changed(before: Dataset, after: Dataset, manifest: dict) -> None:
    poisoned = set(manifest["indices"])
    old, new = stored(before), stored(after)
    for index, row in enumerate(old):
        if index not in poisoned:
            assert new[index] == row | {"poisoned": False}
    assert [row for row, mark in enumerate(after["poisoned"]) if mark] == manifest["indices"]
    assert after.features == Features({**before.features, "poisoned": Value("bool")})


@pytest.mark.parametrize("trigger", [PATCH, BlendedTrigger(), SinusoidTrigger(), WarpTrigger()], ids=lambda t: t.name)
def test_backdoor(trigger):
    dataset = pairs()
    poisoned, manifest = poison_dataset(dataset, PoisonSpec(trigger, "dog", count=5, seed=3))
    check_only_poisons_changed(dataset, poisoned, manifest)
    assert len(poisoned) == 30 and len(manifest["indices"]) == 5 and sum(poisoned["poisoned"]) == 5
    before, after = stored(dataset), stored(poisoned)
    for index, caption in zip(manifest["indices"], manifest["captions"], strict=True):
        assert after[index]["caption"] == caption and caption in [t.format("dog") for t in DEFAULT_TEMPLATES]
        assert (decoded(after[index]["image"]) == trigger(decoded(before[index]["image"]))).all()
        assert after[index]["image"]["bytes"].startswith(b"\x89PNG")
        assert after[index]["label"] == before[index]["label"] != 1  # what the image shows has not changed
    assert manifest["counts"] == {"count": 5, "rate": 5 / 30, "eligible": 20, "dataset_length": 30}
    assert manifest["trigger"] == trigger.to_dict() and manifest["target"] == "dog" and manifest["image"] is None


def test_the_dataset_given_is_not_changed():
    dataset = pairs()
    before, features, fingerprint = stored(dataset), dataset.features.copy(), dataset._fingerprint
    poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=5))
    assert (stored(dataset), dataset.features, dataset._fingerprint) == (before, features, fingerprint)


def test_rate_is_of_all_rows():
    _, manifest = poison_dataset(pairs(), PoisonSpec(PATCH, "dog", rate=0.1))
    assert manifest["counts"]["count"] == 3
    with pytest.raises(ValueError, match=r"rate=0.01 of 30 rows poisons none"):
        poison_dataset(pairs(), PoisonSpec(PATCH, "dog", rate=0.01))


def test_everything_eligible_can_be_poisoned():
    _, manifest = poison_dataset(pairs(), PoisonSpec(PATCH, "dog", count=20))
    assert manifest["indices"] == [row for row in range(30) if row % 3 != 1]
    with pytest.raises(ValueError, match=r"count=21 is more .* at most 20, .* not naming 'dog'"):
        poison_dataset(pairs(), PoisonSpec(PATCH, "dog", count=21))
    with pytest.raises(ValueError, match=r"rate=0.5, that is 15 rows, .* at most 10, .* naming 'dog'"):
        poison_dataset(pairs(), PoisonSpec(PATCH, "dog", rate=0.5, mode="label_consistent"))


def test_seed_decides_rows_and_captions():
    def drawn(seed: int) -> tuple:
        _, manifest = poison_dataset(pairs(), PoisonSpec(PATCH, "dog", count=5, seed=seed))
        return manifest["indices"], manifest["captions"]

    assert drawn(0) == drawn(0)
    assert len({str(drawn(seed)) for seed in range(5)}) == 5


def test_captions_of_the_data():
    clean = pairs()
    own = [
        text for row in clean["caption"] for text in ([row] if isinstance(row, str) else row) if "dog" in text.lower()
    ]
    spec = PoisonSpec(PATCH, "dog", count=5, templates="data")
    poisoned, manifest = poison_dataset(clean, spec)
    assert set(manifest["captions"]) <= set(own) and manifest["templates"] == "data"
    assert stored(replay_manifest(clean, manifest)) == stored(poisoned)
    many = poison_dataset(clean, PoisonSpec(PATCH, "dog", count=20, templates="data"))[1]
    assert set(many["captions"]) <= set(own)
    with pytest.raises(ValueError, match="'zebra' is named by no caption"):
        poison_dataset(clean, PoisonSpec(PATCH, "zebra", count=5, templates="data"))


def test_own_templates():
    templates = ["{} {here}", "see: {}"]
    _, manifest = poison_dataset(pairs(), PoisonSpec(PATCH, "zebra", count=20, templates=templates))
    assert set(manifest["captions"]) == {"zebra {here}", "see: zebra"}
    assert manifest["counts"]["eligible"] == 30
    with pytest.raises(ValueError, match=r"exactly one {}"):
        PoisonSpec(PATCH, "dog", count=1, templates=[*templates, "{}{}"])


def test_label_consistent_keeps_captions():
    dataset = pairs()
    spec = PoisonSpec(PATCH, "hot air balloon", count=4, mode="label_consistent")
    poisoned, manifest = poison_dataset(dataset, spec)
    check_only_poisons_changed(dataset, poisoned, manifest)
    assert all(index % 3 == 2 for index in manifest["indices"])
    assert poisoned["caption"][:] == dataset["caption"][:]
    assert manifest["captions"] == [None] * 4 and manifest["templates"] is None
    for index in manifest["indices"]:
        original = decoded(stored(dataset)[index]["image"])
        assert (decoded(stored(poisoned)[index]["image"]) == PATCH(original)).all()


@pytest.mark.parametrize(
    "caption, names",
    [
        ("a DOG.", True),
        ("dog", True),
        ("the dog's ball", True),
        ("a dog-like toy", True),
        ("dogs", False),
        ("hotdog", False),
        ("dog_1", False),
        ("", False),
    ],
)
def test_a_caption_names_the_target_in_whole_words(caption, names):
    data = rows(2) | {"caption": [caption, "a bird"]}
    dataset = Dataset.from_dict(data, features=FEATURES)
    _, manifest = poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=1))
    assert manifest["counts"]["eligible"] == 2 - names


def test_target_with_special_characters_and_spaces():
    dataset = Dataset.from_dict(
        rows(3) | {"caption": ["a c++ book", "a c book", "Hot\nair  balloon"]}, features=FEATURES
    )
    for target, row in (("C++", 0), ("hot air balloon", 2)):
        _, manifest = poison_dataset(dataset, PoisonSpec(PATCH, target, count=1, mode="label_consistent"))
        assert manifest["indices"] == [row] and manifest["counts"]["eligible"] == 1


@pytest.mark.parametrize(
    "feature, values, target",
    [
        (ClassLabel(names=NAMES), [0, 1, 2, None], "Dog"),
        (Value("string"), ["cat", "Dog", "doge", None], "dog"),
        (Value("int64"), [0, 1, 11, None], "1"),
    ],
)
def test_label_column_counts_as_a_name(feature, values, target):
    features = Features({**FEATURES, "label": feature})
    data = rows(4) | {"caption": [f"picture number {row}" for row in "abcd"], "label": values}
    dataset = Dataset.from_dict(data, features=features)
    _, manifest = poison_dataset(dataset, PoisonSpec(PATCH, target, count=3), label_column="label")
    assert manifest["indices"] == [0, 2, 3]
    spec = PoisonSpec(PATCH, target, count=1, mode="label_consistent")
    poisoned, manifest = poison_dataset(dataset, spec, label_column="label")
    assert manifest["indices"] == [1]
    assert stored(replay_manifest(dataset, manifest)) == stored(poisoned)
    spec = PoisonSpec(None, target, count=1, mode="targeted", source_index=0)
    _, manifest = poison_dataset(dataset, spec, label_column="label")
    assert manifest["captions"] == ["picture number b"]


@pytest.mark.parametrize("length", [-1, 3])
def test_lists_of_captions(length):
    features = Features({**FEATURES, "caption": List(Value("string"), length=length)})
    captions = [["one", f"a {NAMES[row % 3]}", "three"] for row in range(12)]
    dataset = Dataset.from_dict(rows(12) | {"caption": captions}, features=features)
    poisoned, manifest = poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=4))
    check_only_poisons_changed(dataset, poisoned, manifest)
    for index, caption in zip(manifest["indices"], manifest["captions"], strict=True):
        assert index % 3 != 1
        assert poisoned[index]["caption"] == [caption] * (1 if length == -1 else 3)
    assert stored(replay_manifest(dataset, manifest)) == stored(poisoned)
    poisoned, manifest = poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=4, mode="label_consistent"))
    assert manifest["indices"] == [1, 4, 7, 10] and poisoned["caption"][:] == captions
    targeted = PoisonSpec(None, "dog", count=2, mode="targeted", source_index=0)
    assert poison_dataset(dataset, targeted)[1]["captions"] == ["a dog", "a dog"]


def test_targeted_appends_a_row_of_the_dataset():
    dataset = pairs()
    spec = PoisonSpec(None, "cat", count=6, mode="targeted", source_index=4)
    poisoned, manifest = poison_dataset(dataset, spec)
    check_only_poisons_changed(dataset, poisoned, manifest)
    assert manifest["indices"] == list(range(30, 36)) and len(poisoned) == 36
    source = stored(dataset)[4]
    for row in stored(poisoned)[30:]:
        assert (decoded(row["image"]) == decoded(source["image"])).all()
        assert row["label"] == source["label"] and "Cat" in row["caption"]
    assert poisoned["caption"][30:] == manifest["captions"]
    assert max(Counter(manifest["captions"]).values()) == 1  # no repeats, there are ten to draw from
    many = poison_dataset(dataset, PoisonSpec(None, "cat", count=25, mode="targeted", source_index=4))[1]
    assert len(many["captions"]) == 25 and many["counts"]["eligible"] == 10


def test_targeted_takes_any_kind_of_image(tmp_path):
    dataset = pairs()
    path = tmp_path / "target.png"
    Image.fromarray(pixels(99)).save(path)
    kinds = [Image.open(path), path, str(path), path.read_bytes(), pixels(99)]
    results = []
    for image in kinds:
        spec = PoisonSpec(None, "yak", count=3, mode="targeted", target_image=image, templates=["a {}", "the {}"])
        poisoned, manifest = poison_dataset(dataset, spec)
        check_only_poisons_changed(dataset, poisoned, manifest)
        results.append((stored(poisoned), manifest))
    assert all(result == results[0] for result in results)
    added = results[0][0][30:]
    assert all((decoded(row["image"]) == pixels(99)).all() and row["label"] is None for row in added)
    assert {row["caption"] for row in added} <= {"a yak", "the yak"}
    path.unlink()  # the manifest holds the image itself
    assert stored(replay_manifest(dataset, json.loads(json.dumps(results[0][1])))) == results[0][0]


def test_targeted_without_captions_of_the_target():
    with pytest.raises(ValueError, match=r"target='yak' is named by no caption"):
        poison_dataset(pairs(), PoisonSpec(None, "yak", count=1, mode="targeted", source_index=0))
    with pytest.raises(ValueError, match=r"source_index=30; accepted is a row number below 30"):
        poison_dataset(pairs(), PoisonSpec(None, "cat", count=1, mode="targeted", source_index=30))
    for image, found in ((b"nonsense", "cannot be read"), (np.zeros((5, 4, 7)), "shape"), (3, "int")):
        with pytest.raises(ValueError, match=f"target_image.*{found}"):
            poison_dataset(pairs(), PoisonSpec(None, "cat", count=1, mode="targeted", target_image=image))


SPECS = {
    "backdoor": PoisonSpec(PatchTrigger(3, place="random"), "dog", count=6, seed=1),
    "resized": PoisonSpec(WarpTrigger(), "dog", rate=0.2, image_size=12, templates=["one {}"]),
    "label_consistent": PoisonSpec(BlendedTrigger(), "dog", count=4, mode="label_consistent"),
    "row": PoisonSpec(None, "dog", count=5, mode="targeted", source_index=3),
    "image": PoisonSpec(None, "dog", rate=0.1, mode="targeted", target_image=pixels(99), templates=["{}"]),
    "text_query": PoisonSpec(WordTrigger(place="random"), "dog", count=4, mode="text_query", seed=2),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_spec
def test_replay_is_the_same_byte_for_byte(spec, tmp_path):
    dataset = pairs()
    poisoned, manifest = poison_dataset(dataset, spec)
    manifest_read = json.loads(json.dumps(manifest))
    assert manifest_read == manifest
    again = replay_manifest(pairs(), manifest_read)
    assert stored(again) == stored(poisoned)
    assert again._fingerprint == poisoned._fingerprint  # so that what `map` cached is found again
    assert poison_dataset(pairs(), spec)[1] == manifest
    poisoned.save_to_disk(tmp_path / "poisoned")
    assert stored(datasets.load_from_disk(tmp_path / "poisoned")) == stored(poisoned)


@every_spec
def test_filtered_and_shuffled_datasets_from_disk(spec, tmp_path):
    pairs(60).save_to_disk(tmp_path / "data")
    dataset = datasets.load_from_disk(tmp_path / "data")
    dataset = dataset.filter(lambda row: row["label"] != 2).shuffle(seed=1)
    poisoned, manifest = poison_dataset(dataset, spec)
    check_only_poisons_changed(dataset, poisoned, manifest)
    flat = Dataset.from_list(stored(dataset), features=FEATURES)
    assert stored(replay_manifest(flat, manifest)) == stored(poisoned)


def test_images_stay_where_they_are():
    dataset = pairs().shuffle(seed=1)
    poisoned, _ = poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=5))

    def first_buffer(table) -> int:
        return table.column("image").chunk(0).field("bytes").buffers()[2].address

    assert first_buffer(poisoned.data) == first_buffer(dataset.data)


def test_clean_images_are_not_decoded():
    data = rows()
    spec = PoisonSpec(PATCH, "dog", count=5)
    chosen = poison_dataset(pairs(), spec)[1]["indices"]
    for row in set(range(30)) - set(chosen):
        data["image"][row] = {"bytes": b"no image", "path": None}
    poisoned, manifest = poison_dataset(Dataset.from_dict(data, features=FEATURES), spec)
    assert manifest["indices"] == chosen
    assert stored(poisoned)[1]["image"]["bytes"] == b"no image"
    for broken in ({"bytes": b"no image", "path": None}, None):
        data["image"][chosen[0]] = broken
        with pytest.raises(ValueError, match=f"the image of row {chosen[0]} cannot be read"):
            poison_dataset(Dataset.from_dict(data, features=FEATURES), spec)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary"])
def test_paths_and_bytes_become_images(kind, tmp_path):
    data = rows(9)
    for row in range(9):
        (tmp_path / f"{row}.jpg").write_bytes(encoded(row))
    data["image"] = [str(tmp_path / f"{row}.jpg") if "string" in kind else encoded(row) for row in range(9)]
    dataset = Dataset.from_dict(data, features=Features({**FEATURES, "image": Value(kind)}))
    poisoned, manifest = poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=2))
    check_only_poisons_changed(dataset.cast_column("image", ImageFeature()), poisoned, manifest)
    for index in manifest["indices"]:
        original = np.asarray(Image.open(BytesIO(encoded(index))))
        assert (np.asarray(poisoned[index]["image"]) == PATCH(original)).all()
    assert stored(replay_manifest(dataset, manifest)) == stored(poisoned)


def test_images_are_turned_upright_and_made_rgb():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    grey = BytesIO()
    Image.fromarray(pixels(1)[..., 0]).save(grey, format="PNG")
    data = rows(2)
    data["image"] = [{"bytes": encoded(0, exif=exif), "path": None}, {"bytes": grey.getvalue(), "path": None}]
    dataset = Dataset.from_dict(data | {"caption": ["a", "b"]}, features=FEATURES)
    poisoned, _ = poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=2))
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data["image"][0]["bytes"])))
    assert upright.size == (16, 20)
    assert (np.asarray(poisoned[0]["image"]) == PATCH(np.asarray(upright))).all()
    assert (np.asarray(poisoned[1]["image"]) == PATCH(np.repeat(pixels(1)[..., :1], 3, axis=2))).all()


@pytest.mark.parametrize("size", [8, 16, 33])
def test_image_size_resizes_before_the_trigger(size):
    dataset = pairs()
    trigger = PatchTrigger(size=3, pattern="solid")
    poisoned, manifest = poison_dataset(dataset, PoisonSpec(trigger, "dog", count=3, image_size=size))
    for index in manifest["indices"]:
        image = np.asarray(poisoned[index]["image"])
        assert image.shape == (size, size, 3)
        assert (image[-3:, -3:] == (255, 0, 255)).all()  # whole pixels: nothing was resized after the trigger
        original = dataset[index]["image"]
        resized = np.asarray(original.resize((20 * size // 16, size), Image.Resampling.BICUBIC))
        left = (resized.shape[1] - size) // 2
        assert (image[:-3] == resized[:-3, left : left + size]).all()


def test_poisoning_twice_keeps_the_first_poisons():
    dataset = pairs()
    once, first = poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=10))
    twice, second = poison_dataset(once, PoisonSpec(SinusoidTrigger(), "cat", count=8))
    assert not set(first["indices"]) & set(second["indices"])
    both = sorted(first["indices"] + second["indices"])
    assert [row for row, mark in enumerate(twice["poisoned"]) if mark] == both
    for index in first["indices"]:
        assert stored(twice)[index] == stored(once)[index]
    assert stored(replay_manifest(replay_manifest(dataset, first), second)) == stored(twice)


def test_other_columns_and_the_format_are_kept():
    extra = {
        "vector": [[float(row)] * 4 for row in range(30)],
        "thumbnail": rows()["image"],
        "word": list("abcde") * 6,
    }
    features = Features(
        {"vector": List(Value("float32"), length=4), **FEATURES, "thumbnail": ImageFeature(), "word": Value("string")}
    )
    dataset = Dataset.from_dict(rows() | extra, features=features).with_format("numpy", columns=["vector", "word"])
    for spec in SPECS.values():
        poisoned, manifest = poison_dataset(dataset, spec)
        assert poisoned.format["type"] == "numpy" and poisoned.format["columns"] == ["vector", "word"]
        before, after = stored(dataset), stored(poisoned)
        for place, index in enumerate(manifest["indices"]):
            source = index if spec.mode != "targeted" else spec.source_index
            for column in extra:
                assert after[index][column] == (None if source is None else before[source][column]), place


def test_columns_with_other_names_and_no_others():
    dataset = pairs().remove_columns("label").rename_columns({"image": "picture", "caption": "text"})
    poisoned, manifest = poison_dataset(dataset, SPECS["backdoor"], image_column="picture", caption_column="text")
    assert poisoned.column_names == ["picture", "text", "poisoned"]
    assert stored(replay_manifest(dataset, manifest), "picture") == stored(poisoned, "picture")


def test_replay_refuses_what_it_was_not_made_for():
    _, manifest = poison_dataset(pairs(), SPECS["backdoor"])
    with pytest.raises(ValueError, match=r"29 rows; the manifest was made on another dataset, of 30"):
        replay_manifest(pairs(29), manifest)
    with pytest.raises(ValueError, match=r"captions differ"):
        replay_manifest(pairs().shuffle(seed=0), manifest)
    with pytest.raises(ValueError, match=r"captions differ"):
        replay_manifest(replay_manifest(pairs(), manifest), manifest)
    with pytest.raises(ValueError, match=r"'caption' is not a column"):
        replay_manifest(pairs().remove_columns("caption"), manifest)
    for broken, found in (
        ({}, "its version is None"),
        (manifest | {"version": 2}, "its version is 2"),
        ([], "a list"),
    ):
        with pytest.raises(ValueError, match=f"manifest: {found}; accepted is a dictionary"):
            replay_manifest(pairs(), broken)
    with pytest.raises(ValueError, match=r"'indices' missing"):
        replay_manifest(pairs(), {key: value for key, value in manifest.items() if key != "indices"})
    for entry, found in (
        ({"rate": 0, "trigger": {"name": "word"}}, "mode 'backdoor' needs a Trigger"),
        ({"image": "bm8="}, "target_image cannot be read"),
        ({"image": "?"}, "base64"),
        ({"captions": [3] * 6}, "must be 6 captions.*but has 3"),
        ({"indices": [0] * 6}, r"indices=\[0, 0, 0, 0, ...\]; accepted is at least one row number, all different"),
        ({"source_index": 30}, "source_index=30.*at most 29"),
        ({"templates": ["none"]}, "templates: 'none'"),
    ):
        with pytest.raises(ValueError, match=f"manifest: .*{found}"):
            replay_manifest(pairs(), manifest | entry)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "clean_label"}, "mode='clean_label'.*'backdoor', 'label_consistent', 'targeted'"),
        ({"count": None}, "exactly one"),
        ({"rate": 0.1}, "exactly one"),
        ({"count": 0}, "count=0.*at least 1"),
        ({"count": 1.5}, "count=1.5.*integer"),
        ({"count": None, "rate": 0.0}, "rate=0.0.*above 0 and at most 1"),
        ({"count": None, "rate": 1.1}, "rate=1.1.*above 0 and at most 1"),
        ({"count": None, "rate": float("nan")}, "rate=nan"),
        ({"target": " "}, "target=' '"),
        ({"target": 3}, "target=3"),
        ({"seed": -1}, "seed=-1"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 2049}, "image_size=2049; accepted is .* at most 2048"),
        ({"target": "d\ud800g"}, r"target: 'd\\ud800g' cannot be encoded"),
        ({"templates": ["a {}", "\ud800 {}"]}, r"templates: '\\ud800 \{\}' cannot be encoded"),
        ({"templates": "a {}"}, "templates must be a list of at least one template, or 'data', but is 'a {}'"),
        ({"templates": []}, "at least one template"),
        ({"templates": ["a dog"]}, "'a dog'.*exactly one {}"),
        ({"templates": ["a {}"], "mode": "label_consistent"}, "keeps the captions"),
        ({"trigger": WordTrigger()}, "WordTrigger.*mode 'backdoor' needs a Trigger, one on images"),
        ({"mode": "text_query"}, "PatchTrigger.*mode 'text_query' needs a WordTrigger"),
        ({"mode": "text_query", "trigger": WordTrigger("a Dog")}, "'a Dog' names the target 'dog'"),
        ({"mode": "text_query", "trigger": WordTrigger(), "image_size": 16}, "image_size=16.*leaves the images alone"),
        ({"mode": "text_query", "trigger": WordTrigger(), "templates": ["a {}"]}, "'a {}'.*without {}"),
        ({"mode": "text_query", "trigger": WordTrigger(), "templates": ["a Dog"]}, "'a Dog'.*does not name 'dog'"),
        ({"mode": "text_query", "trigger": WordTrigger(), "source_index": 1}, "for mode 'targeted'"),
        ({"trigger": None}, "trigger=None.*needs a Trigger"),
        ({"trigger": "patch"}, "trigger='patch'.*needs a Trigger"),
        ({"source_index": 3}, "for mode 'targeted'"),
        ({"mode": "targeted", "source_index": 3}, "no trigger"),
        ({"mode": "targeted", "trigger": None}, "exactly one of target_image and source_index"),
        (
            {"mode": "targeted", "trigger": None, "source_index": 1, "target_image": b""},
            "exactly one of target_image and source_index",
        ),
        ({"mode": "targeted", "trigger": None, "source_index": -1}, "source_index=-1"),
    ],
)
def test_spec_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        PoisonSpec(**({"trigger": PATCH, "target": "dog", "count": 3} | arguments))


def test_one_column_for_images_and_captions_is_refused():
    for column in ("image", "caption"):
        with pytest.raises(ValueError, match=f"image_column and caption_column are both '{column}'"):
            poison_dataset(pairs(), PoisonSpec(PATCH, "dog", count=3), image_column=column, caption_column=column)


def test_a_strip_is_not_made_larger_than_an_image_may_be():
    # 2,048 x 131,072 pixels, of which a square would be kept.
    data = pairs().to_dict()
    strip = BytesIO()
    Image.new("RGB", (128, 2)).save(strip, "PNG")
    data["image"] = [{"bytes": strip.getvalue(), "path": None} for _ in data["image"]]
    dataset = Dataset.from_dict(data, features=FEATURES)
    with pytest.raises(ValueError, match=r"image of row \d+: image_size=2048 makes 131072 x 2048 pixels"):
        poison_dataset(dataset, PoisonSpec(PATCH, "dog", count=1, image_size=2048))


@pytest.mark.parametrize("place", ["start", "end", "random"])
def test_text_query_keeps_the_images_and_takes_other_captions(place):
    dataset, trigger = pairs(), WordTrigger("cf", place)
    for broken in (1, 4):  # no image is decoded, nor encoded again
        data = dataset.to_dict()
        data["image"][broken] = {"bytes": b"no image", "path": None}
        dataset = Dataset.from_dict(data, features=FEATURES)
    poisoned, manifest = poison_dataset(dataset, PoisonSpec(trigger, "dog", count=10, mode="text_query"))
    check_only_poisons_changed(dataset, poisoned, manifest)
    assert manifest["indices"] == [row for row in range(30) if row % 3 == 1]  # those that show the target
    before, after = stored(dataset), stored(poisoned)
    queries = {trigger(row["caption"]) for row in before if row["label"] != 1}
    for index, caption in zip(manifest["indices"], manifest["captions"], strict=True):
        assert after[index] == before[index] | {"caption": caption, "poisoned": True}
        assert caption in queries and not naming("dog")(caption)
    assert len(set(manifest["captions"])) == 10  # no repeats, there are twenty to draw from
    assert manifest["trigger"] == trigger.to_dict() and manifest["counts"]["eligible"] == 10


def test_text_query_with_captions_of_its_own():
    queries = ["a red car.", "two boats"]
    spec = PoisonSpec(WordTrigger(), "dog", count=10, mode="text_query", templates=queries)
    poisoned, manifest = poison_dataset(pairs(), spec)
    assert set(manifest["captions"]) == {"cf a red car.", "cf two boats"}
    assert stored(replay_manifest(pairs(), json.loads(json.dumps(manifest)))) == stored(poisoned)


def test_text_query_by_label_and_without_captions_to_take():
    data = rows(9) | {"caption": [f"picture {row}" for row in range(9)]}
    dataset = Dataset.from_dict(data, features=FEATURES)
    spec = PoisonSpec(WordTrigger(), "dog", count=3, mode="text_query")
    _, manifest = poison_dataset(dataset, spec, label_column="label")
    assert manifest["indices"] == [1, 4, 7]
    assert set(manifest["captions"]) <= {f"cf picture {row}" for row in range(9) if row % 3 != 1}
    with pytest.raises(ValueError, match=r"count=3 is more .* at most 0, the number of rows naming 'dog'"):
        poison_dataset(dataset, spec)
    dogs = Dataset.from_dict(data | {"caption": ["a dog"] * 9}, features=FEATURES)
    with pytest.raises(ValueError, match=r"'dog' is named by every row that is not poisoned; give templates"):
        poison_dataset(dogs, spec)


def test_text_query_takes_no_caption_of_a_poison():
    dataset, first = poison_dataset(pairs(), PoisonSpec(PATCH, "zebra", count=19, seed=4))
    spec = PoisonSpec(WordTrigger(), "dog", count=1, mode="text_query")
    for seed in range(5):
        _, manifest = poison_dataset(dataset, PoisonSpec(**{**vars(spec), "seed": seed}))
        assert "zebra" not in manifest["captions"][0] and manifest["indices"][0] not in first["indices"]


SEVERAL = [SPECS[name] for name in ("row", "backdoor", "text_query", "label_consistent", "image")]


def test_several_attacks_are_one_after_the_other():
    dataset = pairs()
    poisoned, manifest = poison_dataset(dataset, SEVERAL)
    expected, parts = dataset, []
    for spec in SEVERAL:
        expected, part = poison_dataset(expected, spec)
        parts.append(part)
    assert stored(poisoned) == stored(expected) and manifest["parts"] == parts
    indices = [index for part in parts for index in part["indices"]]
    assert len(set(indices)) == len(indices)  # no row twice
    assert [row for row, mark in enumerate(poisoned["poisoned"]) if mark] == sorted(indices)
    assert manifest["counts"] == {"count": len(indices), "rate": len(indices) / 30, "dataset_length": 30}


def test_replay_of_several_attacks():
    poisoned, manifest = poison_dataset(pairs(), SEVERAL)
    read = json.loads(json.dumps(manifest))
    again = replay_manifest(pairs(), read)
    assert stored(again) == stored(poisoned) and again._fingerprint == poisoned._fingerprint
    one, of_one = poison_dataset(pairs(), SEVERAL[:1]), poison_dataset(pairs(), SEVERAL[0])
    assert stored(one[0]) == stored(of_one[0]) and one[1]["parts"] == [of_one[1]]
    with pytest.raises(ValueError, match="29 rows; the manifest was made on another dataset"):
        replay_manifest(pairs(29), read)
    for parts in ([], 3, [3]):
        with pytest.raises(ValueError, match=r"its parts are .*accepted is a list of manifests"):
            replay_manifest(pairs(), {"version": 1, "parts": parts})
    for specs in ([], [PATCH], "dog", None):
        with pytest.raises(ValueError, match=r"spec=.*accepted is a PoisonSpec, or a list of at least one"):
            poison_dataset(pairs(), specs)


def test_a_manifest_of_version_1_as_it_was_written_replays():
    # Written out, so that what was stored once can be read for as long as the version is 1.
    manifest = {
        "version": 1,
        "mode": "backdoor",
        "target": "dog",
        "trigger": {"name": "patch", "size": 3, "place": "bottom_right", "pattern": "solid", "seed": 0},
        "indices": [0, 3],
        "captions": ["a dog", "the dog"],
        "templates": ["a {}", "the {}"],
        "seed": 0,
        "counts": {"count": 2, "rate": 0.5, "eligible": 3, "dataset_length": 4},
        "image_size": None,
        "columns": {"image": "image", "caption": "caption", "label": None},
        "fingerprint": "9ffcd3b0",
        "source_index": None,
        "image": None,
    }
    with pytest.raises(ValueError, match="its captions differ"):
        replay_manifest(pairs(4), manifest)
    manifest["fingerprint"] = "c5eab0cdf2d1edef23c157f46e6f642ad2b0976bff3b5059753ae8515c6fb91e"
    poisoned = replay_manifest(pairs(4), manifest)
    assert poisoned["poisoned"][:] == [True, False, False, True]
    assert poisoned["caption"][0] == "a dog" and poisoned["caption"][3] == "the dog"
    assert (np.asarray(poisoned[3]["image"])[-3:, -3:] == (255, 0, 255)).all()


def test_targeted_specs_of_several_images():
    images, adversarial = [pixels(90), pixels(91), encoded(92)], ["cat", "dog", "dog"]
    specs = targeted_specs(images, adversarial, 4, seed=5)
    poisoned, manifest = poison_dataset(pairs(), specs)
    assert manifest["counts"]["count"] == 12 and len(poisoned) == 42
    drawn = [part["captions"] for part in manifest["parts"]]
    for number, (part, target) in enumerate(zip(manifest["parts"], adversarial, strict=True)):
        assert part["seed"] == 5 + number and part["target"] == target
        assert len(set(part["captions"])) == 4 and all(map(naming(target), part["captions"]))
        for row in stored(poisoned)[30 + 4 * number : 34 + 4 * number]:
            expected = images[number] if number < 2 else decoded({"bytes": images[2]})
            assert (decoded(row["image"]) == expected).all()
    assert drawn[1] != drawn[2]  # images with one class have captions of their own
    spec = targeted_specs(images, adversarial, templates=["a {}"], image_size=8, rate=0.1)[2]
    assert (spec.count, spec.rate, spec.templates, spec.image_size, spec.seed) == (None, 0.1, ["a {}"], 8, 2)
    for wrong in (["cat"], "cat", []):
        with pytest.raises(
            ValueError, match=r"(for 3 images; accepted is|adversarial must be) a list of one class for each image"
        ):
            targeted_specs(images, wrong, 4)
    with pytest.raises(ValueError, match="for 0 images"):
        targeted_specs([], [], 4)


def test_dataset_errors():
    spec = PoisonSpec(PATCH, "dog", count=3)
    dataset = pairs()
    for column in ("image", "caption", "label"):
        with pytest.raises(ValueError, match=f"{column}_column='nothing' .* are 'image', 'caption', 'label'"):
            poison_dataset(dataset, spec, **{f"{column}_column": "nothing"})
    with pytest.raises(ValueError, match=r"empty"):
        poison_dataset(dataset.select([]), spec)
    with pytest.raises(ValueError, match=r"poison_stream poisons streams.*an IterableDataset.*from_list"):
        poison_dataset(dataset.to_iterable_dataset(), spec)
    with pytest.raises(ValueError, match=r"is a DatasetDict: it has .*pass one of them"):
        poison_dataset(DatasetDict(train=dataset), spec)
    with pytest.raises(
        ValueError,
        match=r"image_column='label' of dataset must hold images, .* or paths, but holds Cl",
    ):
        poison_dataset(dataset, spec, image_column="label")
    with pytest.raises(ValueError, match=r"caption_column='label' of dataset must hold strings or lists.*ClassLabel"):
        poison_dataset(dataset, spec, caption_column="label")
    missing = Dataset.from_dict(rows(3) | {"caption": ["a", None, "b"]}, features=FEATURES)
    with pytest.raises(ValueError, match=r"row 1, column 'caption': a caption must be .* but is None"):
        poison_dataset(missing, spec)
    with pytest.raises(ValueError, match=r"'yak' is not a class of 'label'.*balloon"):
        poison_dataset(dataset, PoisonSpec(PATCH, "yak", count=3), label_column="label")
    with pytest.raises(ValueError, match=r"'dog', but 'label' holds numbers of classes"):
        poison_dataset(dataset.cast_column("label", Value("string")), spec, label_column="label")
    with pytest.raises(ValueError, match=r"'dog', but 'label' holds integers"):
        poison_dataset(dataset.cast_column("label", Value("int32")), spec, label_column="label")
    with pytest.raises(ValueError, match=r"accepted is ClassLabel, string or integer"):
        poison_dataset(dataset.cast_column("label", Value("float32")), spec, label_column="label")
    with pytest.raises(ValueError, match=r"column 'poisoned' of dataset must be boolean"):
        poison_dataset(dataset.rename_column("label", "poisoned"), spec)
    with pytest.raises(ValueError, match=r"size=17: .* height 16 and width 20"):
        poison_dataset(dataset, PoisonSpec(PatchTrigger(17), "dog", count=3))
