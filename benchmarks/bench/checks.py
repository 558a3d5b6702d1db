"""What the three papers leave open, as small studies: variants of one setting, on one attack of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cell import Cell, with_learning_rate
from .study import ROWS, Study


@dataclass(frozen=True)
class Variant:
    """
    Args:
        label (`str`): In the table.
        cells (sequence of [`Cell`]): One for each seed.
        line (`str`): Variants of one line of the plot have this in common.
        x (`float`, *optional*): Place along it; `None`: a bar of its own.
    """

    label: str
    cells: Sequence[Cell]
    line: str
    x: float | None = None


@dataclass(frozen=True)
class Check:
    """
    Args:
        question (`str`): What it is to tell.
        variants (sequence of [`Variant`]): What is compared.
        axis (`str`): Of the plot: what `x` is.
        logarithmic (`bool`): Whether that axis is.
        course (`bool`): Whether the plot is of similarities over training instead.
    """

    question: str
    variants: Sequence[Variant]
    axis: str = ""
    logarithmic: bool = False
    course: bool = False


class Setting:
    """
    Makes the cells of the checks.

    Args:
        study ([`Study`]): The data and the recipes.
        attack (`str`): One of its attacks.
        seeds (sequence of `int`): Of each variant.
        chosen (mapping): The rows' learning rates.
        pairs (`int`): Training pairs of the study.
    """

    def __init__(
        self, study: Study, attack: str, seeds: Sequence[int], chosen: Mapping[str, float], pairs: int
    ) -> None:
        self.study, self.attack, self.seeds, self.chosen, self.pairs = study, attack, seeds, chosen, pairs

    def variant(
        self,
        row: str,
        label: str | None = None,
        line: str | None = None,
        x: float | None = None,
        rate: float | None = None,
        arguments: Mapping[str, Any] | None = None,
        scan_first: bool = False,
        **fields: Any,
    ) -> Variant:
        """
        A row with other `arguments`, another poison `rate` or other fields of [`Cell`]; `scan_first`: its pairs are
        scanned under the model that it starts from, and a tenth is dropped.
        """
        cells = [self._cell(row, seed, rate, arguments or {}, fields) for seed in self.seeds]
        if scan_first:
            cells = [replace(cell, scanned=cell.start) for cell in cells]
        title = ROWS[row].title
        return Variant(label or title, cells, line or title, x)

    def _cell(
        self, row: str, seed: int, rate: float | None, arguments: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> Cell:
        poisoning = dict(self.study.attacks[self.attack])
        if rate is not None:
            poisoning.pop("count", None)
            poisoning["rate"] = rate
        start = ROWS[row].start
        before = self._cell(start, seed, rate, {}, {}) if start else None
        learning_rate = self.chosen.get("plain" if row == "rebound" else row)
        cell = with_learning_rate(Cell(self.study, row, self.attack, poisoning, seed, start=before), learning_rate)
        return replace(cell, arguments={**cell.arguments, **arguments}, **fields)


def pool_size(setting: Setting) -> Check:
    sizes = [size for size in (100, 300, 1000, 3000, 10_000) if size < setting.pairs] + [min(10_000, setting.pairs)]
    return Check(
        "How large must RoCLIP's pool be?",
        [
            *(setting.variant("roclip", f"pool of {size}", x=size, arguments={"pool_size": size}) for size in sizes),
            setting.variant("augmentation"),
        ],
        axis="pairs in the pool",
        logarithmic=True,
    )


def augmentation(setting: Setting) -> Check:
    rows = ("roclip", "safeclip")
    return Check(
        "What do RoCLIP and SafeCLIP do without their augmentation, and it without them?",
        [
            setting.variant("undefended"),
            setting.variant("augmentation"),
            *(setting.variant(row, f"{ROWS[row].title}, augmented") for row in rows),
            *(setting.variant(row, f"{ROWS[row].title}, not augmented", augment=False) for row in rows),
        ],
    )


def matching(setting: Setting) -> Check:
    return Check(
        "Matching in every epoch, or in every fifth?",
        [
            setting.variant("augmentation", "never"),
            *(
                setting.variant(
                    "roclip",
                    f"one in {number}" if number > 1 else "all",
                    x=number,
                    arguments={"match_every_n_epochs": number},
                )
                for number in (1, 2, 5)
            ),
        ],
        axis="of so many stretches, one matches",
    )


def similarity(setting: Setting) -> Check:
    rows = ("undefended", "augmentation", "roclip", "safeclip")
    return Check(
        "How do the similarities of clean and of poisoned pairs part over training?",
        [setting.variant(row, follow=True) for row in rows],
        course=True,
    )


def adaptive(setting: Setting) -> Check:
    rates = (0.0025, 0.01, 0.03, 0.1)
    return Check(
        "How many poisons does an attacker need, so that poisons match each other?",
        [
            setting.variant(row, f"{ROWS[row].title}, {rate:.2%} poisons", x=round(rate * setting.pairs), rate=rate)
            for row in ("undefended", "augmentation", "roclip", "safeclip")
            for rate in rates
        ],
        axis="poisons",
        logarithmic=True,
    )


def safe_growth(setting: Setting) -> Check:
    return Check(
        "How fast may SafeCLIP's safe set grow?",
        [
            setting.variant("safeclip", f"{growth:.0%} an epoch", x=growth, arguments={"safe_growth": growth})
            for growth in (0.01, 0.05, 0.1, 0.2)
        ],
        axis="share of all pairs that the safe set grows by an epoch",
    )


def safe_threshold(setting: Setting) -> Check:
    return Check(
        "How sure must SafeCLIP's first split be?",
        [
            setting.variant("safeclip", f"probability {value:g}", x=value, arguments={"safe_threshold": value})
            for value in (0.5, 0.7, 0.9, 0.99)
        ],
        axis="probability from which on a pair is safe at first",
    )


def left_poisons(setting: Setting) -> Check:
    counts = (0, 5, 10, 20)
    return Check(
        "What do a few poisons left among the clean pairs do?",
        [
            setting.variant(row, f"{ROWS[row].title}, {count} left", x=count, left_poisons=count)
            for row in ("plain", "cleanclip", "par", "unbind")
            for count in counts
        ]
        + [
            setting.variant(
                row,
                f"scan first, then {ROWS[row].title}, {count} left",
                f"scan, then {ROWS[row].title}",
                count,
                left_poisons=count,
                scan_first=True,
            )
            for row in ("plain", "unbind")
            for count in counts
        ],
        axis="poisons left among the clean pairs",
    )


def families(setting: Setting) -> Check:
    row = "unbind_learned" if "unbind_learned" in setting.study.rows else "unbind"
    pools = {"additions": "patch=3,warp=3", "patches": "add=3,warp=3", "warps": "add=3,patch=3"}
    return Check(
        "Does Unbind need a family like the attacker's trigger?",
        [
            setting.variant("undefended"),
            setting.variant(row),
            *(
                setting.variant(row, f"without {family}", arguments={"families": pool})
                for family, pool in pools.items()
            ),
        ],
    )


def rebound(setting: Setting) -> Check:
    epochs = setting.study.row_arguments("plain").get("num_train_epochs", 3)
    return Check(
        "Does the backdoor come back under plain fine-tuning after CleanCLIP?",
        [
            setting.variant("undefended"),
            setting.variant("cleanclip"),
            *(
                setting.variant(
                    "rebound",
                    f"{times * epochs:g} plain epochs later, {count} poisons among the pairs",
                    arguments={"num_train_epochs": times * epochs},
                    left_poisons=count,
                )
                for times, count in ((1, 0), (3, 0), (1, 5))
            ),
        ],
    )


CHECKS: dict[str, Callable[[Setting], Check]] = {
    check.__name__: check
    for check in (
        *(pool_size, augmentation, matching, similarity, adaptive),
        *(safe_growth, safe_threshold, left_poisons, families, rebound),
    )
}
