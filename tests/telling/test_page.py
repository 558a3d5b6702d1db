import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.records import TRAINERS, ZERO_SHOT, attack, figures, make_record, split

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer
from hf_robust_clip.record import Measure, RunRecord, jsonable
from hf_robust_clip.telling import (
    AttackPictures,
    MatchedPair,
    RunPictures,
    TriggeredImage,
    page,
    render_card,
    render_run_report,
)
from hf_robust_clip.telling.facts import TRIGGERS, evaluations_of, facts_of
from hf_robust_clip.telling.sentences import statements
from hf_robust_clip.telling.tables import course_table, figure_groups, figure_text

#: What would run, load or break out of its place if it were not escaped.
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>alert(1)</script>",
    "{{7*7}}",
    "javascript:alert(1)",
    "</script></title></pre><svg onload=alert(1)>",
    "$\\frac{",
    "' onmouseover='alert(1)",
]


def make_pictures(name: str = "one", caption: str = "a one", success: str = "attack_success_rate") -> RunPictures:
    image, embeds = Image.new("RGB", (16, 16), (90, 90, 90)), np.random.default_rng(0).normal(size=(2, 20, 8))
    shown = [TriggeredImage(name, image, image, image, called_clean=name, called_triggered=name)]
    matches = [MatchedPair(image, caption, caption, poisoned) for poisoned in (True, False, None)]
    return RunPictures({success: AttackPictures(shown, 3.0, *embeds, np.arange(20) < 4)}, matches)


class Page(HTMLParser):
    """The tags of a page with their attributes, its headings' levels, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        self.text = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is about the text alone: drawing takes most of the time."""
    monkeypatch.setattr(page, "themed", lambda draw: dict.fromkeys(("light", "dark"), "data:image/png;base64,"))


def texts(record: RunRecord, kind: str | None = None) -> str:
    return " ".join(found.text for found in statements(facts_of(record)) if kind in (None, found.kind))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_page_is_whole_and_loads_nothing(trainer: str, no_plots: None) -> None:
    html = render_run_report(make_record(trainer), make_pictures())
    page = Page(html)
    assert "Not shown" not in page.text
    sources = [source["srcset"] for source in page.all("source")] + [image["src"] for image in page.all("img")]
    assert len(sources) > 4 and all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert "url(" not in html and "@import" not in html
    assert all(image.get("alt") for image in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    assert all(header.get("scope") for header in page.all("th"))
    assert all(box.get("aria-label") for box in page.all("div") if box.get("class") == "scroll")
    for heading, shown in (("What RoCLIP matched", "RoCLIPTrainer"), ("What SafeCLIP called safe", "SafeCLIPTrainer")):
        assert (heading in page.text) == (trainer == shown)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_record_alone_says_what_is_missing(trainer: str, no_plots: None) -> None:
    page = Page(render_run_report(make_record(trainer)))
    missing = 3 if trainer == "RoCLIPTrainer" else 2  # triggers, embeddings, and matches
    assert page.text.count("Not shown: this page was made from the record of the run alone.") == missing
    assert page.text.count("Not shown") == missing
    bare = make_record(trainer, before=None, after=None, after_step=None, course=[], log=[], measures=[], details={})
    page = Page(render_run_report(bare, RunPictures()))
    for reason in ("nothing was measured", "takes two evaluations", "nothing was logged", "an AttackSuccessEvaluator"):
        assert reason in page.text
    assert not page.all("img")


def test_results_are_in_the_page_and_load_as_a_record(no_plots: None, tmp_path: Path) -> None:
    record = make_record(settings={"output": HOSTILE, "rate": float("nan")})
    (link,) = (a for a in Page(render_run_report(record)).all("a") if a.get("download") == "results.json")
    kind, content = str(link["href"]).split(",")
    assert kind == "data:application/json;base64"
    (tmp_path / "robust_clip_run.json").write_bytes(base64.b64decode(content))
    assert RunRecord.load(tmp_path) == record


def hostile(value: Any, text: str) -> Any:
    """The same with that text in place of every text, but for what names figures and kinds."""
    if isinstance(value, dict):
        kept = ("measure", "figures", "method", "trainer")
        return {key: entry if key in kept else hostile(entry, text) for key, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry, text) for entry in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("trainer", ["CleanCLIPTrainer", "RoCLIPTrainer"])
def test_whatever_comes_from_data_is_escaped(trainer: str, text: str, no_plots: None) -> None:
    tame, record = make_record(trainer), RunRecord(**hostile(make_record(trainer).model_dump(), text))
    record.settings[text] = record.environment.versions[text] = record.model.name = text
    record.before = {**(record.before or {}), text: 0.5}
    html = render_run_report(record, make_pictures(text, text))
    page, calm = Page(html), Page(render_run_report(tame, make_pictures()))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in calm.tags}
    assert {name for _, attributes in page.tags for name in attributes} == {
        name for _, attributes in calm.tags for name in attributes
    }
    assert [tag for tag, _ in page.tags].count("style") == 1
    addresses = [attributes.get(name) for _, attributes in page.tags for name in ("href", "src", "srcset")]
    assert all(address.startswith("data:") for address in addresses if address is not None)
    # Escaped, not left out: a reader sees the text itself.
    assert page.words.count(text) > 12


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each entry of plain data as what holds it and its key there; of a list the first two."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_record_with_an_odd_entry_is_refused_or_makes_a_card_and_a_page(trainer: str, no_plots: None) -> None:
    odd = (None, True, -1, 2**63, 10**400, 0.5, 1e99, "", "\ud800", [], [None], ["a"], {}, {"name": "patch"})
    generator = np.random.default_rng(0)
    text = make_record(trainer, skipped={"count": 2, "rows": [1, 2], "streamed": False}).to_json()
    for _ in range(20):
        content = json.loads(text)
        there = places(content)
        holder, key = there[generator.integers(len(there))]
        if isinstance(holder, dict) and generator.random() < 0.2:
            del holder[key]
        else:
            holder[key] = odd[generator.integers(len(odd))]
        try:
            record = RunRecord.from_json(json.dumps(content))
        except ValueError:
            continue
        assert render_card(record) and render_run_report(record)


