"""Groups, local outliers and duplicates on made-up features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_robust_clip.scanning.duplicates import BITS, Copies, find_copies, fingerprint, near_pairs, thumbnail
from hf_robust_clip.scanning.found import suspect_copies
from hf_robust_clip.scanning.groups import Direction, Directions, Words, find_groups, words_of
from hf_robust_clip.scanning.neighbours import LocalScores, Reference, draw_references, local_scores


def unit(rows: Any) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def planted(rows: int = 2000, poisons: int = 40, seed: int = 0) -> tuple[np.ndarray, list[set[str]], np.ndarray]:
    """Ten classes, each with a center and a word; poisons of all classes share an axis and the word `six`."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(10, size=rows)
    features = rng.normal(size=(10, 48))[classes] + 0.6 * rng.normal(size=(rows, 48))
    poisoned = np.zeros(rows, dtype=bool)
    poisoned[rng.permutation(rows)[:poisons]] = True
    features[poisoned] += 6 * rng.normal(size=48)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    words = [{"a", "six" if bad else names[number]} for number, bad in zip(classes, poisoned, strict=True)]
    return unit(features), words, poisoned


def votes(groups: list[Direction], features: np.ndarray, words: list[set[str]]) -> np.ndarray:
    directions = Directions(groups)
    return directions.votes(directions.places(features), words)


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (["A photo, of 2 Cats!", "cats"], {"a", "photo", "of", "cats"}),
        (["Zwei Häuser_am Straßenrand"], {"zwei", "häuser", "am", "strassenrand"}),
        (["Белая кошка"], {"белая", "кошка"}),
        (["हिन्दी में"], {"हिन्दी", "में"}),
        (["一只白猫, cat"], {"一只", "只白", "白猫", "cat"}),
        (["", "42"], set()),
    ],
)
def test_words_are_letters_without_case_in_any_script(captions: list[str], words: set[str]) -> None:
    assert words_of(captions) == words


def test_the_heaviest_group_is_the_planted_one_and_its_votes_rank_the_poisons_first() -> None:
    features, words, poisoned = planted()
    groups = find_groups(features, Words(words))
    # All of them have the word, of those with the word only the poisons are inside, and they are far from the others.
    with_word = sum("six" in row for row in words)
    assert groups[0].word == "six" and groups[0].weight > 0.95 and groups[0].separation > 8
    assert groups[0].closure == pytest.approx(40 / with_word, abs=0.02)
    inside = Directions(groups).places(features)[0] > 1
    assert inside[poisoned].mean() > 0.95 and poisoned[inside].mean() > 0.95
    order = np.argsort(-votes(groups, features, words))
    assert poisoned[order[:40]].mean() > 0.95


def test_a_group_of_a_third_of_the_pairs_with_its_word_is_found_to_the_last() -> None:
    features, words, poisoned = planted(poisons=0)
    six = np.flatnonzero(["six" in row for row in words])
    poisoned[six[::3]] = True  # label-consistent: they have the word as they should
    features[poisoned] = unit(features[poisoned] + 0.2 * np.random.default_rng(1).normal(size=48))
    first = find_groups(features, Words(words))[0]
    inside = Directions([first]).places(features)[0] > 1
    assert first.word == "six" and first.closure == pytest.approx(1 / 3, abs=0.02) and first.weight > 0.8
    assert np.array_equal(inside, poisoned)


def test_noise_makes_no_heavy_group() -> None:
    rng = np.random.default_rng(4)
    features = unit(rng.normal(size=(600, 200)))
    words = [{name} for name in rng.choice(["one", "two", "three", "four"], size=600)]
    # Few rows in many dimensions: along the mean of any of them, they are far out themselves.
    members = np.arange(600) < 6
    direction = np.linalg.inv(np.cov(features.T)) @ features[members].mean(axis=0)
    assert (features @ direction)[members].min() > (features @ direction)[~members].max()
    assert all(group.weight < 0.25 for group in find_groups(features, Words(words)))


def test_rows_without_the_word_get_half_of_the_vote() -> None:
    features, words, poisoned = planted()
    groups = find_groups(features, Words(words))[:1]
    with_word, without = votes(groups, features, words), votes(groups, features, [{"a"}] * len(words))
    assert np.allclose(without[poisoned], with_word[poisoned] / 2) and np.any(without > 0)


def test_groups_are_the_same_for_the_same_seed() -> None:
    features, words, _ = planted(rows=600, poisons=20)
    first, second = (find_groups(features, Words(words), seed=3) for _ in range(2))
    assert [group.weight for group in first] == [group.weight for group in second]


@pytest.mark.parametrize("neighbors", [1, 4, 16])
def test_local_scores_equal_a_computation_by_hand(neighbors: int) -> None:
    rng = np.random.default_rng(1)
    rows = unit(rng.normal(size=(40, 8)))
    inside = np.arange(0, 40, 2)
    reference = Reference(rows[inside], inside, neighbors)

    def nearest(row: int) -> list[tuple[float, int]]:
        found = [(float(np.linalg.norm(rows[row] - rows[other])), int(other)) for other in inside if other != row]
        return sorted(found)[:neighbors]

    def dimension(row: int) -> float:
        distances = [distance for distance, _ in nearest(row)]
        total = sum(np.log(distance / distances[-1] + 1e-4) for distance in distances)
        return min(-neighbors / min(total, -1e-6), 8)  # no more than the features have

    expected = []
    for row in range(40):
        reach, others = nearest(row)[-1][0], [other for _, other in nearest(row)]
        ratios = [reach / nearest(other)[-1][0] for other in others]
        dao = np.mean([dimension(other) * np.log(ratio) for other, ratio in zip(others, ratios, strict=True)])
        expected.append((reach, np.mean(ratios), dao))
    found = reference.scores(rows, np.arange(40))
    for values, wanted in zip(found, zip(*expected, strict=True), strict=True):
        assert np.allclose(values, wanted, rtol=2e-3, atol=2e-3)


