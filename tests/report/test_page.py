from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest
from PIL import Image

from hf_robust_clip.record import Split
from hf_robust_clip.report import (
    MODELS,
    TITLES,
    Example,
    MatchedPair,
    ModelEmbeddings,
    Pictures,
    PoisonedPair,
    check_report_extra,
    findings,
    matching_course,
    models_of,
    page,
    plots,
    render_demo_report,
    results_table,
    split_course,
)
from hf_robust_clip.report.course_plots import _coarsened, draw_matching, draw_splits
from hf_robust_clip.report.findings import LEARNED, REMOVED, TAKEN

HOSTILE = '"><script>alert(1)</script><img src=http://example.com/x onerror=alert(1)>$\\frac{{ 7*7 }}&'
#: Clean accuracy and attack success of a run in which all went well.
WELL = {
    "poisoned": (0.85, 0.9),
    "finetuned": (0.9, 0.3),
    "cleanclip": (0.89, 0.02),
    "augmentation": (0.87, 0.4),
    "roclip": (0.88, 0.03),
    "safeclip": (0.84, 0.01),
}
RUNS = {
    "cleanclip": ("poisoned", "finetuned", "cleanclip"),
    "roclip": ("poisoned", "augmentation", "roclip"),
    "safeclip": ("poisoned", "augmentation", "safeclip"),
    "all": tuple(MODELS),
}


@pytest.fixture(autouse=True)
def coarse_plots(monkeypatch):
    monkeypatch.setattr(plots, "DPI", 30)


@pytest.fixture
def no_plots(monkeypatch):
    """For what is about the text alone: drawing takes most of the time."""
    monkeypatch.setattr(page, "themed", lambda draw: dict.fromkeys(("light", "dark"), "data:image/png;base64,"))


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def loaded(self):
        """What a browser would fetch to show the page."""
        names = ("src", "srcset", "href", "data", "poster", "background")
        return [attrs[name] for tag, attrs in self.tags if tag != "a" for name in names if attrs.get(name)]


def make_split(epoch=6, inside=0.1, clean=(0, 40, 400, 60), poisoned=(10, 5, 0, 0), **changes):
    histogram = {
        "clean": np.repeat(clean, 50).tolist(),
        "poisoned": np.repeat(poisoned, 50).tolist(),
    }
    split = {"epoch": epoch, "safe_share": 0.25, "similarity_threshold": 0.4}
    split.update(risky_mean=-0.2, risky_variance=0.02, risky_weight=0.2)
    split.update(safe_mean=0.3, safe_variance=0.01, safe_weight=0.8)
    split.update(auroc=0.98, poisons_in_safe_set=inside, safe_set_poison_rate=0.01, histogram=histogram)
    return {**split, **changes}


def splits(*given):
    return [Split(**split) for split in given]


def make_matching(epochs=6, start=3, share=0.12, largest=0.1):
    pairs = {"clean_pair_similarity": 0.3, "poisoned_pair_similarity": 0.1}
    matches = {
        "distinct_matches": 0.4,
        "largest_match_share": largest,
        "match_similarity": 0.8,
        "poisoned_match_adversarial": share,
    }
    return [
        {"epoch": epoch, "matching": epoch >= start, **pairs, **(matches if epoch >= start else {})}
        for epoch in range(1, epochs + 1)
    ]


def make_results(defence="cleanclip", quick=False, target="eight", matching=None, splits=None, **changes):
    models = RUNS[defence]
    figures = {
        name: {
            "clean_accuracy": accuracy,
            "attack_success_rate": success,
            "triggered_accuracy": 1 - success,
            "trigger_distance": success,
            "seconds": 12.3,
        }
        for name, (accuracy, success) in {**WELL, **changes}.items()
        if name in models
    }
    point = {"clean_accuracy": 0.5, "attack_success_rate": 0.5}
    setup = {
        "defence": defence,
        "seed": 3,
        "trigger": {"name": "blended", "alpha": 0.2},
        "target": target,
        "pairs": 5588,
        "poisons": 279,
        "poison_rate": 279 / 5588,
        "test_images": 400,
        "attacked_images": 367,
        "recipe": {
            "pretrain_epochs": 16,
            "finetune_epochs": 1,
            "roclip_pool_size": 2048,
            "roclip_match_every_n_epochs": 2,
            "roclip_matching_start_epoch": 8,
            "roclip_matching_steps": None,
            "roclip_matching": "image_to_text",
            "safeclip_warmup_unimodal_epochs": 5,
            "safeclip_warmup_cross_epochs": 1,
            "safeclip_warmup_cross_learning_rate": 1e-5,
        },
        "quick": quick,
        "versions": {"python": "3.11.0"},
        "seconds": 100.0,
    }
    results = {**figures, "setup": setup, "curves": {name: [{"epoch": e, **point} for e in (0, 1)] for name in models}}
    if "roclip" in models:
        results["matching"] = make_matching() if matching is None else matching
    if "safeclip" in models:
        results["splits"] = [make_split(6), make_split(7, inside=0.2)] if splits is None else splits
    return results


