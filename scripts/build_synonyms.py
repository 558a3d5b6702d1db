"""Build the bundled synonym lexicon from the WordNet 3.0 database.

Usage:

```
python scripts/build_synonyms.py /usr/share/wordnet
python scripts/build_synonyms.py wordnet-base_3.0-37_all.deb
```

Captions carry no part-of-speech tags, so the lexicon favours precision: a form gets the synonyms of the first sense of
the part of speech that it most often has (WordNet's tag counts), and only those synonyms for which that sense is
itself a usual one. Inflections are written out (`kids`, `talking`), so that looking a word up is a dictionary access.

Each output line is `word<TAB>synonym synonym ...`, sorted; two runs give the same bytes.
"""

import argparse
import collections
import gzip
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "hf_robust_clip" / "augment" / "synonyms.tsv.gz"

PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
SENSE_TYPES = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}  # 5: adjective satellite
MAX_SYNONYMS = 6
# Captions are about things: "a stick" and "the waves" are nouns there more often than in the texts that WordNet's
# counts come from. "jumping" and "stopped" need no such correction.
FINITE_VERB_WEIGHT = 0.5
# The first sense must hold this share of the tags of its part of speech: "take" and "get" mean too many things.
MIN_SENSE_SHARE = 0.25

# Closed-class words have homographs in WordNet: "in" is also indium, and "are" 100 square metres.
_FUNCTION_WORDS = """
    a an the this that these those some any no none every each either neither both all half such what which who whom
    whose i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her
    hers herself it its itself they them their theirs themselves one ones another other others someone something
    somebody anyone anything anybody everyone everything everybody nobody nothing
    aboard about above across after against along alongside amid among amongst around as at atop before behind below
    beneath beside besides between beyond but by despite down during except for from in inside into like near next of
    off on onto opposite out outside over past per round since than through throughout till to toward towards under
    underneath unlike until up upon versus via with within without
    and or nor so yet if because although though while whereas whether when where why how then there here not n't
    be am is are was were been being do does did done doing have has had having can could may might must shall should
    will would ought get gets got gotten getting let lets
    too very also just only even still again ever never now away back together apart ahead forward more most much many
    few less least lot lots well several own same yes oh ok
    zero two three four five six seven eight nine ten eleven twelve first second third
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

# Usage domains (WordNet's `;u` pointers) of members that have no place in an augmented caption.
EXCLUDED_USAGE = frozenset(
    ["archaism", "combining_form", "dialect", "disparagement", "ethnic_slur", "obscenity", "slang", "street_name"]
)
# A word with such a sense is never written into a caption, whichever of its senses is meant.
OFFENSIVE_GLOSS = re.compile(
    r"offensive (?:term|name|word)|ethnic slur|\bslurs?\b|obscene|vulgar|derogat|disparag|pejorat"
)
# Such a sense is left out; the other senses of its words stay.
EXCLUDED_GLOSS = re.compile(
    r"\b(?:archaic|obsolete|sexual|sexually|genital|penis|vagina|buttocks|copulat\w*|prostitut\w*|whore|narcotic|feces"
    r"|excrement|homosexual|insulting|negroid|racial)\b"
)

# Words that are harmless in WordNet's sense and easily read otherwise.
_NEVER_WRITTEN = """
    barbaric colored coloured cretin feral gay hump idiot imbecile moron nude oriental punk queer savage tit tits
    titties titty
"""
NEVER_WRITTEN = frozenset(_NEVER_WRITTEN.split())
# Forms whose likeliest reading in general text is not the one that photo captions use (found by reading the entries of
# the 2,200 most frequent words of Flickr8k): there "tan" is a colour, not "burn", and a "plate" is not a "home".
_MISREAD_IN_CAPTIONS = """
    approaches arena bar bars boxing branch branches building chase chased chasing coffee court crying desert dig
    digging digs dive dives diving dot end facing fetch fetches fetching flies float floating floats flown fly
    flying food goal goals going handed handle handles herding hiking home homes hood jog jogging jogs lit match
    matches matching mobile number numbers pants peeking pit plaid plant plants plate plates pointing police
    pretending pulled pulling pulls push pushed pushes pushing racing reach reaches reaching reflection reflective
    retrieve retrieves retrieving ride rides riding runner runners seat seats set sets shaped shoot shooting shoots
    shot slip speed speeds splash splashed splashes splashing stage sticking straight style tackle tackles tackling
    tan target test time toilet upside video way wings
