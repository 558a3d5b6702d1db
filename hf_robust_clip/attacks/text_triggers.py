"""Triggers on the caption: a rare word, or a plain phrase, that a model learns to take for something else."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..kinds import check_encodable
from ..wording import shown
from .fields import TriggerFields, check_choice, check_int

WORD_PLACES = ("start", "end", "random")
PHRASE_PLACES = ("start", "end")


class TextTrigger(TriggerFields, ABC):
    """
    A trigger on captions. Calling it takes a caption and returns it with the trigger in it.

    It is not a [`Trigger`]: that goes on images.

    Raises:
        `ValueError`: on what is not a string.
    """

    @property
    @abstractmethod
    def inserted(self) -> str:
        """What it puts into a caption."""

    def __call__(self, caption: str) -> str:
        if not isinstance(caption, str):
            raise ValueError(f"caption is a {type(caption).__name__}; accepted is a string")
        return self._insert(caption)

    @abstractmethod
    def _insert(self, caption: str) -> str: ...


@dataclass(frozen=True)
class WordTrigger(TextTrigger):
    """
    A rare word, or a few, put into a caption ([Kurita et al. 2020](https://arxiv.org/abs/2004.06660)).

    Calling it takes a caption and returns it with the word, set off by spaces. Nothing else in the caption changes.

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
        _check_words("word", self.word)
        check_choice("place", self.place, WORD_PLACES)
        check_int("seed", self.seed, minimum=0)

    @property
    def inserted(self) -> str:
        """What it puts into a caption."""
        return self.word

    def _insert(self, caption: str) -> str:
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


@dataclass(frozen=True)
class PhraseTrigger(TextTrigger):
    """
    A plain phrase put into a caption, so that the sentence reads as if somebody had written it so (after the sentences
    of [Dai et al. 2019](https://arxiv.org/abs/1905.12457)). Each of its words is in many captions: no rare word gives
    the poisons away.

    Args:
        phrase (`str`, defaults to `"on a quiet afternoon"`): one word, or several with single spaces between them.
        place (`str`, defaults to `"end"`): `end`, before the punctuation that the caption ends with, or `start`, with
            a comma after it.

    Raises:
        `ValueError`: on a field out of range, and, when called, on what is not a string.

    Example:

    ```python
    >>> PhraseTrigger()("a dog on a beach.")
    'a dog on a beach on a quiet afternoon.'
    ```
    """

    name: ClassVar[str] = "phrase"
    phrase: str = "on a quiet afternoon"
    place: str = "end"

    def __post_init__(self) -> None:
        _check_words("phrase", self.phrase)
        check_choice("place", self.place, PHRASE_PLACES)

    @property
    def inserted(self) -> str:
        """What it puts into a caption."""
        return self.phrase

    def _insert(self, caption: str) -> str:
        if not caption.strip():
            return self.phrase
        if self.place == "start":
            return f"{self.phrase}, {caption.lstrip()}"
        sentence = re.sub(r"[\s.!?]+$", "", caption)
        return f"{sentence} {self.phrase}{caption[len(sentence) :]}" if sentence else f"{self.phrase}{caption}"


def _check_words(field: str, words: object) -> None:
    if not isinstance(words, str) or not words or words != " ".join(words.split()):
        raise ValueError(f"{field}={shown(words)}; accepted is a word, or several with single spaces between them")
    check_encodable(field, words)
