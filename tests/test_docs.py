"""The documentation builds, loads nothing from elsewhere and leads somewhere; its code and its commands work."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import pytest
from bench.marked import table_marks
from pages import PAGES as TABLES
from support.families import processor_for, siglip
from support.stand_in import HubStandIn, run_script
from transformers import CLIPModel, CLIPProcessor

import hf_robust_clip
from hf_robust_clip import CLIPTrainingArguments
from hf_robust_clip.cli.main import build_parser, main
from hf_robust_clip.data.digits import CLASS_NAMES, load_digit_pairs

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
#: Commands of `hf-robust-clip` that resolve their arguments with --dry-run.
DRY = ("train", "poison", "prepare", "evaluate")
#: What the pages do to a checkpoint and a large dataset, as tests do it to a few digits.
SMALL = {
    "CLIPModel(CLIPConfig())": 'CLIPModel.from_pretrained("openai/clip-vit-base-patch32")',
    "TrainingArguments(": "SmallArguments(",
    "scan_checkpoint(": "brief_scan(",
    "YOUR_NAME/": "tester/",
    "rate=0.003": "rate=0.1",
    '"plainly-finetuned"': '"cleaned-clip"',
}
#: Before the code of a page.
SETTING = """
import functools

import hf_robust_clip
from datasets import load_dataset

labeled = load_dataset("you/labeled-images", split="test")
captioned = load_dataset("you/clean-pairs", split="train").select(range(20))
labeled_train = load_dataset("you/clean-pairs", split="train")


def small(arguments, epochs):
    # The same arguments, of a training that takes seconds on a CPU.
    def build(folder, **given):
        given.pop("bf16", None)
        given |= {"per_device_train_batch_size": 16, "num_train_epochs": epochs, "use_cpu": True, "disable_tqdm": True}
        return arguments(folder, report_to="none", **given)

    return build


brief_scan = functools.partial(hf_robust_clip.scan_checkpoint, steps=3)
CLIPSmallArguments = small(hf_robust_clip.CLIPTrainingArguments, 2)
CleanCLIPSmallArguments = small(hf_robust_clip.CleanCLIPTrainingArguments, 2)
PARSmallArguments = small(hf_robust_clip.PARTrainingArguments, 2)
UnbindSmallArguments = small(hf_robust_clip.UnbindTrainingArguments, 2)
RoCLIPSmallArguments = small(hf_robust_clip.RoCLIPTrainingArguments, 4)
SafeCLIPSmallArguments = small(hf_robust_clip.SafeCLIPTrainingArguments, 8)
"""


def blocks(page: str, language: str) -> list[tuple[str | None, str]]:
    """The code of a page in one language, each with the reason for which it is not run, if any."""
    found = [match for match in FENCE.finditer(PAGES[page]) if match["language"] == language]
    return [(match["reason"], match["code"]) for match in found]


def script_of(page: str) -> str:
    """The Python of a page as one script, for small data and a small model."""
    code = "\n".join(block for reason, block in blocks(page, "python") if reason is None)
    for large, small in SMALL.items():
        code = code.replace(large, small)
    return SETTING + code


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[int], CLIPModel], processor: CLIPProcessor
) -> Path:
    """What the pages name on the Hub, as folders, which load_dataset and from_pretrained take for it."""
    folder = tmp_path_factory.mktemp("docs")
    names = ["banana" if name == "eight" else name for name in CLASS_NAMES]

    def fruity(split: str, rows: int) -> datasets.Dataset:
        digits = load_digit_pairs(split, renderings=1) if split == "train" else load_digit_pairs(split)
        digits = digits.select(range(rows)).cast_column("label", datasets.ClassLabel(names=names))
        return digits.map(lambda row: {"caption": row["caption"].replace("eight", "banana")})

    for name, split, rows in (
        ("clean-pairs", "train", 64),
        ("pairs-from-the-web", "train", 64),
        ("pairs", "train", 64),
        ("labeled-images", "test", 30),
    ):
        path = folder / "you" / name / f"{split}.parquet"
        path.parent.mkdir(parents=True)
        fruity(split, rows).to_parquet(path)
    for name in ("openai/clip-vit-base-patch32", "cleaned", "your-untrained-clip"):
        tiny_model(0).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    sigmoid = siglip()
    sigmoid.save_pretrained(folder / "google/siglip-base-patch16-224")
    processor_for(sigmoid).save_pretrained(folder / "google/siglip-base-patch16-224")
    return folder


# ---- The site ----


class Links(HTMLParser):
    """What a page loads, where it leads, and the places in it that can be led to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.leads: list[str] = []
        self.places: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.leads.append(given["href"])
        elif tag != "a":
            self.loaded += [given[name] for name in ("src", "href", "srcset", "data", "poster") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        folder = tmp_path_factory.mktemp("site")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        assert config.strict
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return folder


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, Links]:
    return {path.relative_to(site): Links(path.read_text()) for path in site.rglob("*.html")}


