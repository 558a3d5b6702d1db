"""Stored tokens give the batches that the tokenizer gives, and only to the tokenizer and the captions they are of."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_robust_clip.data.scratch import build_processor
from hf_robust_clip.data.tokens import TOKENS_PREFIX, StoredTokens

TEXTS = ["the number eight", "", "a", "Zero, in grey: ÉCOLE 日本", "one two three four five " * 10]


@pytest.fixture
def tokenizer(processor):
    return copy.deepcopy(processor.tokenizer)


def typed(tokenizer) -> PreTrainedTokenizerFast:
    """One that returns types of tokens, too, as BERT's do."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=tokenizer.model_max_length,
        pad_token=tokenizer.pad_token,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


class Counting(PreTrainedTokenizerFast):
    """Returns more than ids tell."""

    def __call__(self, *args, **kwargs):
        found = super().__call__(*args, **kwargs)
        return {**found, "length": torch.ones(len(found["input_ids"]))}


def stored_rows(stored: StoredTokens, texts: list[str]) -> list[dict]:
    return [{stored.column: [entry]} for entry in stored.encode(texts)]


@pytest.mark.parametrize("kind", ["clip", "typed", "left"])
@pytest.mark.parametrize("max_length", [None, 5])
@pytest.mark.parametrize("padding", [True, "longest", "max_length"])
def test_batches_are_those_of_the_tokenizer(tokenizer, kind: str, max_length: int | None, padding: bool | str):
    if kind == "typed":
        tokenizer = typed(tokenizer)
    elif kind == "left":
        tokenizer.padding_side = "left"
    stored = StoredTokens(tokenizer, max_length)
    rows = stored_rows(stored, TEXTS)
    others = ["another caption of a row", *TEXTS[1:]]  # one that is not stored
    for texts in (TEXTS, TEXTS[:2], others):
        expected = tokenizer(texts, padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
        found = stored(texts, rows[: len(texts)], padding)
        assert found is not None and list(found) == list(expected)
        assert ("token_type_ids" in found) == (kind == "typed")
        for name, values in expected.items():
            assert found[name].dtype == values.dtype and torch.equal(found[name], values)


def test_stored_captions_are_not_tokenised_again(tokenizer, monkeypatch: pytest.MonkeyPatch):
    stored = StoredTokens(tokenizer)
    rows, asked = stored_rows(stored, TEXTS), []
    monkeypatch.setattr(StoredTokens, "_ids", lambda self, texts: asked.extend(texts) or [[0, 1]] * len(texts))
    stored(TEXTS, rows, True)
    assert asked == []
    stored([*TEXTS[:2], "new", *TEXTS[3:]], rows, True)
    assert asked == ["new"]


@pytest.mark.parametrize("value", [None, []])
def test_without_entries_or_with_another_padding_it_is_left_to_the_tokenizer(tokenizer, value):
    stored = StoredTokens(tokenizer)
    rows = stored_rows(stored, TEXTS)
    assert stored(TEXTS, [{stored.column: value}] * len(TEXTS), True) is None
    assert stored(TEXTS, [{}] * len(TEXTS), True) is None
    assert stored(TEXTS[::-1], rows, True) is not None  # the entry in the middle is its own
    assert stored(["new"] * len(TEXTS), rows, True) is None
    for padding in (False, "do_not_pad"):
        assert stored(TEXTS, rows, padding) is None


def test_the_name_is_of_what_the_tokenizer_makes(tokenizer, tmp_path: Path):
    name = StoredTokens(tokenizer).column
    assert name is not None and name.startswith(TOKENS_PREFIX)
    # What calls leave behind does not count, nor where it comes from, nor how a length is spelled out.
    tokenizer(["a"], padding="max_length", truncation=True, max_length=7)
    tokenizer.save_pretrained(tmp_path)
    same = [tokenizer, pickle.loads(pickle.dumps(tokenizer)), AutoTokenizer.from_pretrained(tmp_path)]
    assert {StoredTokens(one).column for one in same} == {name}
    assert StoredTokens(tokenizer, tokenizer.model_max_length).column == name
    others = [StoredTokens(tokenizer, 7).column, StoredTokens(typed(tokenizer)).column]
    others.append(StoredTokens(build_processor(["some other words"], image_size=16).tokenizer, 16).column)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["eightyeight"])
    others.append(StoredTokens(longer).column)
    assert len({name, *others}) == 5


def test_a_tokenizer_whose_batches_ids_do_not_tell_has_no_column(tokenizer):
    assert StoredTokens(SimpleNamespace(is_fast=False)).column is None
    tokenizer.backend_tokenizer.no_padding()  # an earlier call's would bring its token along
    unpadded = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, model_max_length=16)
    assert StoredTokens(unpadded).column is None
    tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    assert StoredTokens(tokenizer).column is not None
    assert StoredTokens(Counting(tokenizer_object=tokenizer.backend_tokenizer, pad_token="!")).column is None
