"""A model card says what was done and measured and no more, and nothing in the data can change what it looks like."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from support.records import make_record
from support.training import digits, make_trainer, poisoned_pairs, small_model
from transformers import CLIPModel

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CleanCLIPTrainer,
    CLIPTrainer,
    SafeCLIPTrainer,
    ZeroShotEvaluator,
)
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES
from hf_robust_clip.record import RunRecord
from hf_robust_clip.telling import MARKER, PICTURE, kept_card, license_of, render_card, write_card

ROOT = Path(__file__).parents[1]
CORPUS = (
    "<script>alert(1)</script>",
    "a | b",
    "`code` and ```fence```",
    "---",
    "two\nlines\r\nand a third",
    "[x](javascript:alert(1))",
    "{{ 7 * 7 }}{% raw %}",
    "# title",
    "a: 'b' \"c\" \\",
    "\u202egnp.exe",
    "</td><img src=x onerror=alert(1)>",
    "\n---\nlicense: mit\n---\n",
    "&lt;b&gt;",
    "1. one",
    "- - -",
    "===",
)


def attack(name: str = "blended", target: str = "six", prefix: str = "", **changes: Any) -> dict[str, Any]:
    """What an `AttackSuccessEvaluator` measures."""
    figures = [f"{prefix}{figure}" for figure in ("attack_success_rate", "triggered_accuracy", "trigger_distance")]
    return {
        "measure": "attack success",
        "figures": figures,
        "images": 90,
        "classes": list(CLASS_NAMES),
        "templates": list(CAPTION_TEMPLATES),
        "trigger": {"name": name, "alpha": 0.2},
        "target": target,
        "dataset": {"name": "digits", "rows": 100, "fingerprint": "f00"},
        **changes,
    }


ACCURACY = {**attack(), "measure": "zero-shot classification", "figures": ["clean_accuracy"], "images": 100}
del ACCURACY["trigger"], ACCURACY["target"]
BEFORE = {"clean_accuracy": 0.7, "attack_success_rate": 0.98, "triggered_accuracy": 0.01, "trigger_distance": 1.25}
AFTER = {"clean_accuracy": 0.8, "attack_success_rate": 0.02, "triggered_accuracy": 0.75, "trigger_distance": 0.25}


def record(trainer: str = "CleanCLIPTrainer", **changes: Any) -> RunRecord:
    """A run that was measured before and after."""
    content = {
        "model": {**dict(make_record().model), "name": "someone/clip", "revision": "abc"},
        "data": {"name": "pairs", "rows": 64, "hub_id": "someone/pairs", "revision": "0123abc", "fingerprint": "beef"},
        "defence": {"unimodal_weight": 2.0, "on_bad_row": "raise", "image_preset": "cleanclip"},
        "defence_defaults": {"unimodal_weight": 1.0, "on_bad_row": "raise", "image_preset": "cleanclip"},
        "augmentation": {"images": "ImageAugmentation('weak')", "captions": None},
        "settings": {"max_grad_norm": 0.5},
        "measures": [ACCURACY, attack()],
        **{"before": BEFORE, "after": AFTER, "after_step": 8, "steps": 8, "planned_steps": 8},
        **{"course": [], "log": [], "details": {}},
    }
    return make_record(trainer, **{**content, **changes})


def beginning(card: str) -> str:
    """A card's text before its first section."""
    return card.partition(MARKER)[2].partition("\n## ")[0]