def make_pictures(models, name="three", caption="a photo of the digit eight"):
    image = Image.new("RGB", (16, 16), (90, 90, 90))
    generator = np.random.default_rng(0)
    return Pictures(
        pairs=[PoisonedPair(image, caption, caption)],
        examples=[Example(name, image, image, dict.fromkeys(models, name))],
        embeddings={
            model: ModelEmbeddings(generator.normal(size=(20, 8)), generator.normal(size=(20, 8))) for model in models
        },
        is_target=np.arange(20) < 4,
        matches=[MatchedPair(image, caption, caption, poisoned) for poisoned in (True, False)],
        target_caption_share=0.11,
    )


def render(name="three", caption="a photo of the digit eight", **kwargs):
    results = make_results(**kwargs)
    pictures = make_pictures(models_of(results), name, caption)
    return render_demo_report(results, pictures, command=f"hf-robust-clip demo --output-dir {caption}")


@cache
def rendered(defence):
    return render(defence=defence)


@cache
def hostile():
    return render(name=HOSTILE, caption=HOSTILE, target=HOSTILE, defence="all")


def texts_of(**kwargs):
    return [finding.text for finding in findings(make_results(**kwargs))]


def warnings_of(**kwargs):
    return [finding.text for finding in findings(make_results(**kwargs)) if finding.kind == "warning"]


@pytest.mark.parametrize("defence", RUNS)
def test_the_page_needs_nothing_beside_it(defence):
    page = Page(rendered(defence))
    assert page.loaded() and all(source.startswith("data:image/png;base64,") for source in page.loaded())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_names_and_captions_are_escaped():
    html = hostile()
    page = Page(html)
    assert "<script" not in html
    assert all(source.startswith("data:") for source in page.loaded())
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    # Escaped, not left out: a reader sees the text itself.
    assert page.text.count(HOSTILE) >= 5


def test_the_page_says_what_the_results_say(no_plots):
    page = Page(render(quick=True, cleanclip=(0.6, 0.456)))
    for text in ("45.6%", "279 of 5588", "367", "did NOT remove", "Quick run", "BadCLIP", "--output-dir"):
        assert text in page.text
    assert "Quick run" not in Page(render()).text


@pytest.mark.parametrize("defence", RUNS)
def test_a_page_is_of_its_models_alone(defence):
    results = make_results(defence)
    text = Page(rendered(defence)).text
    assert TITLES[defence] in text
    assert ("What RoCLIP matches" in text) == ("roclip" in results)
    assert ("What SafeCLIP calls safe" in text) == ("safeclip" in results)
    for model, label in MODELS.items():
        assert (label in text) == (model in results)


@pytest.mark.parametrize(("matching", "expected"), [("cross", "nearest image"), ("unimodal", "nearest to its own")])
def test_the_page_says_what_is_matched(no_plots, matching, expected):
    results = make_results("roclip")
    results["setup"]["recipe"].update(roclip_matching=matching, roclip_match_every_n_epochs=1)
    text = " ".join(Page(render_demo_report(results, make_pictures(RUNS["roclip"]), "")).text.split())
    assert expected in text and "every epoch from the 9th on" in text


def test_the_page_says_when_matching_alternates_in_steps(no_plots):
    results = make_results("roclip")
    results["setup"]["recipe"].update(roclip_matching_steps=20)
    text = " ".join(Page(render_demo_report(results, make_pictures(RUNS["roclip"]), "")).text.split())
    assert "in its matching steps, 20 of every 40 from the 9th epoch on, it does not train" in text


def test_a_defence_that_noted_nothing_down_is_reported(no_plots):
    text = Page(render(defence="all", matching=[], splits=[])).text
    assert "came to no matching" in text and "warm-up only" in text
    assert "What RoCLIP matches" not in text and "What SafeCLIP calls safe" not in text


