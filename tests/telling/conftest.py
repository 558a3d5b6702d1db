"""Runs with reports, and a real browser to look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import CHROMIUM, CONTRASTS, FOCUS_OUTLINE, Browser
from support.training import digits, make_trainer, poisoned_pairs

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CLIPTrainer,
    PatchTrigger,
    ZeroShotEvaluator,
)
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.telling import plots


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium or chromium-browser on the PATH")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def inspect(browser: Browser) -> Callable[[Path], None]:
    """`inspect(path)`: look at a page at two widths in two colour schemes, and fail on what is wrong."""

    def look(path: Path) -> None:
        grounds = set()
        for width in (375, 1200):
            for scheme in ("light", "dark"):
                browser.show(path, width, scheme)
                noise = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
                assert browser.happened(*noise, "Page.javascriptDialogOpening") == []
                fetched = {event["request"]["url"] for event in browser.happened("Network.requestWillBeSent")}
                assert {url for url in fetched if not url.startswith("data:image/")} == {path.as_uri()}
                unseen = "[...document.images].filter((i) => !(i.complete && i.naturalWidth && i.offsetWidth)).length"
                assert browser.evaluate("document.images.length") > 0 and browser.evaluate(unseen) == 0
                # Not the window's own width: a phone's grows with what overflows it.
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                texts = browser.evaluate(CONTRASTS)
                assert len(texts) > 50 and [text for contrast, text in texts if contrast < 4.5] == []
                plots = browser.evaluate("[...document.querySelectorAll('.plot')].map((image) => image.currentSrc)")
                ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                grounds.add((scheme, ground, *plots))
            browser.send("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
            assert browser.evaluate("document.activeElement.tagName") != "BODY"
            assert browser.evaluate(FOCUS_OUTLINE) != "none"
        # Each scheme has a ground and plots of its own.
        (_, *light), (_, *dark) = sorted(grounds, reverse=True)
        assert len(light) > 2 and not set(light) & set(dark)
        assert browser.evaluate("document.scripts.length") == 0

    return look


@pytest.fixture
def coarse_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of few pixels, which are drawn faster."""
    monkeypatch.setattr(plots, "DPI", 30)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[CLIPTrainer]], CLIPTrainer]:
    """`trained(cls)`: a trainer after three short epochs on digits some of which are marked as poisoned."""
    made: dict[type[CLIPTrainer], CLIPTrainer] = {}

    def get(cls: type[CLIPTrainer]) -> CLIPTrainer:
        if cls not in made:
            made[cls] = make_trainer(
                cls,
                tmp_path_factory.mktemp(cls.__name__),
                train_dataset=poisoned_pairs(64),
                evaluators=_evaluators(),
                eval_strategy="epoch",
                eval_on_start=True,
                per_device_eval_batch_size=64,
            )
            made[cls].train()
        return made[cls]

    return get


@pytest.fixture(scope="session")
def saved(
    trained: Callable[[type[CLIPTrainer]], CLIPTrainer], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[type[CLIPTrainer]], Path]:
    """`saved(cls)`: the report that such a trainer saved."""
    folder = tmp_path_factory.mktemp("reports")

    def get(cls: type[CLIPTrainer]) -> Path:
        path = folder / cls.__name__ / "report.html"
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plots, "DPI", 30)
                trained(cls).save_report(path)
        return path

    return get


def _evaluators() -> list[Any]:
    test = digits("test").select(range(40))
    return [
        ZeroShotEvaluator(test, CLASS_NAMES),
        AttackSuccessEvaluator(test, BlendedTrigger(), "six", CLASS_NAMES),
        AttackSuccessEvaluator(test, PatchTrigger(size=3), "eight", CLASS_NAMES, prefix="patch_"),
    ]
