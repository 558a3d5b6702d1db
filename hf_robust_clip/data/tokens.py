"""Captions to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
