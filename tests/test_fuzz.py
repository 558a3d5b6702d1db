"""Readers refuse what nobody would write with a message, and triggers go on images of any size and mode."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_robust_clip import (
    BlendedStripesTrigger,
    BlendedTrianglesTrigger,
    BlendedTrigger,
    ColorCurveTrigger,
    PatchTrigger,
    RedTextTrigger,
    SinusoidTrigger,
    StripesPatchTrigger,
    WarpTrigger,
    replay_manifest,
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"


def quick(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = load(SCRIPT)


def spliced(*texts: str) -> st.SearchStrategy[bytes]:
    """A file with some of its bytes replaced, by any or by those that mean something in YAML."""
    pieces = st.binary(max_size=4) | st.sampled_from([b": ", b"- ", b"&a ", b"*a", b"{", b"[", b"!!", b"\n ", b"null"])
    places = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), pieces), max_size=4)

    def splice(text: str, edits: list[tuple[float, int, bytes]]) -> bytes:
        content = text.encode()
        for share, length, piece in edits:
            start = round(share * len(content))
            content = content[:start] + piece + content[start + length :]
        return content

    return st.builds(splice, st.sampled_from(texts), places)


@quick(25)
@given(st.binary(min_size=3, max_size=7))
def test_manifests_are_carried_out_or_refused(data: bytes) -> None:
    FUZZ.replay(data)


@quick(15)
@given(spliced(*FUZZ.SETTINGS))
def test_settings_are_taken_or_refused(data: bytes) -> None:
    FUZZ.settings(data)


@quick(80)
@given(spliced(FUZZ.STUDY))
def test_studies_are_taken_or_refused(data: bytes) -> None:
    FUZZ.study(data)


@pytest.mark.parametrize(
    "content",
    [
        "a: " + "[" * 3000,
        "a: " + "1" * 5000,
        "a: 2001-99-99",
        "a: &a [*a]",
        "a: &a [x]\nb: &b [*a, *a]\n" + "".join(f"c{i}: &c{i} [*b, *b]\n" for i in range(9)),
        "a: !!python/object/apply:os.system [id]",
        "a: \x00",
        "? {a: b}\n: c",
        "x" * 1_000_001,
        *(f"a: {value}" for value in FUZZ.MISFITS),
    ],
    ids=["deep", "digits", "date", "recursive", "laughs", "python", "nul", "key", "large", *FUZZ.MISFITS],
)
def test_hostile_settings_are_refused(content: str) -> None:
    FUZZ.settings(content.encode())
    FUZZ.study(content.encode())


def test_manifests_that_name_one_column_twice_are_refused() -> None:
    dataset, stream, manifests = FUZZ._manifests()
    for manifest in manifests:
        for rows in (dataset, stream, datasets.IterableDataset.from_generator(lambda: iter(dataset))):
            text = json.dumps(manifest).replace('"caption": "caption"', '"caption": "image"')
            with pytest.raises(ValueError):
                replay_manifest(rows, json.loads(text))


@quick(80)
@given(
    trigger=st.sampled_from(
        [
            *(PatchTrigger(size=3, place="random"), PatchTrigger(size=3, fresh=True), StripesPatchTrigger(size=3)),
            *(BlendedTrigger(pattern="triangles"), BlendedTrigger(fresh=True), BlendedStripesTrigger()),
            *(BlendedTrianglesTrigger(), RedTextTrigger(), ColorCurveTrigger(), SinusoidTrigger(), WarpTrigger()),
        ]
    ),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr"]),
)
def test_triggers_go_on_any_size_and_mode_or_refuse(trigger, size: tuple[int, int], mode: str) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if isinstance(trigger, PatchTrigger | StripesPatchTrigger) and min(size) < trigger.size:
        with pytest.raises(ValueError, match="does not fit"):
            trigger(image)
        return
    triggered = trigger(image)
    assert triggered.size == size and triggered.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(triggered), np.asarray(trigger(image)))