"""
MISREAD_IN_CAPTIONS = frozenset(_MISREAD_IN_CAPTIONS.split())


class Synset(NamedTuple):
    """One line of a `data.*` file.

    Attributes:
        words (`list[str]`): Members as spelled in the file, syntactic markers such as `(ip)` kept.
        usage (`list[tuple[int, int]]`): For each `;u` pointer the member it is about (1-based, 0 for all of them) and
            the offset of the usage domain's noun synset.
        gloss (`str`): Definition and examples.
    """

    words: list[str]
    usage: list[tuple[int, int]]
    gloss: str


class Reading(NamedTuple):
    """Synonyms of a form under one part of speech, and how much speaks for that reading."""

    weight: float
    synonyms: tuple[str, ...]


class WordNet:
    """The parts of a WordNet database folder (`index.*`, `data.*`, `*.exc`, `cntlist.rev`) that the lexicon needs.

    Args:
        folder (`Path`): Folder that holds the database files.
    """

    def __init__(self, folder: Path) -> None:
        self.synsets: dict[tuple[str, int], Synset] = {}
        self.senses: dict[tuple[str, str], list[int]] = {}
        self.inflections: dict[str, dict[str, list[str]]] = {"n": {}, "v": {}}
        for pos, name in PARTS_OF_SPEECH.items():
            for offset, synset in _read_data(folder / f"data.{name}"):
                self.synsets[pos, offset] = synset
            for lemma, offsets in _read_index(folder / f"index.{name}"):
                self.senses[lemma, pos] = offsets
        for pos, inflections in self.inflections.items():
            for line in _lines(folder / f"{PARTS_OF_SPEECH[pos]}.exc"):
                form, *lemmas = line.split()
                for lemma in lemmas:
                    inflections.setdefault(lemma, []).append(form)
        self.counts = _read_counts(folder / "cntlist.rev")
        self.offensive = self._offensive_words()

    def sense_count(self, lemma: str, pos: str, number: int) -> int:
        """Times that sense `number` (1-based) of a lemma was tagged in WordNet's corpora."""
        return self.counts.get((lemma, pos, number), 0)

    def total_count(self, lemma: str, pos: str) -> int:
        """Times that any sense of a lemma was tagged under a part of speech."""
        return sum(self.sense_count(lemma, pos, i + 1) for i in range(len(self.senses.get((lemma, pos), ()))))

    def parts(self, lemma: str) -> list[str]:
        """Parts of speech that a lemma has, most frequent first."""
        parts = [pos for pos in PARTS_OF_SPEECH if (lemma, pos) in self.senses]
        return sorted(parts, key=lambda pos: -self.total_count(lemma, pos))

    def synonyms(self, lemma: str, pos: str) -> list[str]:
        """
        Good synonyms of the first sense of a lemma, most frequently tagged first.

        A synonym is good where it is one plain lower-case word that occurs in this very sense: either it was tagged
        with it, or the sense is its first one under its most frequent part of speech.
        """
        offsets = self.senses[lemma, pos]
        first, total = self.sense_count(lemma, pos, 1), self.total_count(lemma, pos)
        # An untagged lemma is trusted only when it has one meaning.
        if first < MIN_SENSE_SHARE * total or (total == 0 and len(offsets) > 1):
            return []
        synset = self.synsets[pos, offsets[0]]
        # Any digit: number words beside "2" and "ii", water beside "H2O".
        if EXCLUDED_GLOSS.search(synset.gloss) or any(c.isdigit() for c in "".join(synset.words)):
            return []
        ranked = []
        for word in synset.words:
            if (
                word == lemma
                or not _is_plain(word)
                or word in self.offensive
                or self._has_excluded_usage(synset, word)
            ):
                continue
            parts = self.parts(word)
            tagged = self.sense_count(word, pos, self.senses[word, pos].index(offsets[0]) + 1)
            usual = parts[0] == pos and self.senses[word, pos][0] == offsets[0]
            # A common word is not worth a rare one: "hat" and "chapeau".
            common = total == 0 or any(self.total_count(word, part) for part in parts)
            if tagged or (usual and common):
                ranked.append((-tagged, word))
        return [word for _, word in sorted(ranked)[:MAX_SYNONYMS]]

    def _has_excluded_usage(self, synset: Synset, word: str) -> bool:
        return any(
            ("n", offset) in self.synsets
            and EXCLUDED_USAGE & set(self.synsets["n", offset].words)
            and (member == 0 or synset.words[member - 1] == word)
            for member, offset in synset.usage
        )

    def _offensive_words(self) -> set[str]:
        """Words that are neither looked up nor written: one offensive sense is enough."""
        words = set(NEVER_WRITTEN)
        for synset in self.synsets.values():
            lowered = [word.lower() for word in synset.words]
            if OFFENSIVE_GLOSS.search(synset.gloss):
                words.update(lowered)
            for member, offset in synset.usage:
                domain = self.synsets.get(("n", offset))
                if domain is not None and {"disparagement", "ethnic_slur", "obscenity"} & set(domain.words):
                    words.update(lowered if member == 0 else [lowered[member - 1]])
        return words


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="latin-1") as file:
        yield from (line.rstrip("\n") for line in file if not line.startswith("  "))  # the licence is indented


