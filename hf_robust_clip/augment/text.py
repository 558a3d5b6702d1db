"""EDA on captions: nlpaug's word operations with a bundled lexicon of synonyms."""

import functools
import gzip
import numbers
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import islice
from typing import Any

from ..kinds import kind
from ..wording import listed, shown

# A word runs up to white space or punctuation and may hold single joining marks: "t-shirt", "dog's", "9:30". Naming
# what ends a word, not what it consists of, keeps combining marks (Hindi, Thai) and emoji in one piece.
_LETTER = r"[^\s!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~\u2010-\u2027\u2030-\u205e\u3000-\u3003\u3008-\u3011\u00ab\u00bb]"
_WORD = re.compile(rf"{_LETTER}+(?:['\u2019\-.&/:_@]{_LETTER}+)*")

#: How many words of a caption are changed: far more than a text tower reads.
_MOST_WORDS = 1000

Edit = Callable[[list[str], random.Random], list[list[str]]]


class TextAugmentation:
    """
    EDA, "easy data augmentation" ([Wei & Zou, 2019](https://huggingface.co/papers/1901.11196)), for captions.

    One operation is drawn for each caption and changes `max(1, int(rate * words))` words of it:

    - synonym replacement writes a synonym in place of a word,
    - synonym insertion writes a synonym of one of the words before some word,
    - swap exchanges words with others,
    - deletion removes words, never all of them.

    Of a caption of more than 1,000 words the first 1,000 count, and the others stay: text towers read no further, and
    100,000 words would take seconds at each visit. Where the drawn operation can do nothing (no word with a synonym, a
    single word), another one is drawn. Words that stay keep their case, and punctuation stays in its place. Synonyms
    are single words, written with the case of the word that they replace; function words and numbers have none.

    The result depends on the caption and the seed alone, not on the process, the worker or the order of calls.
    Python's and NumPy's global generators are neither read nor written. The lexicon and nlpaug (whose import takes
    seconds) load at the first call in each process; objects pickle without them. Calls from several threads need an
    object each.

    Args:
        synonym_replacement (`float`, *optional*, defaults to 0.1): Share of the words replaced, from 0 to 1. At 0 this
            operation is never drawn. The same holds for the other three.
        synonym_insertion (`float`, *optional*, defaults to 0.1): Number of synonyms inserted, as a share of the words.
        swap (`float`, *optional*, defaults to 0.1): Number of swaps, as a share of the words.
        deletion (`float`, *optional*, defaults to 0.1): Share of the words deleted. At least one word is left.
        lexicon (`Mapping[str, Sequence[str]]`, *optional*): Synonyms of each lower-case word. Defaults to the bundled
            one, [`load_lexicon`].

    Raises:
        `ValueError`: A rate is not in [0, 1], or the lexicon is not a mapping.

    Example:

    ```python
    >>> from hf_robust_clip import TextAugmentation

    >>> augmentation = TextAugmentation.from_preset("eda")
    >>> augmentation("A small dog jumps over the snow.", seed=2)
    'A little dog jumps over the snow.'
    ```
    """

    presets: Mapping[str, Mapping[str, Any]] = {
        "eda": {"synonym_replacement": 0.1, "synonym_insertion": 0.1, "swap": 0.1, "deletion": 0.1},
        "light": {"synonym_replacement": 0.0, "synonym_insertion": 0.0, "swap": 0.1, "deletion": 0.1},
    }

    def __init__(
        self,
        synonym_replacement: float = 0.1,
        synonym_insertion: float = 0.1,
        swap: float = 0.1,
        deletion: float = 0.1,
        lexicon: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.synonym_replacement = _check_rate("synonym_replacement", synonym_replacement)
        self.synonym_insertion = _check_rate("synonym_insertion", synonym_insertion)
        self.swap = _check_rate("swap", swap)
        self.deletion = _check_rate("deletion", deletion)
        if lexicon is not None and not isinstance(lexicon, Mapping):
            raise ValueError(f"lexicon must be None or a mapping of words to synonyms, but is {kind(lexicon)}")
        self.lexicon = lexicon
        self._edits: list[Edit] | None = None

    @classmethod
    def from_preset(cls, name: str) -> "TextAugmentation":
        """
        Augmentation by name.

        Args:
            name (`str`): `"eda"`, all four operations at 0.1, or `"light"`, swap and deletion only.

        Raises:
            `ValueError`: The name is unknown.
        """
        if not isinstance(name, str) or name not in cls.presets:
            accepted = listed(cls.presets)
            raise ValueError(f"Unknown text augmentation preset {shown(name)}; accepted: {accepted}.")
        return cls(**cls.presets[name])

    def __call__(self, caption: str, seed: int) -> str:
        """
        Augment one caption.

        Args:
            caption (`str`): Any text. Without a letter in it, it is returned as it is.
            seed (`int`): Seed of this draw.

        Returns:
            `str`: The augmented caption, stripped, or the caption itself where no operation applies.
        """
        if not isinstance(caption, str):
            raise ValueError(f"caption must be a string, but is {kind(caption)}")
        if not any(character.isalpha() for character in caption):
            return caption
        spans = [match.span() for match in islice(_WORD.finditer(caption), _MOST_WORDS)]
        words = [caption[start:end] for start, end in spans]
        # The caption takes part, so that one seed for many captions does not draw the same positions in all of them.
        # Lone surrogates cannot be encoded otherwise; Python's own hash differs between processes.
        checksum = zlib.crc32(caption.encode("utf-8", "surrogatepass"))
        rng = random.Random((int(seed) << 32) ^ checksum)  # nosec B311 # repeatable, and no secret
        if self._edits is None:
            rates = (self.synonym_replacement, self.synonym_insertion, self.swap, self.deletion)
            self._edits = _nlpaug_edits(load_lexicon() if self.lexicon is None else self.lexicon, rates)
        for edit in rng.sample(self._edits, len(self._edits)):
            slots = edit(words, rng)
            if any(slot != [word] for slot, word in zip(slots, words, strict=True)):
                return _write(caption, spans, slots) or caption
        return caption

    def __repr__(self) -> str:
        rates = ("synonym_replacement", "synonym_insertion", "swap", "deletion")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in rates)})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_edits": None}