def is_external(url: str) -> bool:
    return url.startswith("//") or urlsplit(url).scheme not in ("", "data")


def test_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path, built: dict[Path, Links]) -> None:
    assert {Path(page).with_suffix(".html") for page in PAGES if page != "README.md"} <= set(built)
    for path, links in built.items():
        assert links.loaded and not [url for url in links.loaded if is_external(url)], path
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


def test_links_lead_somewhere(site: Path, built: dict[Path, Links]) -> None:
    for path, links in built.items():
        if path.name == "404.html":  # its links are those of the server's root
            continue
        for url in (*links.leads, *links.loaded):
            parts = urlsplit(url)
            if is_external(url):
                assert parts.scheme == "https" and parts.netloc and " " not in url, f"{path}: {url}"
                continue
            if parts.scheme == "data" or not (parts.path or parts.fragment):
                continue
            target = (site / path.parent / unquote(parts.path)).resolve() if parts.path else site / path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path}: {url}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in built[target.relative_to(site.resolve())].places, f"{path}: {url}"


def test_links_of_the_readme_lead_somewhere(built: dict[Path, Links]) -> None:
    for url in re.findall(r"\]\(([^)\s]+)\)", PAGES["README.md"]):
        parts = urlsplit(url)
        if parts.scheme or not parts.path:
            continue
        assert (ROOT / parts.path).exists(), url
        if parts.fragment:
            page = Path(parts.path).relative_to("docs").with_suffix(".html")
            assert parts.fragment in built[page].places, url


def test_reference_has_every_public_name(site: Path) -> None:
    reference = (site / "api.html").read_text()
    for name in set(hf_robust_clip.__all__) - {"__version__", "losses"}:  # the functions of a module are listed
        assert re.search(rf'<a href="source/[\w/]+\.html#\w+"><code>{name}</code></a>: \S', reference), name


@pytest.mark.parametrize(
    "page, name",
    [
        ("cleanclip", "CleanCLIP"),
        ("par", "PAR"),
        ("unbind", "Unbind"),
        ("roclip", "RoCLIP"),
        ("safeclip", "SafeCLIP"),
        ("api", "CLIP"),
    ],
)
def test_every_argument_is_on_its_page(page: str, name: str, site: Path) -> None:
    text = (site / f"{page}.html").read_text()
    cls = getattr(hf_robust_clip, f"{name}TrainingArguments")
    base = CLIPTrainingArguments.__mro__[1] if cls is CLIPTrainingArguments else CLIPTrainingArguments
    inherited = {field.name: field.default for field in dataclasses.fields(base)}
    own = [field for field in dataclasses.fields(cls) if inherited.get(field.name, field) != field.default]
    assert own
    for field in own:
        default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        row = rf"<td><code>{field.name}</code></td>\s*<td><code>{re.escape(default)}</code></td>\s*<td>\S"
        assert re.search(row, text.replace("&quot;", '"')), field.name


# ---- Figures ----


@pytest.mark.parametrize(
    "page, name, digits",
    [
        ("cleanclip.md", "cleanclip_over_clip", "{:.2f} times"),
        ("par.md", "par_over_clip", "{:.2f} times"),
        ("roclip.md", "roclip_matching_over_plain", "{:.2f} times"),
        ("safeclip.md", "safeclip_over_clip", "{:.2f} times"),
        ("safeclip.md", "safeclip_scoring_over_epoch", "{:.0%}"),
    ],
)
def test_costs_are_those_of_the_committed_results(page: str, name: str, digits: str) -> None:
    ratios: dict[str, float] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("step_cost*.json")):
        ratios |= json.loads(path.read_text())["ratios"]
    assert digits.format(ratios[name]) in PAGES[page].replace("\n", " ")