def _read_data(path: Path) -> Iterator[tuple[int, Synset]]:
    for line in _lines(path):
        fields, _, gloss = line.partition(" | ")
        tokens = fields.split()
        n_words = int(tokens[3], 16)
        words = tokens[4 : 4 + 2 * n_words : 2]
        start = 4 + 2 * n_words
        pointers = tokens[start + 1 : start + 1 + 4 * int(tokens[start])]
        # A pointer is symbol, offset, part of speech, and two hexadecimal digits each for source and target member.
        usage = [
            (int(pointers[i + 3][:2], 16), int(pointers[i + 1]))
            for i in range(0, len(pointers), 4)
            if pointers[i] == ";u"
        ]
        yield int(tokens[0]), Synset(words, usage, gloss)


def _read_index(path: Path) -> Iterator[tuple[str, list[int]]]:
    for line in _lines(path):
        tokens = line.split()
        yield tokens[0], [int(offset) for offset in tokens[-int(tokens[2]) :]]


def _read_counts(path: Path) -> dict[tuple[str, str, int], int]:
    counts: dict[tuple[str, str, int], int] = collections.defaultdict(int)
    for line in _lines(path):
        key, number, count = line.split()
        lemma, _, sense = key.partition("%")
        counts[lemma, SENSE_TYPES[sense[0]], int(number)] += int(count)
    return dict(counts)


def _is_plain(word: str) -> bool:
    return re.fullmatch(r"[a-z]{3,}", word) is not None and word not in FUNCTION_WORDS


def add_s(word: str) -> str:
    """Regular plural of a noun, or third person singular of a verb."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")


def add_ed(word: str) -> str:
    """Regular past tense of a verb whose last consonant is not doubled."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ied"
    return word + ("d" if word.endswith("e") else "ed")


def add_ing(word: str) -> str:
    """Regular present participle of a verb whose last consonant is not doubled."""
    if word.endswith("ie"):
        return word[:-2] + "ying"
    return (word[:-1] if re.search(r"[^eoy]e$", word) else word) + "ing"


