"""Triggers on the caption: a rare word that a model learns to take for something else."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import ClassVar

from ..kinds import check_encodable
from ..wording import shown
from .fields import TriggerFields, check_choice, check_int

WORD_PLACES = ("start", "end", "random")


@dataclass(frozen=True)
class WordTrigger(TriggerFields):
    """
    A rare word, or a few, put into a caption ([Kurita et al. 2020](https://arxiv.org/abs/2004.06660)).

    Calling it takes a caption and returns it with the word, set off by spaces. Nothing else in the caption changes.
    It is not a [`Trigger`]: that goes on images.

    Args:
        word (`str`, defaults to `"cf"`): one word, or several with single spaces between them.
        place (`str`, defaults to `"start"`): `start`, `end` (behind the last word and its punctuation), or `random`:
            before any word or at the end, drawn from `seed` and the caption, so one caption always gets one place.
        seed (`int`, defaults to 0): of the random place.

    Raises:
        `ValueError`: on a field out of range, and, when called, on what is not a string.

    Example:

    ```python
    >>> WordTrigger()("a dog on a beach.")
    'cf a dog on a beach.'
    ```
    """

    name: ClassVar[str] = "word"
    word: str = "cf"
    place: str = "start"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.word, str) or not self.word or self.word != " ".join(self.word.split()):
            raise ValueError(
                f"word={shown(self.word)}; accepted is a word, or several with single spaces between them"
            )
        check_encodable("word", self.word)
        check_choice("place", self.place, WORD_PLACES)
        check_int("seed", self.seed, minimum=0)

    def __call__(self, caption: str) -> str:
        if not isinstance(caption, str):
            raise ValueError(f"caption is a {type(caption).__name__}; accepted is a string")
        words = list(re.finditer(r"\S+", caption))
        if not words:
            return self.word
        before = self._place(caption, len(words))
        if before == len(words):
            end = words[-1].end()
            return f"{caption[:end]} {self.word}{caption[end:]}"
        start = words[before].start()
        return f"{caption[:start]}{self.word} {caption[start:]}"

    def _place(self, caption: str, words: int) -> int:
        """The number of the word to put the trigger before; `words` itself for the end."""
        if self.place == "random":
            digest = hashlib.sha256(json.dumps([self.seed, caption]).encode()).digest()
            return int.from_bytes(digest, "little") % (words + 1)
        return 0 if self.place == "start" else words