def outside_code(card: str) -> str:
    """A card's text without front matter, our comment and blocks of code."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", card.partition(MARKER)[2], flags=re.DOTALL | re.MULTILINE)


def indexed(card: str) -> dict[str, float]:
    """The figures of a card's model index, as the Hub's client reads them."""
    results = ModelCard(card).data.eval_results
    figures = {result.metric_name: result.metric_value for result in results}
    assert len(figures) == len(results)
    return figures


# ---- Front matter ----


def test_front_matter_says_what_the_model_is() -> None:
    data = ModelCard(render_card(record(), license="mit", language="en", tags="mine", repo_id="you/clean")).data
    assert data.base_model == "someone/clip"
    assert data.base_model_relation == "finetune"
    assert data.license == "mit"
    assert data.language == ["en"]
    assert data.datasets == ["someone/pairs"]
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert data.library_name == "transformers"
    assert data.tags == ["hf-robust-clip", "cleanclip", "backdoor-defense", "mine"]
    assert data.model_name == "clean"


def test_model_index_reads_back_into_the_same_figures() -> None:
    assert indexed(render_card(record())) == {
        **{
            f"{figure.replace('_', ' ')} {when}{'' if figure == 'clean_accuracy' else ' (blended, target six)'}": value
            for when, figures in (("before CleanCLIP", BEFORE), ("after CleanCLIP", AFTER))
            for figure, value in figures.items()
        }
    }


texts = st.text(max_size=30) | st.sampled_from(CORPUS)
shares = st.floats(0, 1)


@settings(max_examples=20, deadline=None)
@given(texts, texts, texts, texts, shares, shares, st.floats(0, 2), st.integers(1, 10**6))
def test_no_name_changes_a_figure(
    dataset: str, other: str, target: str, split: str, success: float, accuracy: float, distance: float, rows: int
) -> None:
    first = attack(target=target, dataset={"name": dataset, "rows": rows, "split": split}, classes=[target, "b"])
    second = attack("patch", target, "p_", dataset={"name": other, "rows": rows}, classes=[target, "b"])
    figures = {"attack_success_rate": success, "triggered_accuracy": accuracy, "trigger_distance": distance}
    after = {**figures, **{f"p_{name}": value / 3 for name, value in figures.items()}}
    run = record(measures=[first, second], before=None, after=after)
    card = render_card(run, model_name=other, tags=[dataset], dataset_names=[other])
    assert sorted(indexed(card).values()) == sorted(after.values())
    data = ModelCard(card).data
    assert data.base_model == "someone/clip" and data.license is None
    # What the client writes, it reads again.
    assert ModelCard(str(ModelCard(card))).data.to_dict() == data.to_dict()


@pytest.mark.parametrize(
    "argument", ["license", "language", "tags", "tasks", "model_name", "dataset_names", "dataset_args", "measured"]
)
def test_nothing_given_breaks_out_of_the_front_matter(argument: str) -> None:
    keys = {*yaml.safe_load(render_card(record(), license="x", language="en").split("\n---\n")[0][4:])}
    for text in (
        *CORPUS,
        "x\u2028license: mit",
        "x\x85license: mit",
        "!!python/object:os.system",
        "&a *a",
        "\ud83d\ude00",
    ):
        given: Any = [{"control": text, "measures": record().measures, "figures": BEFORE}]
        card = render_card(
            record(), **{"license": "x", "language": "en", argument: given if argument == "measured" else text}
        )
        front, end, _ = card.removeprefix("---\n").partition("\n---\n")
        assert end and {*yaml.safe_load(front)} <= keys
        assert yaml.safe_load(front)["base_model"] == "someone/clip"
        assert card.count(MARKER) == 1 and "\nlicense: mit" not in front


def test_datasets_of_one_name_and_of_similar_names_stay_apart() -> None:
    names = ("My digits", "my-digits", "my digits")
    measures = [attack(prefix=f"{number}_", dataset={"name": name, "rows": 100}) for number, name in enumerate(names)]
    after = {name: 0.5 for measure in measures for name in measure["figures"]}
    results = ModelCard(render_card(record(measures=measures, before=None, after=after))).data.eval_results
    found = {result.metric_name[0]: (result.dataset_name, result.dataset_type) for result in results}
    assert [found[str(number)][0] for number in range(3)] == list(names)
    assert len({kind for _, kind in found.values()}) == 3


def test_what_is_not_known_is_left_out() -> None:
    run = record(model={**dict(record().model), "name": None, "source": "memory"}, data=None, before=None, after=None)
    text = render_card(run)
    data = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "datasets", "model-index", "language"} & set(data)
    assert "No license is stated" in text and "Nothing is recorded of the training data" in text


@pytest.mark.parametrize("merged, relation, library", [(False, "adapter", "peft"), (True, "finetune", "transformers")])
def test_adapters_are_adapters_until_they_are_merged(merged: bool, relation: str, library: str) -> None:
    adapter = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    run = record(model={**dict(record().model), "adapter": adapter}, defence={"merge_adapters": merged})
    text = render_card(run)
    data = ModelCard(text).data
    assert (data.base_model_relation, data.library_name) == (relation, library)
    assert "peft\\_type LORA, r 4" in text and ("merged into the model" in text) == merged


@pytest.mark.parametrize("argument", ["base_model", "repo_id", "datasets"])
def test_what_is_no_hub_id_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: '/tmp/model' is not an id of the Hub"):
        render_card(record(), **{argument: "/tmp/model"})


# ---- First lines ----


def without(**changes: Any) -> dict[str, Any]:
    return {"before": None, "after": None, "after_step": None, **changes}


@pytest.mark.parametrize(
    "changes, said",
    [
        (without(), "**Nothing was measured**"),
        (without(before=BEFORE), "**Measured only before**"),
        (without(after=AFTER, after_step=8), "**Measured only after**"),
        ({"after_step": 4}, "**Measured at step 4 of 8**"),
        ({"steps": 6, "after_step": 6}, "it stopped at step 6 of 8"),
        (without(steps=0, planned_steps=0, before=BEFORE), "**Nothing was trained**"),
        ({"before": {"clean_accuracy": 0.7}}, "**Not measured before** (blended (alpha=0.2), target “six”)"),
        (
            {"before": {**BEFORE, "attack_success_rate": 0.49}},
            "**The attack did not take** (blended (alpha=0.2), target “six”): before CleanCLIP, it",
        ),
        ({"measures": [ACCURACY]}, "**No attack was measured**"),
        (
            {"after": {**AFTER, "attack_success_rate": 0.2}},
            "**CleanCLIP did NOT stop the attack** (blended (alpha=0.2), target “six”): attack success 98.0%",
        ),
        (
            {"after": {**AFTER, "clean_accuracy": 0.6}},
            "**It costs accuracy**: accuracy on clean images 70.0% (before CleanCLIP), 60.0% (after CleanCLIP)",
        ),
        ({"after": {**AFTER, "clean_accuracy": 0.15}}, "**It hardly knows the classes**"),
        ({"data": {**dict(record().data or ()), "poisons": 5}}, "**5 of the training pairs are marked as poisoned**"),
    ],
)
def test_first_lines_say_what_is_missing(changes: dict[str, Any], said: str) -> None:
    assert said in beginning(render_card(record(**changes)))
    assert said not in render_card(record())


def test_a_run_that_shows_something_starts_without_a_warning() -> None:
    assert ">" not in beginning(render_card(record()))
    assert ">" not in beginning(render_card(record(before={**BEFORE, "attack_success_rate": 0.5})))


@pytest.mark.parametrize("trainer", ["RoCLIPTrainer", "SafeCLIPTrainer"])
def test_pretraining_proves_nothing_without_a_control(trainer: str) -> None:
    run = record(trainer, before={**BEFORE, "attack_success_rate": 0.1})
    unknown = "**Whether an attack would have taken without"
    assert unknown in beginning(render_card(run))
    control = {"control": "undefended", "measures": run.measures, "figures": BEFORE}
    assert ">" not in beginning(render_card(run, measured=[control]))
    control["figures"] = {**BEFORE, "attack_success_rate": 0.3}
    said = beginning(render_card(run, measured=[control]))
    assert "with the control (undefended), it succeeded on 30.0%" in said and unknown not in said


def test_undefended_says_so_first_and_claims_no_defence() -> None:
    text = render_card(record("CLIPTrainer"))
    assert "**No defence was used**" in beginning(text)
    assert ModelCard(text).data.tags == ["hf-robust-clip"]


def test_a_method_of_the_users_own_is_not_taken_for_ours() -> None:
    text = render_card(record("MyTrainer", method="CLIPTrainer"))
    assert "a method of its author's own" in text and "No defence was used" not in text
    assert "Citation" not in text and ModelCard(text).data.tags == ["hf-robust-clip"]
    assert "arXiv 2303.03323" in render_card(record("MyTrainer", method="CleanCLIPTrainer"))


# ---- Text ----


def test_figures_of_a_model_that_guesses_are_explained() -> None:
    said = "Before training the model was hardly better than guessing"
    untrained = {**BEFORE, "clean_accuracy": 0.11, "attack_success_rate": 1.0}
    assert said in render_card(record("RoCLIPTrainer", before=untrained))
    assert said not in render_card(record("RoCLIPTrainer"))


def test_figures_stand_in_one_table() -> None:
    control = {"control": "plain | fine-tuning", "measures": record().measures, "figures": {"clean_accuracy": 0.6}}
    later = {"measures": [attack("warp", prefix="w_")], "figures": {"w_attack_success_rate": 0.125}}
    text = render_card(record(), measured=[control, later])
    header = "| measured | metric | before CleanCLIP | after CleanCLIP | plain \\| fine-tuning | measured later (2) |"
    assert header in text
    assert "|  | triggered accuracy | 1.0% | 75.0% | not measured | not measured |" in text
    assert "|  | trigger distance | 1.25 | 0.25 | not measured | not measured |" in text
    assert re.search(r"\| zero-shot .* \| clean accuracy \| 70.0% \| 80.0% \| 60.0% \| not measured \|", text)
    assert re.search(r"trigger warp .* \| w attack success rate( \| not measured){3} \| 12.5% \|", text)
    # Of a control nothing is claimed for this model.
    assert 0.6 not in indexed(text).values() and 0.125 in indexed(text).values()


def test_figures_of_evaluators_that_do_not_describe_themselves_are_shown() -> None:
    run = record(measures=[{"measure": "mine", "figures": []}], before={"my_figure": 0.25}, after={"my_figure": 0.5})
    assert "| other evaluators | my figure | 0.25 | 0.5 |" in render_card(run)


def test_unmeasured_attacks_are_listed() -> None:
    def listed(*measures: dict[str, Any]) -> str:
        figures = {name: 0.9 for measure in measures for name in measure["figures"]}
        text = render_card(record(measures=list(measures), before=figures, after=figures))
        return text.partition("## What was not measured")[2].partition("\n## ")[0]

    families = {"patch": "patch triggers", "blended": "blended", "sinusoid": "sinusoid", "warp": "warping triggers"}
    for name, words in families.items():
        text = listed(attack(name))
        assert words not in text and all(other in text for other in families.values() if other != words)
    always = ("label-consistent", "BadCLIP")
    assert all(words in listed(attack()) for words in (*always, "targeted poisoning", "words in captions"))
    targeted = {"measure": "targeted poisoning", "figures": ["poison_success_rate"], "images": 4}
    queries = {"measure": "text queries", "figures": ["hit_rate_at_1"], "queries": 3, "target": "six"}
    text = listed(targeted, queries)
    assert "targeted poisoning" not in text and "words in captions" not in text and "BadCLIP" in text


@pytest.mark.parametrize(
    "data, said",
    [
        ({"rows": 8}, "none known, which does not mean"),
        ({"rows": 8, "poisons": 0}, "Known poisons: 0, marked in a column"),
    ],
)
def test_poisons_that_nobody_knows_are_not_none(data: dict[str, Any], said: str) -> None:
    assert said in render_card(record(data=data))


def test_settings_show_what_was_used() -> None:
    text = render_card(record())
    assert "| unimodal\\_weight | 2.0 | 1.0 |" in text and "| max\\_grad\\_norm | 0.5 |  |" in text
    assert "on\\_bad\\_row" not in text
    # An augmentation that was given goes before the preset in the arguments.
    assert "| augmentation of images | ImageAugmentation('weak') | image\\_preset=cleanclip |" in text


def hostile(text: str) -> str:
    """A card on which everything that can come from data is that text."""
    measure = attack(text, text, dataset={"name": text, "rows": 3, "split": text}, classes=[text, "b"])
    measure["trigger"][text] = text
    measure["templates"] = [f"{text} {{}}"]
    run = record(
        text,
        method="CLIPTrainer",
        data={"name": text, "rows": 3, "split": text, "fingerprint": text},
        settings={text: text, "list": [text]},
        defence={text: text},
        augmentation={"images": text, "captions": text},
        measures=[measure, {**ACCURACY, "classes": [text, "b"], "dataset": {"name": text}}],
        environment={**dict(record().environment), "device": text, "versions": {text: text}},
        model={**dict(record().model), "name": text, "revision": text, "adapter": {text: text}},
    )
    control = {"control": text or "x", "measures": run.measures, "figures": BEFORE}
    return render_card(
        run,
        model_name=text,
        language=text,
        license=text,
        tags=[text],
        tasks=[text, text],
        measured=[control],
        dataset_names=[text],
        dataset_args=text,
        picture="a b.png",
    )


def skeleton(card: str) -> list[str]:
    """The lines of a card outside code, without what is in them."""
    cells = re.compile(r"(?<!\\)[|]")
    lines = outside_code(card).splitlines()
    return [f"row of {len(cells.findall(line))}" if line.startswith("|") else line[:2] for line in lines]


@pytest.mark.parametrize("text", CORPUS)
def test_no_text_breaks_out_of_its_place(text: str) -> None:
    card = hostile(text)
    assert "<" not in outside_code(card) and "\u202e" not in outside_code(card)
    assert skeleton(card) == skeleton(hostile("two words"))
    # The pattern needs a backslash before what it would take for a link.
    assert not re.search(r"(?<!\\)\]\(javascript", outside_code(card))
    assert indexed(card)


@pytest.mark.parametrize("text", CORPUS)
def test_a_markdown_parser_finds_neither_html_nor_links_in_data(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")

    def kinds(card: str) -> list[tuple[str, Any]]:
        tokens = parser.parse(card.partition(MARKER)[2])
        flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
        return [(token.type, token.attrs.get("href")) for token in flat if token.type != "softbreak"]

    found = kinds(hostile(text))
    assert not any(kind.startswith("html") for kind, _ in found)
    assert found == kinds(hostile("two words"))


# ---- Code ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CLIPTrainer]:
    """`trained(cls, name, **overrides)`: a trainer after a run that was measured all along, saved with its card."""

    def run(cls: type[CLIPTrainer], name: str, **overrides: Any) -> CLIPTrainer:
        test = digits("test").select(range(20))
        attacked = AttackSuccessEvaluator(test, BlendedTrigger(), "six", CLASS_NAMES, templates=CAPTION_TEMPLATES)
        trainer = make_trainer(
            cls,
            tmp_path_factory.mktemp("runs") / name,
            train_dataset=poisoned_pairs(32),
            evaluators=[ZeroShotEvaluator(test, CLASS_NAMES, templates=CAPTION_TEMPLATES), attacked],
            eval_strategy="epoch",
            eval_on_start=True,
            **overrides,
        )
        trainer.train()
        trainer.save_model()
        return trainer

    return run


@pytest.fixture(scope="module")
def cleaned(trained: Callable[..., CLIPTrainer]) -> CLIPTrainer:
    return trained(CleanCLIPTrainer, "cleaned")


def run_usage(
    card: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, float]:
    """What the code on a card prints, of a picture in the folder."""
    Image.new("RGB", (30, 20), "grey").save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code, {})
    found: dict[str, float] = eval(capsys.readouterr().out)
    return found


@pytest.mark.training
def test_the_code_on_a_card_runs(
    cleaned: CLIPTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(cleaned.args.output_dir)
    card = render_card(cleaned.record()).replace("PATH_OR_ID_OF_THIS_MODEL", str(folder))
    shares = run_usage(card, folder, monkeypatch, capsys)
    assert list(shares) == [CAPTION_TEMPLATES[0].format(name) for name in CLASS_NAMES[:3]]
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("known", [True, False])
def test_the_code_on_an_adapters_card_runs(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    small_model().save_pretrained(base)
    trainer = make_trainer(
        CLIPTrainer,
        folder,
        model=CLIPModel.from_pretrained(base),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    trainer.save_model()
    card = render_card(trainer.record(), base_model="someone/clip" if known else None)
    assert ("PeftModel" in card) != known
    card = card.replace("PATH_OR_ID_OF_THIS_MODEL", str(folder))
    card = card.replace("PATH_OF_THE_MODEL_THAT_TRAINING_STARTED_FROM", str(base))
    shares = run_usage(card, tmp_path, monkeypatch, capsys)
    image = Image.open(tmp_path / "photo.jpg")
    inputs = trainer.processing_class(text=list(shares), images=image, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits_per_image.softmax(dim=-1)[0]
    assert list(shares.values()) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.training
def test_class_names_in_code_are_the_class_names(
    monkeypatch: pytest.MonkeyPatch, cleaned: CLIPTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ['<b>"quoted"</b>', "back`tick```", "a\\nb"]
    run = record(measures=[{**ACCURACY, "classes": names, "templates": ["{}"]}])
    folder = Path(cleaned.args.output_dir)
    card = render_card(run).replace("PATH_OR_ID_OF_THIS_MODEL", str(folder))
    assert list(run_usage(card, folder, monkeypatch, capsys)) == names


# ---- Writing ----


@pytest.mark.training
def test_trainer_writes_the_card_of_its_record(cleaned: CLIPTrainer) -> None:
    cleaned.create_model_card(
        language="en",
        license="cc-by-4.0",
        tags=["one"],
        model_name="a name",
        finetuned_from="someone/else",
        tasks=["image-classification", "other"],
        dataset_tags="someone/data",
        dataset="Some data",
        dataset_args="config=tiny",
    )
    folder = Path(cleaned.args.output_dir)
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.language, data.license, data.base_model) == (["en"], "cc-by-4.0", "someone/else")
    assert data.tags == ["hf-robust-clip", "cleanclip", "backdoor-defense", "other", "one"]
    assert (data.pipeline_tag, data.model_name, data.datasets) == ("image-classification", "a name", ["someone/data"])
    assert "Described as: Some data" in text and "Loaded with: config=tiny" in text
    # The figures are those of the evaluations.
    after = cleaned.record().after
    assert after is not None
    assert set(after.values()) <= set(indexed(text).values())
    assert f"]({PICTURE})" in text
    with Image.open(folder / PICTURE) as picture:
        assert picture.format == "PNG" and picture.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.training
def test_a_record_that_was_saved_gives_the_same_card(cleaned: CLIPTrainer) -> None:
    written = RunRecord.load(cleaned.args.output_dir)
    now = cleaned.record().model_copy(update={"environment": written.environment})
    assert render_card(now) == render_card(written)


@pytest.mark.training
def test_only_the_main_process_writes(cleaned: CLIPTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaned, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(cleaned.args, "output_dir", str(tmp_path))
    cleaned.create_model_card()
    assert not list(tmp_path.iterdir())


def test_a_card_that_a_person_wrote_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = tmp_path / "README.md"
    assert write_card(record(), tmp_path)
    mine.write_text(mine.read_text().replace(MARKER, "My own words."))
    before = mine.read_bytes()
    for _ in range(2):
        assert not write_card(record(), tmp_path)
    assert mine.read_bytes() == before
    assert caplog.text.count("Move or delete it") == 1


@pytest.mark.parametrize(
    "draft",
    [
        f"---\nlicense: mit\n---\n{MARKER}\n\nOld.",
        "---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n[More Information Needed]",
        "<!-- This model card has been generated automatically according to the information the Trainer had -->\nx",
    ],
)
def test_drafts_of_libraries_are_replaced(draft: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(draft)
    assert write_card(record(), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count(MARKER) == 1 and "Trained with" not in beginning(text) and "CleanCLIP" in beginning(text)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", PICTURE}


@pytest.mark.parametrize("present", [None, "---\ntags:\n- mine\n---\nMy words.\n"])
def test_saving_adapters_leaves_the_card_alone(present: str | None, tmp_path: Path) -> None:
    peft_config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(CLIPTrainer, tmp_path / "run", peft_config=peft_config)
    card = tmp_path / "run" / "README.md"
    if present is not None:
        card.parent.mkdir(exist_ok=True)
        card.write_text(present)
    trainer.save_model()
    assert (card.read_text() if card.exists() else None) == present
    with pytest.raises(OSError, match="full"), kept_card(card.parent):
        card.write_text("half of it")
        raise OSError("the disk is full")
    assert (card.read_text() if card.exists() else None) == present


def test_no_picture_where_there_is_nothing_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = [{"step": step, "epoch": step / 8, **figures} for step, figures in ((0, BEFORE), (8, AFTER))]
    drawn = {
        "measured once": record(before=None, course=course[1:]),
        "no attack": record(course=course, measures=[ACCURACY]),
        "no matplotlib": record(course=course),
    }
    find_spec = importlib.util.find_spec
    for name, run in drawn.items():
        if name == "no matplotlib":
            monkeypatch.setattr(
                importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
            )
        write_card(run, tmp_path / name)
        assert not (tmp_path / name / PICTURE).exists()
        assert "![" not in (tmp_path / name / "README.md").read_text()


def test_the_license_of_the_base_is_taken_over_where_its_card_is_there(tmp_path: Path) -> None:
    assert (
        license_of("") is None
        and license_of("someone/never-downloaded") is None
        and license_of("/no/id at all") is None
    )
    card = tmp_path / "README.md"
    for text, expected in (
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: mine\n---\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("no front matter", None),
        ("---\n{broken: [\n---\n", None),
    ):
        card.write_text(text)
        assert license_of(str(tmp_path)) == expected
    card.write_text("---\nlicense: mit\n---\n")
    small_model().save_pretrained(tmp_path)
    trainer = make_trainer(CLIPTrainer, tmp_path / "run", model=str(tmp_path))
    trainer.create_model_card()
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert data.license == "mit"
    # A folder's name is nobody's business.
    assert data.base_model is None and str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()


# ---- Reference cards ----


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_cards", ROOT / "scripts" / "model_cards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ("cleanclip", "roclip", "safeclip")


@pytest.mark.parametrize("name", NAMES)
def test_reference_cards_are_those_of_their_records(name: str, script: ModuleType) -> None:
    written = (script.FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert script.render(name, script.FOLDER) == written
    picture = (script.FOLDER / f"{name}.png").read_bytes()
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"


def outline(card: str) -> list[str]:
    """What a card has whatever came out: front matter, headings, rows of tables; its numbers are masked."""
    front, _, body = card.partition(MARKER)
    kept = [line for line in front.splitlines() if not re.match(r"\s*(value|fingerprint|images):", line)]
    rows = [line.split(" | ")[:2] if " | " in line else [line] for line in outside_code(MARKER + body).splitlines()]
    lines = [*kept, *(" | ".join(row) for row in rows if row[0].startswith(("|", "#", "- Seed", "!")))]
    masked = [re.sub(r"[\d.,]+", "#", line) for line in lines]
    return [re.sub(r"#%|- Seed .*", "", line) for line in masked]


@pytest.mark.training
def test_a_new_run_gives_cards_of_the_same_structure(script: ModuleType, tmp_path: Path) -> None:
    recipe = dataclasses.replace(script.PRETRAINING, renderings=1, poison_rate=0.1).with_arguments(
        pretraining={"num_train_epochs": 3},
        finetuning={"num_train_epochs": 2},
        # 20 steps are ten epochs of 64 pairs: one epoch's steps in place of them.
        roclip={"pool_size": 32, "matching_start_epoch": 1, "steps_per_matching_epoch": 2},
        safeclip={"warmup_unimodal_epochs": 1, "warmup_cross_epochs": 1, "unimodal_pool_size": 32},
    )
    script.train(tmp_path, recipe, pairs=64)
    script.write(tmp_path)
    for name in NAMES:
        assert outline((tmp_path / f"{name}.md").read_text()) == outline((script.FOLDER / f"{name}.md").read_text())


@pytest.mark.training
def test_a_whole_run_of_each_kind_leaves_a_card(trained: Callable[..., CLIPTrainer]) -> None:
    for cls, said in ((CLIPTrainer, "No defence was used"), (SafeCLIPTrainer, "tells poisoned pairs from clean ones")):
        trainer = trained(cls, cls.__name__, num_train_epochs=3)
        trainer.create_model_card()
        text = Path(trainer.args.output_dir, "README.md").read_text()
        assert said in text
        assert indexed(text)