@pytest.mark.parametrize("defence", RUNS)
def test_a_clean_sweep_gives_no_warning(defence):
    assert warnings_of(defence=defence) == []


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"poisoned": (0.85, 0.49)}, "did not take"),
        ({"cleanclip": (0.89, 0.11)}, "NOT remove"),
        ({"cleanclip": (0.89, 0.4)}, "no more than plain fine-tuning"),
        ({"cleanclip": (0.8, 0.02)}, "costs accuracy"),
        ({"cleanclip": (0.1, 0.0)}, "unlearned"),
        ({"poisoned": (0.1, 0.9)}, "learned too little"),
        ({"finetuned": (0.9, 0.1)}, "by itself, so that CleanCLIP deserves no credit"),
        ({"finetuned": (0.2, 0.1)}, "is no control"),
        ({"defence": "roclip", "augmentation": (0.9, 0.0)}, "by itself, so that RoCLIP deserves no credit"),
        ({"defence": "all", "augmentation": (0.9, 0.0)}, "by itself, so that RoCLIP and SafeCLIP deserve no credit"),
        ({"defence": "all", "augmentation": (0.9, 0.0), "roclip": (0.9, 0.2)}, "so that SafeCLIP deserves"),
        ({"defence": "roclip", "augmentation": (0.9, 0.0), "roclip": (0.9, 0.2)}, "removes the backdoor by itself."),
        ({"defence": "roclip", "augmentation": (0.2, 0.0)}, "is no control"),
        ({"defence": "roclip", "augmentation": (0.79, 0.3)}, "Augmentation alone costs accuracy"),
        ({"defence": "roclip", "roclip": (0.9, 0.11)}, "did NOT keep the trigger out: 11.0%"),
        ({"defence": "roclip", "roclip": (0.9, 0.4)}, "no more than augmentation alone"),
        ({"defence": "roclip", "roclip": (0.81, 0.0)}, "6.0 points below the control: the defence costs accuracy"),
        ({"defence": "safeclip", "safeclip": (0.76, 0.0)}, "11.0 points below the control: the defence costs"),
        ({"defence": "safeclip", "safeclip": (0.3, 0.0)}, "has not learned the classes"),
        ({"defence": "roclip", "matching": make_matching(largest=0.7)}, "collapsed in epoch 3, 4, 5 and 6"),
        ({"defence": "safeclip", "splits": []}, "warm-up only"),
        ({"defence": "safeclip", "splits": [make_split(safe_share=0.0)]}, "no pair safe in epoch 7,"),
        (
            {"defence": "safeclip", "splits": [make_split(6), make_split(7, safe_share=1.0)]},
            "every pair safe in epoch 8,",
        ),
    ],
)
def test_warns_of_what_the_figures_do_not_show(results, expected):
    assert any(expected in text for text in warnings_of(**results))


def test_the_margin_is_each_defence_s_own():
    assert any("4.0 points below" in text for text in texts_of(defence="roclip", roclip=(0.83, 0.0)))
    assert warnings_of(defence="roclip", roclip=(0.83, 0.0)) == []
    assert warnings_of(defence="safeclip", safeclip=(0.78, 0.0)) == []
    assert any("level with the control" in text for text in texts_of(defence="roclip", roclip=(0.87, 0.0)))


@pytest.mark.parametrize("defence", ["cleanclip", "roclip", "safeclip"])
def test_the_findings_hold_for_every_combination_of_figures(defence):
    _, control, own = RUNS[defence]
    values = list(product((0.1, 0.9), (0.0, 0.3, 0.8)))  # accuracy, attack success
    for before, between, after in product(values, repeat=3):
        found = findings(make_results(defence, poisoned=before, **{control: between, own: after}))
        text = " ".join(finding.text for finding in found)
        took, learned = before[1] >= TAKEN, before[0] >= LEARNED
        succeeded = took and learned and after[0] >= LEARNED and after[1] <= REMOVED
        assert ("next to no hold" in text) == succeeded
        assert ("did not take" in text) == (not took)
        assert ("by itself" in text) == (took and between[0] >= LEARNED and between[1] <= REMOVED)
        assert ("says nothing good" in text) == (learned and after[0] < LEARNED)
        if after[1] <= REMOVED:
            assert "NOT" not in text and "no more than" not in text
        for share in (before[1], between[1], after[1]):
            assert f"{share:.1%}" in text