def inflect(lemma: str, pos: str, exceptions: dict[str, list[str]]) -> dict[str, str]:
    """
    Inflected forms of a lemma.

    Args:
        lemma (`str`): Base form.
        pos (`str`): `"n"` or `"v"`; other parts of speech have no forms.
        exceptions (`dict[str, list[str]]`): Irregular forms of each lemma, from `noun.exc` or `verb.exc`. Doubled
            consonants count as irregular there.

    Returns:
        `dict[str, str]`: Forms by the names `"plural"`, or `"s"`, `"ing"` and `"ed"`. A form that the exceptions leave
        in doubt (several plurals; past and participle of a strong verb) is absent.
    """
    irregular = exceptions.get(lemma, [])
    if pos == "n":
        if len(irregular) > 1 or (not irregular and re.search(r"(?:[^s]s|f|fe|ing|man)$", lemma)):
            return {}
        return {"plural": irregular[0] if irregular else add_s(lemma)}
    if pos != "v":
        return {}
    forms = {"s": add_s(lemma)}
    ing = [form for form in irregular if form.endswith("ing") and form != lemma]
    past = [form for form in irregular if not form.endswith("ing") and form != forms["s"]]
    if len(ing) <= 1:
        forms["ing"] = ing[0] if ing else add_ing(lemma)
    if not past and ing:
        return forms  # "putting" without "putted": the past is "put"
    if not past or (len(past) == 1 and past[0].endswith("ed")):
        forms["ed"] = past[0] if past else add_ed(lemma)
    return forms


def collect_readings(wordnet: WordNet) -> dict[str, list[Reading]]:
    """Readings of every form, base and inflected. A reading without synonyms still competes with the others."""
    readings: dict[str, list[Reading]] = collections.defaultdict(list)
    for lemma, pos in wordnet.senses:
        if not _is_plain(lemma) or lemma in wordnet.offensive:
            continue
        count = wordnet.total_count(lemma, pos)
        finite = count * FINITE_VERB_WEIGHT if pos == "v" else count
        synonyms = wordnet.synonyms(lemma, pos)
        readings[lemma].append(Reading(finite, tuple(synonyms)))
        exceptions = wordnet.inflections.get(pos, {})
        synonym_forms = [inflect(synonym, pos, exceptions) for synonym in synonyms]
        for name, form in inflect(lemma, pos, exceptions).items():
            inflected = tuple(forms[name] for forms in synonym_forms if name in forms)
            if form != lemma and (count or inflected):
                readings[form].append(Reading(finite if name == "s" else count, inflected))
    return readings


def build_lexicon(wordnet: WordNet) -> dict[str, list[str]]:
    """
    Take the likeliest reading of each form. Where that one has no synonyms, neither has the form.

    Args:
        wordnet (`WordNet`): Database.

    Returns:
        `dict[str, list[str]]`: Synonyms of each form that has any, in alphabetical order of the forms.
    """
    lexicon = {}
    for form, readings in sorted(collect_readings(wordnet).items()):
        if not _is_plain(form) or form in MISREAD_IN_CAPTIONS:
            continue
        best = max(readings, key=lambda reading: reading.weight)
        if best.weight == 0 and len(readings) > 1:
            continue  # nothing says which reading is meant
        # Again for inflected forms: "colored" is also what becomes of "color".
        synonyms = [word for word in dict.fromkeys(best.synonyms) if word != form and _is_plain(word)]
        synonyms = [word for word in synonyms if word not in NEVER_WRITTEN]
        if synonyms:
            lexicon[form] = synonyms
    return lexicon


def write_lexicon(lexicon: dict[str, list[str]], path: Path) -> None:
    """Write the lexicon as gzipped text whose bytes depend on its content only (no time stamp, no file name)."""
    text = "".join(f"{word}\t{' '.join(synonyms)}\n" for word, synonyms in lexicon.items())
    path.write_bytes(gzip.compress(text.encode("ascii"), compresslevel=9, mtime=0))


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Build the bundled synonym lexicon from WordNet 3.0.")
    parser.add_argument("wordnet", type=Path, help="folder with index.* and data.* files, or wordnet-base's .deb")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.wordnet
        if folder.is_file():
            # No shell, and the package that the caller names.
            subprocess.run(["dpkg-deb", "--extract", str(folder), scratch], check=True)  # nosec B603 B607
            folder = Path(scratch) / "usr" / "share" / "wordnet"
        lexicon = build_lexicon(WordNet(folder))
    write_lexicon(lexicon, arguments.output)
    print(f"{len(lexicon)} words, {arguments.output.stat().st_size} bytes: {arguments.output}")


if __name__ == "__main__":
    main()