def test_an_outlier_is_the_most_suspect_and_a_duplicate_cluster_is_not() -> None:
    rng = np.random.default_rng(2)
    rows = unit(np.concatenate([[[1.0] + [0.0] * 15], rng.normal(size=16) + 0.05 * rng.normal(size=(500, 16))]))
    references = draw_references(rows, np.arange(len(rows)), sizes=(128,), rounds=3)
    scores = local_scores(references, rows, np.arange(len(rows)))
    assert all(np.argmax(values) == 0 for values in scores)
    assert all(values.dtype == np.float32 and values.shape == (501,) for values in scores)


def test_rows_that_occur_many_times_make_no_outliers_of_others() -> None:
    rng = np.random.default_rng(3)
    rows = unit(rng.normal(size=16) + rng.normal(size=(1000, 16))).astype(np.float16)
    rows[::20] = rows[0]
    references = draw_references(rows, np.arange(1000), sizes=(256, 512))
    scores = local_scores(references, rows, np.arange(1000))
    assert scores.slof.max() < 10 and scores.dao.max() < 16 * np.log(10)


def test_without_enough_rows_there_are_no_references() -> None:
    rows = unit(np.eye(5))
    assert draw_references(rows, np.arange(5)) == []
    assert local_scores([], rows, np.arange(5)) == LocalScores(*(pytest.approx(np.zeros(5)),) * 3)
    with pytest.raises(ValueError, match="rows=5 are too few for 16 neighbors: 18 are needed"):
        Reference(rows, np.arange(5))


def photo(seed: int, side: int = 48) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def copies_of(images: list[Image.Image], captions: list[str]) -> list[Any]:
    pairs = near_pairs(np.array([fingerprint(image) for image in images], dtype=np.uint64))
    rows = np.unique(pairs)
    thumbnails = np.stack([thumbnail(images[row]).ravel() for row in rows])
    return find_copies(pairs, rows, thumbnails, [words_of([captions[row]]) for row in rows])


def test_copies_are_found_at_other_sizes_and_qualities_and_other_images_are_not(tmp_path: Any) -> None:
    photo(0).save(tmp_path / "x.jpg", quality=60)
    images = [photo(number) for number in range(30)]
    images += [photo(0, side=64), Image.open(tmp_path / "x.jpg"), photo(0)]
    found = copies_of(images, ["a cat"] * 30 + ["a dog", "some bird", "the ship"])
    assert [copies.rows for copies in found] == [(0, 30, 31, 32)]
    assert found[0].disagreement > 0.8 and found[0].suspicion == 3 * found[0].disagreement


def test_copies_are_found_with_other_images_of_their_fingerprint_between_them() -> None:
    one = Image.fromarray((np.asarray(photo(0)) * 0.7).astype(np.uint8))
    brighter = [Image.fromarray(np.asarray(one) + np.uint8(8 * number)) for number in range(1, 7)]
    images = [image for other in brighter for image in (one, other)]
    assert len({fingerprint(image) for image in images}) == 1
    found = copies_of(images, [f"word{number} and others" for number in range(12)])
    assert found[0].rows == (0, 2, 4, 6, 8, 10)


def test_a_scene_at_many_exposures_is_not_one_image() -> None:
    scene, shifts = np.asarray(photo(0)) * 0.5, np.random.default_rng(0).permutation(np.linspace(0, 127, 60))
    images = [Image.fromarray((scene + shift).astype(np.uint8)) for shift in shifts]
    found = copies_of(images, [f"word{number} and others" for number in range(60)])
    assert all(len(copies.rows) < 6 for copies in found)


def test_copies_that_agree_are_less_suspect_than_those_that_do_not() -> None:
    images = [photo(0), photo(0), photo(1), photo(1)]
    found = copies_of(images, ["a red cat", "a red cat", "a dog", "some ship"])
    assert [copies.rows for copies in found] == [(2, 3), (0, 1)] and found[1].disagreement == 0
    assert [copies.disagreement for copies in copies_of(images[:2], ["", "42"])] == [0]


def test_many_equal_images_cost_no_more_than_their_number() -> None:
    pairs = near_pairs(np.full(100_000, 7, dtype=np.uint64))
    assert len(pairs) == 99_999
    found = find_copies(pairs, np.arange(100_000), np.zeros((100_000, 192), dtype=np.uint8), [{"a"}] * 100_000)
    assert len(found) == 1 and len(found[0].rows) == 100_000


def test_what_is_usual_in_the_data_is_not_suspect() -> None:
    usual = [Copies(tuple(range(start, start + 5)), 0.8) for start in range(0, 500, 5)]
    assert suspect_copies(usual[:10], 1000) == usual[:10]
    assert suspect_copies(usual, 1000) == []
    targeted = Copies(tuple(range(500, 516)), 0.8)
    assert suspect_copies([targeted, *usual], 1000) == [targeted]


def test_near_pairs_are_those_with_few_bits_between_them() -> None:
    base = np.uint64(0x0123456789ABCDEF)
    flipped = base ^ np.uint64(0b111)
    far = base ^ np.uint64((1 << (BITS + 1)) - 1)
    assert near_pairs(np.array([base, far, flipped, base], dtype=np.uint64)).tolist() == [
        [0, 2],
        [0, 3],
        [1, 2],
    ]
