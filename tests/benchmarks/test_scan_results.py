"""What the package says of its scans' false alarms is what the committed results hold."""

from __future__ import annotations

import json

import scan_checkpoint
import scan_pairs
from bench.grid import Results

from hf_robust_clip.telling.checkpoint_page import FALSE_ALARMS

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def test_the_false_alarms_that_are_told_are_those_that_were_counted() -> None:
    clean = [
        one
        for one in Results(scan_checkpoint.RESULTS).cells.values()
        if one["attack"] == scan_pairs.CLEAN and one["study"] == "digits" and not one["tuned"]
    ]
    alarms = sum(bool(one["stands_out"]) for one in clean)
    highest = sorted((one["score"] for one in clean), reverse=True)[:3]
    assert FALSE_ALARMS[0].startswith(
        f"Of {NUMBERS[len(clean)]} models of digits that were never poisoned, {NUMBERS[alarms]} reached the "
        f"threshold: their highest scores were {highest[0]:.2f}, {highest[1]:.2f} and {highest[2]:.2f}."
    )


def test_the_table_of_scans_is_that_of_the_results() -> None:
    found = json.loads(scan_pairs.RESULTS.read_text())["results"]
    page = scan_pairs.PAGE.read_text()
    assert len(found) > 6 and scan_pairs.table(found) in page.split(scan_pairs.MARKS[0])[1]


def test_the_table_of_scans_of_checkpoints_is_that_of_the_results() -> None:
    results = Results(scan_checkpoint.RESULTS)
    page = scan_checkpoint.PAGE.read_text()
    assert len(results.cells) > 6 and scan_checkpoint.tables(results) in page.split(scan_checkpoint.MARKS[0])[1]
