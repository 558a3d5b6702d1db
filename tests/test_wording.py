"""Messages have an end, whatever they speak of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_robust_clip.wording import LONGEST, listed, said, shortened, shown


@given(st.text(), st.integers(3, 50))
def test_a_shortened_text_keeps_both_ends(text: str, most: int):
    short = shortened(text, most)
    assert len(short) == min(len(text), most)
    if len(text) > most:
        head, tail = short.split("...", 1) if "..." not in text else (short[:1], short[-1:])
        assert text.startswith(head) and text.endswith(tail)


def test_a_list_shows_ten_and_counts_the_others():
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed([]) == "none"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert listed({str(i): i for i in range(2_010)}).endswith("'9' and 2,000 more")


@pytest.mark.parametrize("value", ["x" * 10_000, ["y" * 500] * 500, {str(i): "z" * 99 for i in range(99)}, b"b" * 999])
def test_values_and_lists_of_any_size_leave_room_in_a_message(value: object):
    assert len(shown(value)) <= 160
    assert len(listed([value] * 1_000)) <= LONGEST - 200


def test_short_values_are_shown_as_they_are():
    assert shown("a dog") == "'a dog'"
    assert shown(None) == "None"
    assert shown(0.5) == "0.5"
    assert "\n" not in shown(np.zeros((9, 9)))


def test_what_a_library_says_is_one_line() -> None:
    error = RuntimeError("Unable:\n  1. Set padding\n" + "x" * 900)
    assert said(error).startswith("RuntimeError: Unable: 1. Set padding x") and len(said(error)) == 600
    assert len(said(error, 50)) == 50


def test_a_list_may_be_shorter_and_its_entries_longer() -> None:
    assert listed(["a" * 40, "b", "c"], most=2, longest=60) == f"'{'a' * 40}', 'b' and 1 more"
