from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hf_robust_clip import report
from hf_robust_clip.report import (
    MODELS,
    Example,
    ModelEmbeddings,
    PoisonedPair,
    check_report_extra,
    findings,
    render_demo_report,
    results_table,
)

HOSTILE = '"><script>alert(1)</script><img src=http://example.com/x onerror=alert(1)>$\\frac{{ 7*7 }}&'


@pytest.fixture(autouse=True)
def coarse_plots(monkeypatch):
    monkeypatch.setattr(report, "_DPI", 30)


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


def make_results(poisoned=(0.85, 0.9), finetuned=(0.9, 0.3), cleanclip=(0.89, 0.02), quick=False, target="eight"):
    figures = {
        name: {
            "clean_accuracy": accuracy,
            "attack_success_rate": success,
            "triggered_accuracy": 1 - success,
            "trigger_distance": success,
            "seconds": 12.3,
        }
        for name, (accuracy, success) in zip(MODELS, (poisoned, finetuned, cleanclip), strict=True)
    }
    point = {"clean_accuracy": 0.5, "attack_success_rate": 0.5}
    setup = {
        "seed": 3,
        "trigger": {"name": "blended", "alpha": 0.2},
        "target": target,
        "pairs": 5588,
        "poisons": 279,
        "poison_rate": 279 / 5588,
        "test_images": 400,
        "attacked_images": 367,
        "recipe": {"pretrain_epochs": 2, "finetune_epochs": 1},
        "quick": quick,
        "versions": {"python": "3.11.0"},
        "seconds": 100.0,
    }
    return {**figures, "setup": setup, "curves": {name: [{"epoch": e, **point} for e in (0, 1)] for name in MODELS}}


def render(name="three", caption="a photo of the digit eight", **kwargs):
    image = Image.new("RGB", (16, 16), (90, 90, 90))
    generator = np.random.default_rng(0)
    embeddings = {
        model: ModelEmbeddings(generator.normal(size=(20, 8)), generator.normal(size=(20, 8))) for model in MODELS
    }
    examples = [Example(name, image, image, dict.fromkeys(MODELS, name))]
    return render_demo_report(
        make_results(**kwargs),
        [PoisonedPair(image, caption, caption)],
        examples,
        embeddings,
        is_target=np.arange(20) < 4,
        command=f"hf-robust-clip demo --output-dir {caption}",
    )


def warnings_of(**kwargs):
    return [finding.text for finding in findings(make_results(**kwargs)) if finding.kind == "warning"]


def test_the_page_needs_nothing_beside_it():
    page = Page(render())
    assert page.loaded() and all(source.startswith("data:image/png;base64,") for source in page.loaded())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_names_and_captions_are_escaped():
    html = render(name=HOSTILE, caption=HOSTILE, target=HOSTILE)
    page = Page(html)
    assert "<script" not in html
    assert all(source.startswith("data:") for source in page.loaded())
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    # Escaped, not left out: a reader sees the text itself.
    assert page.text.count(HOSTILE) >= 5


def test_the_page_says_what_the_results_say():
    page = Page(render(quick=True, cleanclip=(0.6, 0.456)))
    for text in ("45.6%", "279 of 5588", "367", "did NOT remove", "Quick run", "BadCLIP", "--output-dir"):
        assert text in page.text
    assert "Quick run" not in Page(render()).text


def test_a_clean_sweep_gives_no_warning():
    assert warnings_of() == []


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"poisoned": (0.85, 0.49)}, "did not take"),
        ({"cleanclip": (0.89, 0.11)}, "NOT remove"),
        ({"cleanclip": (0.89, 0.4)}, "no more than plain fine-tuning"),
        ({"cleanclip": (0.8, 0.02)}, "costs accuracy"),
        ({"cleanclip": (0.1, 0.0)}, "unlearned"),
        ({"poisoned": (0.1, 0.9)}, "learned too little"),
    ],
)
def test_warns_of_what_the_figures_do_not_show(results, expected):
    assert any(expected in text for text in warnings_of(**results))


def test_a_collapsed_model_is_no_success():
    texts = [finding.text for finding in findings(make_results(cleanclip=(0.1, 0.0)))]
    assert not any("next to no hold" in text for text in texts)


def test_counts_stand_beside_the_rate():
    assert any("279 poisons among 5588 pairs (5.0%)" in finding.text for finding in findings(make_results()))


def test_the_table_has_the_control_and_one_decimal():
    table = results_table(make_results())
    assert [row[0] for row in table] == ["", *MODELS.values()]
    assert table[1][1:3] == ["85.0%", "90.0%"]
    assert len({len(row) for row in table}) == 1


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"jinja2 and matplotlib.*hf-robust-clip\[report\]"):
        check_report_extra()