@functools.cache
def load_lexicon() -> dict[str, list[str]]:
    """The bundled lexicon, an excerpt of WordNet 3.0 (see `WORDNET_LICENSE`), read once per process."""
    data = resources.files("hf_robust_clip.augment").joinpath("synonyms.tsv.gz").read_bytes()
    lines = (line.split("\t") for line in gzip.decompress(data).decode("ascii").splitlines())
    return {word: synonyms.split(" ") for word, synonyms in lines}


def _check_rate(name: str, rate: float) -> float:
    if not isinstance(rate, numbers.Real) or not 0 <= rate <= 1:  # false for NaN, too
        raise ValueError(f"`{name}` is {shown(rate)}; it must be a number from 0 to 1.")
    return float(rate)


def _write(caption: str, spans: list[tuple[int, int]], slots: list[list[str]]) -> str:
    """The caption with what stands in place of each word: one word, several, or none."""
    pieces = [caption[: spans[0][0]]]
    for i, slot in enumerate(slots):
        end = spans[i + 1][0] if i + 1 < len(spans) else len(caption)
        separator = caption[spans[i][1] : end]
        if slot:
            pieces += [" ".join(slot), separator]
        else:
            pieces[-1] = _merge(pieces[-1], separator)
    return "".join(pieces).strip()


def _merge(before: str, after: str) -> str:
    """Separator that is left where a deleted word stood between two: "dog , running ." gives "dog ."."""
    if not after.strip():
        return before
    return after if not before.strip(" ,;:") else before.rstrip() + after


def _nlpaug_edits(lexicon: Mapping[str, Sequence[str]], rates: Sequence[float]) -> list[Edit]:
    """The operations with a rate above 0. Each takes words and a generator, and returns what replaces each word."""
    # Imported here, since nlpaug imports torch and transformers.
    from nlpaug.augmenter.word import RandomWordAug
    from nlpaug.util import Action

    class Eda(RandomWordAug):
        """
        nlpaug's operations with EDA's number of changes, and a generator of their own in place of Python's global one.

        Swap and deletion run on the positions "0", "1", ... in place of the words: of words, nlpaug would rewrite the
        case of the first and lose the spacing. Of a first and a second word deleted together, it restores the second.
        """

        rng: random.Random

        def __init__(self, action: str, rate: float) -> None:
            super().__init__(action=action, aug_p=rate, aug_max=None, tokenizer=str.split, reverse_tokenizer=list)

        def __call__(self, words: list[str], rng: random.Random) -> list[list[str]]:
            self.rng = rng
            if self.action in (Action.SUBSTITUTE, Action.INSERT):
                return [slot.split(" ") for slot in getattr(self, self.action)(words)] if words else []
            if len(words) < 2:
                return [[word] for word in words]
            positions = [int(token) for token in getattr(self, self.action)(" ".join(map(str, range(len(words)))))]
            if self.action == Action.SWAP:
                return [[words[i]] for i in positions]
            kept = set(positions)
            return [[word] if i in kept else [] for i, word in enumerate(words)]

        def substitute(self, words: list[str]) -> list[str]:
            slots = list(words)
            for i in self._get_aug_idxes(words):
                synonym = self.rng.choice(lexicon[words[i].lower()])
                upper = len(words[i]) > 1 and words[i].isupper()
                slots[i] = synonym.upper() if upper else self.align_capitalization(words[i], synonym)
            return slots

        def insert(self, words: list[str]) -> list[str]:
            slots = list(words)
            for i in self._get_aug_idxes(words):
                # As in EDA, any place but the end. Written with the word that it precedes, so that positions stay.
                place = self.rng.randrange(len(words))
                slots[place] = f"{self.rng.choice(lexicon[words[i].lower()])} {slots[place]}"
            return slots

        def skip_aug(self, token_idxes: list[int], tokens: list[str]) -> list[int]:
            return [i for i in token_idxes if lexicon.get(tokens[i].lower())]

        def sample(self, x: list[Any], num: int) -> list[Any]:
            return self.rng.sample(x, num)

        def generate_aug_cnt(self, size: int, aug_p: float | None = None) -> int:
            # nlpaug rounds up, EDA down; and one word must survive deletion.
            count = max(1, int(self.aug_p * size))
            return min(count, size - 1) if self.action == Action.DELETE else count

        def _get_swap_position(self, pos: int, token_length: int) -> int:
            # EDA swaps any two words, nlpaug neighbours.
            other: int = self.rng.randrange(token_length)
            return other + (other >= pos)

    actions = (Action.SUBSTITUTE, Action.INSERT, Action.SWAP, Action.DELETE)
    return [Eda(action, rate) for action, rate in zip(actions, rates, strict=True) if rate > 0]
