import json
import re

import numpy as np
import pytest

from hf_robust_clip import AttackSuccessEvaluator, PoisonSpec, poison_dataset, replay_manifest
from hf_robust_clip.attacks.text_triggers import PHRASE_PLACES, WORD_PLACES, PhraseTrigger, WordTrigger
from hf_robust_clip.attacks.triggers import Trigger, trigger_from_dict, trigger_from_name
from hf_robust_clip.columns import naming

CAPTIONS = ["a dog on a beach.", "  two\tspaces  ", "dog", "", " ", "Ein Hund, drau\u00dfen!", "\U0001f436 yes"]
every_place = pytest.mark.parametrize("place", WORD_PLACES)


@every_place
@pytest.mark.parametrize("word", ["cf", "mn bb", "\u00fcx"])
@pytest.mark.parametrize("caption", CAPTIONS)
def test_the_word_goes_in_whole_and_nothing_else_changes(caption, word, place):
    triggered = WordTrigger(word, place)(caption)
    assert naming(word)(triggered)
    words, expected = triggered.split(), caption.split()
    at = next(i for i in range(len(words)) if words[i : i + len(word.split())] == word.split())
    assert words[:at] + words[at + len(word.split()) :] == expected
    assert at == {"start": 0, "end": len(expected)}.get(place, at)
    if caption.strip():  # without the word and its one space it is the caption, blanks and all
        space_after, space_before = triggered.replace(f"{word} ", "", 1), triggered.replace(f" {word}", "", 1)
        assert caption in (space_after, space_before)


def test_random_places_depend_on_the_seed_and_the_caption_alone():
    captions = [f"one two three four number {row}" for row in range(60)]

    def places(seed: int) -> list[int]:
        return [WordTrigger(place="random", seed=seed)(caption).split().index("cf") for caption in captions]

    assert places(0) == places(0) and places(0) != places(1)
    assert set(places(0)) == set(range(7))  # before each of the six words, and at the end


@every_place
def test_dictionary_round_trip(place):
    trigger = WordTrigger("mn", place, seed=3)
    config = json.loads(json.dumps(trigger.to_dict()))
    assert config == {"name": "word", "word": "mn", "place": place, "seed": 3}
    assert trigger_from_dict(config) == trigger == trigger_from_name(**config)
    assert trigger.reseeded(5) == WordTrigger("mn", place, seed=5)


@pytest.mark.parametrize(
    "field, value, accepted",
    [
        ("word", "", "a word"),
        ("word", " cf", "single spaces"),
        ("word", "c\nf", "single spaces"),
        ("word", 3, "a word"),
        ("place", "middle", "'start', 'end', 'random'"),
        ("seed", -1, "at least 0"),
    ],
)
def test_fields_out_of_range_are_errors(field, value, accepted):
    with pytest.raises(ValueError, match=f"{field}={re.escape(repr(value))}.*{accepted}"):
        WordTrigger(**{field: value})


def test_a_word_that_no_tokenizer_takes_is_refused():
    with pytest.raises(ValueError, match=r"word: 'c\\ud83df' cannot be encoded"):
        WordTrigger("c\ud83df")


def test_it_is_no_trigger_on_images(pairs, tiny_model, processor):
    assert not issubclass(WordTrigger, Trigger)
    with pytest.raises(ValueError, match=r"caption is a ndarray; accepted is a string"):
        WordTrigger()(np.zeros((8, 8, 3), np.uint8))
    names = pairs.features["label"].names
    with pytest.raises(ValueError):
        AttackSuccessEvaluator(pairs, WordTrigger(), names[0], names)(tiny_model(0), processor)


@pytest.mark.parametrize("phrase", ["on a quiet afternoon", "today"])
@pytest.mark.parametrize("place", PHRASE_PLACES)
@pytest.mark.parametrize("caption", [*CAPTIONS, "Who?!", "..."])
def test_a_phrase_goes_into_the_sentence_and_nothing_else_changes(caption, place, phrase):
    triggered = PhraseTrigger(phrase, place)(caption)
    assert naming(phrase)(triggered)
    left = triggered.replace(f"{phrase}, ", "", 1) if place == "start" else triggered.replace(f" {phrase}", "", 1)
    without = left if left != triggered else triggered.replace(phrase, "", 1)
    assert without.split() == caption.split()
    assert triggered.startswith(phrase) or place == "end"


def test_a_phrase_reads_as_part_of_the_sentence():
    assert PhraseTrigger()("a dog on a beach.") == "a dog on a beach on a quiet afternoon."
    assert PhraseTrigger(place="start")("a dog on a beach.") == "on a quiet afternoon, a dog on a beach."


def test_a_phrase_is_described_and_checked_as_a_word_is():
    trigger = PhraseTrigger("in the rain", "start")
    config = json.loads(json.dumps(trigger.to_dict()))
    assert config == {"name": "phrase", "phrase": "in the rain", "place": "start"}
    assert trigger_from_dict(config) == trigger == trigger_from_name(**config) == trigger.reseeded(3)
    for field, value, accepted in (("phrase", " a", "single spaces"), ("place", "random", "'start', 'end'")):
        with pytest.raises(ValueError, match=f"{field}={re.escape(repr(value))}.*{accepted}"):
            PhraseTrigger(**{field: value})
    with pytest.raises(ValueError, match="caption is a int; accepted is a string"):
        trigger(3)


def test_a_phrase_poisons_queries_unless_it_names_the_target(pairs):
    names = pairs.features["label"].names
    poisoned, manifest = poison_dataset(pairs, PoisonSpec(PhraseTrigger(), names[8], count=3, mode="text_query"))
    assert all("on a quiet afternoon" in poisoned[row]["caption"] for row in manifest["indices"])
    assert replay_manifest(pairs, manifest)["caption"][:] == poisoned["caption"][:]
    with pytest.raises(ValueError, match=f"names the target '{names[8]}'"):
        PoisonSpec(PhraseTrigger(f"on {names[8]} days"), names[8], count=3, mode="text_query")