def test_trigger_of_any_name_can_be_drawn(coarse_plots: None) -> None:
    names = ("$\\frac{", "x" * 500, "触发")
    attacks = [attack(f"{number}_", trigger=name) for number, name in enumerate(names)]
    taken = {name: value for number in range(3) for name, value in figures(0.8, 0.9, f"{number}_").items()}
    record = make_record(measures=attacks, before=taken, after=taken, course=[], log=[])
    page = Page(render_run_report(record, make_pictures(success="0_attack_success_rate")))
    assert all(name in page.words for name in names)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"measures": [], "before": None, "after": None, "after_step": None, "course": []},
            "there were no evaluators",
        ),
        ({"before": None, "after": None, "after_step": None, "course": []}, "the evaluators were not run"),
        ({"after": None, "after_step": None}, "Measured only before"),
        ({"before": None, "course": []}, "Measured only after"),
        ({"steps": 0, "after": None, "after_step": None}, "Nothing was trained"),
        ({"planned_steps": 9}, "step 2 of 9"),
        ({"after_step": 1}, "Measured at step 1 of 2"),
        ({"measures": [ZERO_SHOT]}, "No attack was measured"),
        ({"before": figures(0.85, 0.49)}, "before CleanCLIP, it succeeded on 49.0% of 300 images"),
        (
            {"trainer": "RoCLIPTrainer", "before": figures(0.2, 0.1)},
            "taken without RoCLIP was not measured",
        ),
    ],
)
def test_what_proves_nothing_is_said_at_the_top(changes: dict[str, Any], expected: str, no_plots: None) -> None:
    record = make_record(**changes)
    (found,) = (said.text for said in statements(facts_of(record)) if said.kind == "gap" and expected in said.text)
    html = render_run_report(record)
    assert f'<p class="banner">{found}' in html and html.index(found) < html.index("<h2>")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_run_in_which_all_went_well_has_no_warning(trainer: str) -> None:
    assert not texts(make_record(trainer), "warning")
    # Of pre-training nobody knows how it would have gone without the defence.
    gaps = [said.head for said in statements(facts_of(make_record(trainer))) if said.kind == "gap"]
    assert len(gaps) == (trainer != "CleanCLIPTrainer")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"after": figures(0.84, 0.11)},
            "did NOT stop the attack (patch (size=3), target “two”): attack",
        ),
        (
            {"after": figures(0.7, 0.0)},
            "It costs accuracy: accuracy on clean images 85.0% (before",
        ),
        ({"after": figures(0.3, 0.0)}, "30.0% (after CleanCLIP), and 25.0% by guessing"),
        ({"log": [{"loss": None, "epoch": 1.0}, {"loss": 1.0, "epoch": 2.0}]}, "not finite in 1 of 2"),
        (
            {"trainer": "CLIPTrainer", "before": figures(0.2, 0.1), "after": figures(0.8, 0.9)},
            "planted the backdoor",
        ),
        (
            {"trainer": "RoCLIPTrainer", "before": figures(0.2, 0.1), "after": figures(0.8, 0.9)},
            "did NOT stop the attack",
        ),
        ({"trainer": "RoCLIPTrainer", "log": [{"loss": 1.0, "epoch": 1.0}]}, "never matched"),
        ({"trainer": "SafeCLIPTrainer", "details": {"splits": [split(safe_share=0.0)]}}, "called no pair safe"),
        ({"trainer": "SafeCLIPTrainer", "details": {"splits": []}}, "warm-up only"),
    ],
)
def test_warns_of_what_went_wrong(changes: dict[str, Any], expected: str) -> None:
    assert expected in texts(make_record(**changes), "warning")


