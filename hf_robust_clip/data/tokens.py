"""Captions to padded token ids, and ids that were stored with a dataset: only for the tokenizer that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

#: What the names of columns with stored tokens start with; the rest is a digest of what made them.
TOKENS_PREFIX = "input_ids_"

#: Bytes of a caption's digest, in front of its ids.
_DIGEST = 8
_ID = np.dtype("<i4")
#: Texts that a tokenizer is tried on: cases, accents, scripts, spaces, and more words than any model takes.
_PROBES = ("", "a photo of a dog.", "A  Photo of «ÉCOLE», 日本 🙂 don't 12,345\n", "many different words " * 300)


def tokenise(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """
    What a tokenizer makes of texts, in which the names of its special tokens are text like any other.

    Left to itself a tokenizer takes them for the tokens, and CLIP looks no further than the first end: of the caption
    "a cat<|endoftext|> on a red sofa" it would learn "a cat", and whoever reads or filters captions sees another.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        texts (sequence of `str`): N texts.
        **options: Of its call.
    """
    return tokenizer(list(texts), split_special_tokens=True, **options)


class StoredTokens:
    """
    Token ids that stand in a column of a dataset, beside the captions that they are of.

    A value holds one entry of bytes for each caption of its row: a digest of the caption, and its ids, special tokens
    included, as little-endian int32. So ids are found only for a caption that is still the one that they were made
    from, whatever has been done to the dataset since; and as the column's name has a digest of the tokenizer and of
    `max_length`, others do not find them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The digest is of its vocabulary and rules, its class, and what it makes of a few texts.
        max_length (`int`, *optional*):
            Longest caption in tokens. `None`: the tokenizer's `model_max_length`.

    Attributes:
        column (`str` or `None`): `"input_ids_"` and 16 hexadecimal digits; `None` for a tokenizer whose batches are
            not made again from ids alone: one that is not of the library `tokenizers`, has no padding token, or
            returns more than ids, a mask of the padding, and one type of token.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._names: list[str] = []
        self.column = self._name()

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The entries of these captions."""
        return [
            _digest(text) + np.array(ids, _ID).tobytes() for text, ids in zip(texts, self._ids(texts), strict=True)
        ]

    def __call__(
        self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]], padding: bool | str
    ) -> dict[str, torch.Tensor] | None:
        """
        Tokenise texts as `tokenise(tokenizer, texts, padding=..., truncation=True, max_length=...,
        return_tensors="pt")` does, those whose ids are stored without tokenising them.

        Args:
            texts (sequence of `str`): N texts.
            rows (sequence of mappings): The row of each, N.
            padding (`bool` or `str`): `True` or `"longest"`, or `"max_length"`.

        Returns:
            `dict[str, torch.Tensor]`: int64, `(N, L)` each; `None` where nothing is stored of these texts, or the
            padding is another.
        """
        if self.column is None or (width := self._width(padding)) is None:
            return None
        found: list[Sequence[int] | np.ndarray | None] = [
            _find(text, row.get(self.column)) for text, row in zip(texts, rows, strict=True)
        ]
        missing = [place for place, ids in enumerate(found) if ids is None]
        if len(missing) == len(texts):
            return None
        if missing:
            for place, ids in zip(missing, self._ids([texts[place] for place in missing]), strict=True):
                found[place] = ids
        return self._padded([ids for ids in found if ids is not None], width)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenise(self.tokenizer, texts, truncation=True, max_length=self.max_length)[
            "input_ids"
        ]
        return ids

    def _padded(self, rows: Sequence[Sequence[int] | np.ndarray], least_width: int) -> dict[str, torch.Tensor]:
        width = max(least_width, *map(len, rows))
        kinds = {
            "input_ids": np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64),
            "attention_mask": np.zeros((len(rows), width), dtype=np.int64),
            "token_type_ids": np.full((len(rows), width), self.tokenizer.pad_token_type_id, dtype=np.int64),
        }
        left = self.tokenizer.padding_side == "left"
        for number, ids in enumerate(rows):
            place = slice(width - len(ids), width) if left else slice(len(ids))
            for name, values in (("input_ids", ids), ("attention_mask", 1), ("token_type_ids", 0)):
                kinds[name][number, place] = values
        return {name: torch.from_numpy(kinds[name]) for name in self._names}

    def _width(self, padding: bool | str) -> int | None:
        """Columns that a batch has at least; `None` for a padding that is left to the tokenizer."""
        if padding is True or padding == "longest":
            return 0
        longest = self.max_length or self.tokenizer.model_max_length
        # Above, a tokenizer has no length of its own.
        return int(longest) if padding == "max_length" and longest < 1_000_000 else None

    def _name(self) -> str | None:
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
            return None
        probes = [*_PROBES, " ".join(tokenizer.all_special_tokens)]
        ids = self._ids(probes)
        options = {"truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        self._names = list(tokenise(tokenizer, probes, padding=True, **options))
        if not {"input_ids"} <= set(self._names) <= {"input_ids", "attention_mask", "token_type_ids"}:
            return None
        # Tried, not read off its settings: masks, types and sides of padding are each family's own.
        for padding in (True, "max_length"):
            if (width := self._width(padding)) is not None:
                expected = tokenise(tokenizer, probes, padding=padding, **options)
                made = self._padded(ids, width)
                if not all(torch.equal(expected[name], made[name]) for name in self._names):
                    return None
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call left behind.
        rules.pop("truncation", None)
        rules.pop("padding", None)
        longest = int(self.max_length or tokenizer.model_max_length)
        content = json.dumps([rules, type(tokenizer).__name__, longest, ids], sort_keys=True)
        return TOKENS_PREFIX + hashlib.sha256(content.encode()).hexdigest()[:16]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST).digest()


def _find(text: str, entries: Any) -> np.ndarray | None:
    """The ids of a text among the entries of its row, if there are any."""
    if not entries:
        return None
    digest = _digest(text)
    entry = next((entry for entry in entries if entry[:_DIGEST] == digest), None)
    return None if entry is None else np.frombuffer(entry, _ID, offset=_DIGEST)