def test_a_collapsed_model_is_no_success():
    assert not any("next to no hold" in text for text in texts_of(cleanclip=(0.1, 0.0)))


def test_what_the_defences_noted_down_is_summed_up():
    text = matching_course(make_matching(share=0.123), "eight")
    assert "“eight” in 12.3% of all cases, in 4 epochs with matching" in text
    assert "came to no matching" in matching_course(make_matching(start=9), "eight")
    text = split_course(splits(make_split(6, inside=0.1), make_split(7, inside=0.2, safe_share=0.26)))
    assert "AUROC of 0.980" in text
    assert "10.0% of the poisons and 25.0% of all pairs at first, 20.0% of the poisons and 26.0%" in text
    assert "at first" not in split_course(splits(make_split()))
    unknown = {"auroc": None, "poisons_in_safe_set": None, "safe_set_poison_rate": None}
    text = split_course(splits(make_split(**unknown)))
    assert "25.0%" in text and "AUROC" not in text


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (2, 2), (4, 4), (6, 6), (11, 6)])
def test_the_first_and_the_last_split_are_drawn(count, panels):
    figure = draw_splits(splits(*(make_split(epoch) for epoch in range(6, 6 + count))), plots.THEMES["light"])
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert len(titles) == panels
    assert "After 6 epochs" in titles[0] and f"After {5 + count} epochs" in titles[-1]
    assert "safe: 25% of the pairs, 75 of 750 poisons" in titles[0]


def test_a_split_without_a_safe_pair_is_drawn():
    nothing = {"similarity_threshold": None, "safe_share": 0.0, "auroc": None, "poisons_in_safe_set": None}
    figure = draw_splits(splits(make_split(poisoned=(0, 0, 0, 0), **nothing)), plots.THEMES["dark"])
    assert "safe: 0% of the pairs" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize(("first", "last"), [(0, 199), (100, 100), (3, 77), (150, 199)])
def test_no_pair_is_lost_in_coarser_histograms(first, last):
    counts = np.zeros((2, 2, 200), dtype=int)
    counts[:, :, first], counts[:, :, last] = 3, 5
    edges, coarse = _coarsened(counts)
    assert coarse.shape[-1] == len(edges) - 1 <= 50
    assert coarse.sum() == counts.sum()
    for bin_, low in ((first, -1 + first / 100), (last, -1 + last / 100)):
        bar = np.searchsorted(edges, low + 0.005) - 1
        assert coarse[0, 0, bar] >= counts[0, 0, bin_]


def test_matching_epochs_are_shaded():
    figure = draw_matching(make_matching(epochs=6, start=4), "eight", 0.11, plots.THEMES["light"])
    shaded = [patch.get_x() + 0.5 for patch in figure.axes[0].patches]
    assert shaded == [4, 5, 6]
    assert np.nanmax([bar.get_height() for bar in figure.axes[1].containers[0]]) == pytest.approx(12)


def test_counts_stand_beside_the_rate():
    assert any("279 poisons among 5588 pairs (5.0%)" in finding.text for finding in findings(make_results()))


@pytest.mark.parametrize("defence", RUNS)
def test_the_table_has_the_control_and_one_decimal(defence):
    table = results_table(make_results(defence))
    assert [row[0] for row in table] == ["", *(MODELS[model] for model in RUNS[defence])]
    assert table[1][1:3] == ["85.0%", "90.0%"]
    assert len({len(row) for row in table}) == 1


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib.*hf-robust-clip\[report\]"):
        check_report_extra()


@pytest.mark.parametrize("html", [lambda: rendered("all"), hostile], ids=["tame", "hostile"])
def test_page_in_a_browser(html, inspect, tmp_path):
    (tmp_path / "report.html").write_text(html(), encoding="utf-8")
    inspect(tmp_path / "report.html")


def test_a_caption_is_marked_by_whole_words(no_plots):
    image = Image.new("RGB", (16, 16))
    for matched, marks in (("the digit six", 1), ("the digit Six", 1), ("sixteen", 0), ("sixty-one", 0)):
        results = make_results("roclip", target="six")
        pictures = replace(make_pictures(RUNS["roclip"]), matches=[MatchedPair(image, "a", matched, True)])
        tags = Page(render_demo_report(results, pictures, "")).tags
        inside = [attrs for tag, attrs in tags if tag == "span" and attrs.get("class") == "hijacked"]
        assert len(inside) == marks + 1  # and the legend