def test_success_is_claimed_only_for_a_model_that_knows_the_classes() -> None:
    assert "no hold" in texts(make_record())
    for changes in ({"after": figures(0.3, 0.0)}, {"before": figures(0.85, 0.3)}, {"after": figures(0.84, 0.2)}):
        assert "no hold" not in texts(make_record(**changes))
    assert "no hold" not in texts(make_record("CLIPTrainer"))


def test_trainer_of_ones_own_goes_by_its_own_name() -> None:
    record = make_record("MyTrainer", after=figures(0.84, 0.5))
    assert "MyTrainer did NOT stop the attack" in texts(record)


def test_collapsed_matching_is_reported() -> None:
    log = [{"loss": 1.0, "epoch": 1.0, "match_similarity": 1.0, "largest_match_share": share} for share in (0.2, 0.9)]
    assert "collapsed in 1 of them" in texts(make_record("RoCLIPTrainer", log=log), "warning")


def test_table_has_every_figure_once_with_its_count() -> None:
    others = {"my_figure": 12.3456, "attack_success_rate": 0.02, "clean_accuracy": 0.84}
    record = make_record(after=others, measures=[ZERO_SHOT, attack(), {"measure": "mine", "figures": []}])
    groups = figure_groups(facts_of(record))
    rows = {row.name: tuple(row.cells) for group in groups for row in group.rows}
    assert len(rows) == sum(len(group.rows) for group in groups) == 6
    assert rows["attack success rate"][0] == ("90.0%", "270 of 300")
    assert rows["clean accuracy"][1] == ("84.0%", "336 of 400")
    assert rows["clean balanced accuracy"][0] == ("85.0%", None)
    assert rows["trigger distance"] == (("0.90", None), ("not measured", None))
    assert rows["my figure"] == (("not measured", None), ("12.35", None))
    assert (
        groups[1].title
        == "attack success: 300 images of other classes in digits, trigger patch (size=3), target “two”"
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("x_trigger_distance", 1.234, "1.23"),
        ("text_median_rank", 3.5, "3.5"),
        ("recall", 0.5, "50.0%"),
        ("x", None, "not measured"),
    ],
)
def test_figures_read_as_what_they_are(name: str, value: float | None, expected: str) -> None:
    assert figure_text(name, value, Measure(measure="retrieval", figures=[name])) == expected
    assert figure_text(name, 12.3456, None) == "12.35"


def test_course_takes_in_what_was_measured_before_and_after() -> None:
    middle = {"step": 1, "epoch": 0.5, **figures(0.5, 0.5)}
    record = make_record(course=[middle])
    assert [point.step for point in evaluations_of(record)] == [0, 1, 2]
    table = course_table(facts_of(record))
    assert len(table) == 4 and {len(row) for row in table} == {len(table[0])}
    assert [row[table[0].index("attack success rate")] for row in table[1:]] == ["90.0%", "50.0%", "2.0%"]
    assert evaluations_of(make_record(course=[], before=None))[0].step == 2
    assert course_table(facts_of(make_record(course=[], before=None, after=None))) == []


def test_what_was_measured_is_not_listed_as_unmeasured() -> None:
    def unmeasured(record: RunRecord) -> str:
        return "; ".join(facts_of(record).unmeasured)

    assert "patch" not in unmeasured(make_record()) and "warping" in unmeasured(make_record())
    every = [attack(trigger=name) for names in TRIGGERS.values() for name in names]
    kinds = ("targeted poisoning", "text queries", "retrieval", "linear probe")
    others = [{"measure": kind, "figures": [kind]} for kind in kinds]
    figures_of_all = {**figures(0.8, 0.9), **dict.fromkeys(kinds, 0.5)}
    measured = {"before": figures_of_all, "after": figures_of_all, "measures": [ZERO_SHOT, *every, *others]}
    left = facts_of(make_record(**measured)).unmeasured
    assert len(left) == 4 and "label-consistent" in left[0] and "CLIPTrainer" in left[2]
    assert "CLIPTrainer" not in unmeasured(make_record("CLIPTrainer"))
    # What an evaluator would have measured was not.
    assert "patch" in unmeasured(make_record(after=None, after_step=None))


