"""One answer to what a caption and a flag is, whoever asks."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_robust_clip import PatchTrigger, PoisonSpec, RetrievalEvaluator, poison_dataset, poison_stream
from hf_robust_clip.columns import captions_of, check_captions, check_flag
from hf_robust_clip.data.rows import check_dataset, decode_row

IMAGE = Image.new("RGB", (4, 4))
SPEC = PoisonSpec(PatchTrigger(size=2), "dog", rate=1.0)


@pytest.mark.parametrize("value", ["a", ["a"], ("a",), np.array(["a"]), np.array("a"), np.str_("a")])
def test_captions_are_a_string_or_some(value: Any) -> None:
    assert check_captions(value, "row 0") == captions_of(value) == ["a"]


@pytest.mark.parametrize(
    ("value", "strings"), [(None, 0), (3, 0), ([], 0), (["a", None], 1), (b"a", 0), ({"a": "b"}, 0), (float("nan"), 0)]
)
def test_all_else_is_refused_by_all_in_the_same_words(value: Any, strings: int) -> None:
    assert len(captions_of(value)) == strings
    row = {"image": IMAGE, "caption": value}
    stream = datasets.IterableDataset.from_generator(lambda: iter([{**row, "id": 1}]))
    for refused in (
        lambda: decode_row({**row, "row_index": 0}, "image", "caption"),
        lambda: RetrievalEvaluator([row]),
        lambda: list(poison_stream(stream, SPEC, key_column="id")[0]),
    ):
        with pytest.raises(ValueError, match="column 'caption': a caption must be a string, or a non-empty list of"):
            refused()


@pytest.mark.parametrize("feature", [datasets.Value("int64"), datasets.List(datasets.Value("int64"))])
def test_columns_of_other_types_are_refused_by_all_in_the_same_words(feature: Any) -> None:
    values = [[1], [2]] if isinstance(feature, datasets.List) else [1, 2]
    features = datasets.Features({"image": datasets.Image(), "caption": feature})
    pairs = datasets.Dataset.from_dict({"image": [IMAGE] * 2, "caption": values}, features=features)
    for refused in (
        lambda: check_dataset(pairs, "image", "caption", "dataset"),
        lambda: poison_dataset(pairs, SPEC),
    ):
        with pytest.raises(
            ValueError, match="caption_column='caption' of dataset must hold strings or lists of strings"
        ):
            refused()


def test_flags_are_booleans_of_any_library() -> None:
    for flag in (True, np.True_, np.array(True), torch.tensor(True)):
        assert check_flag(flag, "row 0") is True
    for other in (1, "yes", None, np.array([True]), torch.tensor(1)):
        with pytest.raises(ValueError, match="row 0: it must be boolean"):
            check_flag(other, "row 0")