@pytest.mark.parametrize("name", ["ppm_over_jpeg", "png_over_jpeg"])
def test_times_of_the_data_path_are_those_of_the_committed_results(name: str) -> None:
    ratios = json.loads((ROOT / "benchmarks" / "results" / "data_path.json").read_text())["ratios"]
    assert f"{ratios[name]:.0%}" in PAGES["data.md"]


def test_table_of_adapters_is_that_of_the_committed_results() -> None:
    begin, end = "<!-- lora table: benchmarks/lora.py -->\n", "<!-- end of the lora table -->"
    results = ROOT / "benchmarks" / "results" / "lora.json"
    assert begin in PAGES["lora.md"] and end in PAGES["lora.md"]
    spec = importlib.util.spec_from_file_location("lora_benchmark", ROOT / "benchmarks" / "lora.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.table(json.loads(results.read_text()))
    assert table in PAGES["lora.md"].partition(begin)[2].partition(end)[0]


@pytest.mark.parametrize("page", TABLES)
def test_tables_of_speed_and_scale_are_those_of_the_committed_results(page: str) -> None:
    for name, table in TABLES[page].items():
        begin, end = table_marks(name, "pages.py")
        assert begin + table() + end in PAGES[page], f"{name}: run benchmarks/pages.py"


def test_cost_model_agrees_with_what_was_counted() -> None:
    results = ROOT / "benchmarks" / "results"
    assert json.loads((results / "scaling.json").read_text())["bytes_are_as_computed"]
    assert json.loads((results / "cost_model.json").read_text())["bytes_agree"]


# ---- Code ----


def pushes(page: str) -> bool:
    return "push_to_hub()" in script_of(page)


@pytest.mark.parametrize("page", [page for page in pages_with("python") if not pushes(page)])
def test_code_runs(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(script_of(page), page, "exec"), {"__name__": "__main__"})


def test_code_that_pushes_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "pushing_pages.py"
    script.write_text("\n".join(script_of(page) for page in pages_with("python") if pushes(page)))
    monkeypatch.chdir(folder)
    with HubStandIn() as hub:
        run_script(hub, script, home=tmp_path / "home")
        assert any("README.md" in hub.files(name) for name in hub.repositories)


def commands(page: str) -> list[list[str]]:
    """The commands of a page's shell blocks, split into words."""
    lines = "\n".join(code for _, code in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_are_those_that_there_are(
    page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("you", "openai", "your-untrained-clip"):
        Path(name).symlink_to(folder / name)
    for _, code in blocks(page, "yaml"):
        if named := re.match(r"# (\S+\.yaml)\n", code):
            Path(named[1]).write_text(code)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[:2] == ["accelerate", "launch"]:
            assert all((ROOT / word).is_file() for word in words if word.startswith("examples/"))
            words = ["hf-robust-clip", *words[words.index("hf_robust_clip") + 1 :]]
        program, *given = words
        if program == "hf-robust-clip" and given[0] in DRY:
            # Half precision needs a GPU even to be asked for.
            given = [word for word in given if word not in ("--bf16", "--dry-run")]
            assert main([*given, "--dry-run"]) == 0, capsys.readouterr().err
        elif program == "hf-robust-clip":
            build_parser().parse_args(given)
        elif program == "make":
            assert given[0] in targets, words
        elif program == "python":
            assert (ROOT / given[0]).is_file(), words
        else:
            assert words[:2] == ["pip", "install"], words


def test_what_is_not_run_says_why() -> None:
    reasons = [reason for page in PAGES for reason, _ in blocks(page, "python") if reason is not None]
    notes = sum(page.count("<!-- not run") for page in PAGES.values())
    assert len(reasons) == notes and all(len(reason.split()) > 3 for reason in reasons)


def test_examples_and_files_named_are_there() -> None:
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:examples|benchmarks|docs|scripts|model_cards)/[a-z0-9_/.]*)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