def test_several_attacks_have_a_panel_each_and_their_own_pictures(coarse_plots: None) -> None:
    measures = [ZERO_SHOT, attack(), attack("b_", target="three", trigger="blended")]
    both = {**figures(0.8, 0.9), **figures(0.8, 0.7, "b_")}
    record = make_record(measures=measures, before=both, after=both, course=[])
    page = Page(render_run_report(record, make_pictures(success="b_attack_success_rate")))
    assert "2. blended (size=3), target “three”" in page.text and "1. patch" not in page.text


def test_pairs_of_unknown_kind_are_drawn_as_such(coarse_plots: None) -> None:
    unknown = {"auroc": None, "poisons_in_safe_set": None, "safe_set_poison_rate": None}
    histogram = {"clean": split()["histogram"]["clean"], "poisoned": [0] * 200}
    record = make_record("SafeCLIPTrainer", details={"splits": [split(**unknown, histogram=histogram)]})
    page = Page(render_run_report(record))
    assert "the few poisons" not in page.text
    assert not any("poisoned" in str(image["alt"]) for image in page.all("img"))


def test_caption_is_marked_by_whole_words(no_plots: None) -> None:
    image = Image.new("RGB", (16, 16))

    def marked(matched: str, poisoned: bool | None = True, **defence: Any) -> bool:
        record = make_record("RoCLIPTrainer", measures=[ZERO_SHOT, attack(target="six")])
        record.defence.update(defence)
        pictures = RunPictures(matches=[MatchedPair(image, "a", matched, poisoned)])
        return any(span.get("class") == "hijacked" for span in Page(render_run_report(record, pictures)).all("span"))

    assert marked("the number Six") and not marked("sixteen") and not marked("sixty-one")
    assert not marked("the number six", poisoned=False) and not marked("the number six", poisoned=None)
    assert marked("a dog", adversarial_phrase="dog") and not marked("a six", adversarial_phrase="dog")


# ---- From a trainer ----


@pytest.mark.parametrize("cls", [CLIPTrainer, CleanCLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer])
def test_saved_report_is_of_the_run(
    cls: type[CLIPTrainer], trained: Callable[..., CLIPTrainer], saved: Callable[..., Path]
) -> None:
    page = Page(saved(cls).read_text(encoding="utf-8"))
    assert "Not shown" not in page.text
    assert [path.name for path in saved(cls).parent.iterdir()] == ["report.html"]
    alts = [str(image["alt"]) for image in page.all("img")]
    assert sum("with the trigger" in alt for alt in alts) == 2 * 5 + 1  # and the scatter plot
    for kind in ("Poisoned", "Clean"):
        assert alts.count(f"{kind} training image") == (4 if cls is RoCLIPTrainer else 0)
    (link,) = (a for a in page.all("a") if a.get("download"))
    content = json.loads(base64.b64decode(str(link["href"]).split(",")[1]))
    assert content["after"] == jsonable(trained(cls).record().after)


def test_report_needs_no_evaluator_and_no_training(
    trained: Callable[..., CLIPTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(SafeCLIPTrainer)
    monkeypatch.setattr(trainer, "evaluators", [])
    trainer.save_report(str(tmp_path / "report.html"))
    assert "AttackSuccessEvaluator" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_controls_stand_beside_the_run(trained: Callable[..., CLIPTrainer], tmp_path: Path, no_plots: None) -> None:
    path = tmp_path / "report.html"
    trained(SafeCLIPTrainer).save_report(path, controls={"my control": make_record("CLIPTrainer")})
    page = Page(path.read_text(encoding="utf-8"))
    assert "after SafeCLIPmy control" in page.words.replace("\n", "") and "the control: what" not in page.text


def test_folder_in_the_report_s_place_is_named(trained: Callable[..., CLIPTrainer], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: .* is a folder; accepted"):
        trained(SafeCLIPTrainer).save_report(tmp_path)


def test_missing_extra_is_named(
    trained: Callable[..., CLIPTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"hf-robust-clip\[report\]"):
        trained(SafeCLIPTrainer).save_report(tmp_path / "report.html")


# ---- In a browser ----


@pytest.mark.parametrize("cls", [CLIPTrainer, CleanCLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer])
def test_page_in_a_browser(
    cls: type[CLIPTrainer], saved: Callable[..., Path], inspect: Callable[[Path], None]
) -> None:
    inspect(saved(cls))


def test_hostile_texts_do_nothing_in_a_browser(
    inspect: Callable[[Path], None], tmp_path: Path, coarse_plots: None
) -> None:
    text = "".join(HOSTILE)
    record = RunRecord(**hostile(make_record("RoCLIPTrainer").model_dump(), text))
    (tmp_path / "report.html").write_text(render_run_report(record, make_pictures(text, text)), encoding="utf-8")
    inspect(tmp_path / "report.html")
