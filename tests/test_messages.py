"""The end of messages: no message of the package is longer than it should be, whatever it speaks of."""

import ast
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

import hf_robust_clip
from hf_robust_clip import (
    AttackSuccessEvaluator,
    CLIPDataCollator,
    LinearProbeEvaluator,
    PairSimilarityCallback,
    PatchTrigger,
    PoisonSpec,
    PoisonSuccessEvaluator,
    RetrievalEvaluator,
    TextQueryEvaluator,
    WordTrigger,
    ZeroShotEvaluator,
    poison_dataset,
    poison_stream,
    prepare_dataset,
    replay_manifest,
    scan_checkpoint,
)
from hf_robust_clip.attacks.triggers import trigger_from_dict, trigger_from_name
from hf_robust_clip.data.rows import check_dataset, decode_row
from hf_robust_clip.describing import describe_skipped
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.imaging import decode_image
from hf_robust_clip.record import RunRecord
from hf_robust_clip.wording import LONGEST, listed

MANY = 2_000
LONG = "very long " * 1_000
NAMES = [f"{'class ' * 40}{i}" for i in range(MANY)]
#: A row of very many columns with very long names.
WIDE = {f"{'column ' * 40}{i}": 0 for i in range(MANY)}
LABELLED = [{"image": None, "label": i, "caption": NAMES[i]} for i in (0, 1)]
PATCH = PatchTrigger(size=3)
TABLE = datasets.Dataset.from_dict({name: [0] for name in WIDE})
PAIRS = datasets.Dataset.from_dict({"image": [b""], "caption": ["a"]})
LABELS = datasets.Features(
    {"image": datasets.Image(), "caption": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
)


def raising(*_):
    raise ValueError(LONG)


RAISING = type("Raising", (), {"__repr__": lambda self: LONG, "__call__": raising})()

CALLS = {
    "candidates of a scan": lambda: scan_checkpoint(None, None, [WIDE] * 20, [*NAMES, NAMES[0]]),
    "columns of a scan": lambda: scan_checkpoint(None, None, [WIDE] * 20, NAMES),
    "families of a scan": lambda: scan_checkpoint(None, None, [WIDE] * 20, NAMES, families=NAMES),
    "columns of rows": lambda: ZeroShotEvaluator([WIDE], NAMES),
    "columns of a table": lambda: RetrievalEvaluator(TABLE),
    "columns to train on": lambda: check_dataset(TABLE, LONG, "caption", "train_dataset"),
    "columns of a row": lambda: decode_row(WIDE, "image", "caption"),
    "columns to poison": lambda: poison_dataset(TABLE, PoisonSpec(PATCH, "cat", count=1)),
    "columns of a stream": lambda: poison_stream(
        TABLE.to_iterable_dataset(), PoisonSpec(PATCH, "cat", rate=0.5), key_column=LONG
    ),
    "columns to prepare": lambda: prepare_dataset(TABLE, None, LONG),
    "columns to follow": lambda: PairSimilarityCallback(TABLE),
    "splits": lambda: check_dataset(dict.fromkeys(WIDE, TABLE), "image", "caption", "train_dataset"),
    "types": lambda: check_dataset(
        datasets.Dataset.from_list([{"image": dict.fromkeys(NAMES[:300], 0), "caption": 3}]), "image", "caption", "x"
    ),
    "labels": lambda: ZeroShotEvaluator([{"image": None, "label": LONG}], NAMES),
    "numbers of labels": lambda: ZeroShotEvaluator([{"image": None, LONG: MANY}], NAMES, label_column=LONG),
    "names twice": lambda: ZeroShotEvaluator(LABELLED, ["x" * 5_000] * MANY),
    "an order of names": lambda: ZeroShotEvaluator(
        datasets.Dataset.from_list([{"image": None, "caption": "a", "label": 0}], features=LABELS), NAMES[::-1]
    ),
    "templates": lambda: ZeroShotEvaluator(LABELLED, NAMES, templates=[LONG] * MANY),
    "a target": lambda: AttackSuccessEvaluator(LABELLED, PATCH, LONG, NAMES),
    "a probe's target": lambda: LinearProbeEvaluator(LABELLED, LABELLED, NAMES, trigger=PATCH, target=NAMES[9]),
    "a caption's target": lambda: RetrievalEvaluator(LABELLED, trigger=PATCH, target=LONG),
    "adversarial classes": lambda: PoisonSuccessEvaluator(LABELLED, NAMES, NAMES),
    "a query's class": lambda: TextQueryEvaluator(LABELLED, str, LONG, NAMES, label_column="label"),
    "a query's trigger": lambda: TextQueryEvaluator(LABELLED, RAISING, NAMES[0]),
    "captions": lambda: RetrievalEvaluator([{"image": None, "caption": [1] * MANY}]),
    "a caption that is none": lambda: decode_row({"image": None, "caption": {LONG: LONG}}, "image", "caption"),
    "half a sign": lambda: decode_row({"image": None, "caption": LONG + "\ud800"}, "image", "caption"),
    "a flag": lambda: decode_row({"image": None, "caption": "a", "poisoned": LONG}, "image", "caption"),
    "an image": lambda: decode_image(LONG),
    "a mode": lambda: PoisonSpec(PATCH, "cat", count=1, mode=LONG),
    "a spec": lambda: poison_dataset(PAIRS, [LONG] * MANY),
    "a word": lambda: PoisonSpec(WordTrigger(" ".join(NAMES[:9])), NAMES[0], count=1, mode="text_query"),
    "a poison's template": lambda: PoisonSpec(PATCH, "cat", count=1, templates=[LONG] * MANY),
    "a label": lambda: poison_dataset(
        datasets.Dataset.from_list([{"image": None, "caption": "a", "label": 0}], features=LABELS),
        PoisonSpec(PATCH, LONG, count=1),
        label_column="label",
    ),
    "a trigger's name": lambda: trigger_from_name(LONG),
    "a trigger's fields": lambda: trigger_from_name("patch", **WIDE),
    "a trigger's settings": lambda: trigger_from_dict(WIDE),
    "a manifest": lambda: replay_manifest(PAIRS, {"version": WIDE}),
    "a manifest's parts": lambda: replay_manifest(PAIRS, {"version": 1, "parts": [LONG] * MANY}),
    "views": lambda: CLIPDataCollator(type("P", (), {"image_processor": 0, "tokenizer": 0})(), views=[LONG] * 2),
    "a record": lambda: RunRecord.from_json("{" + LONG, LONG),
    "figures twice": lambda: run_evaluators(
        [lambda *_: dict(WIDE)] * 2, None, type("E", (), {"model": None, "requests": []})()
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_no_error_is_longer_than_a_message_may_be(what: str):
    with pytest.raises(ValueError) as caught:
        CALLS[what]()
    assert len(str(caught.value)) <= LONGEST
    assert "\n" not in str(caught.value)


def test_skipped_rows_are_counted_whatever_a_record_keeps_of_them():
    skipped = describe_skipped(range(12_345), streamed=True)
    assert skipped is not None and len(skipped.rows) == 1_000
    assert str(skipped).startswith(f"12,345: {listed(range(10))} and 12,335 more")


PACKAGE = Path(hf_robust_clip.__file__).parent
#: What separates the entries of a list.
SEPARATORS = (", ", "; ", " and ", " or ")


def functions(tree: ast.Module) -> Iterator[list[ast.AST]]:
    """The nodes of each function without those of functions within it, and of what is outside of functions."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        nodes, inside = [], list(ast.iter_child_nodes(waiting.pop()))
        while inside:
            node = inside.pop()
            nodes.append(node)
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            (waiting.append if is_function else inside.extend)(node if is_function else ast.iter_child_nodes(node))
        yield nodes


def is_message(node: ast.AST) -> bool:
    """A statement that raises, a call that makes an error, or one that warns."""
    if isinstance(node, ast.Raise):
        return True
    name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
    return name.endswith(("Error", "Exit")) or name in ("warn", "warning", "warning_once", "error")


def is_fixed(node: ast.AST) -> bool:
    """A constant of the package, by its name, or the `repr` of each of its entries."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "map":
        return is_fixed(node.args[1])
    return ast.unparse(node).rpartition(".")[2].lstrip("_").isupper()


def test_no_message_lists_or_shows_by_itself():
    """Lists go through `listed`, values through `shown`, so that there is an end to them."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert [f"{path.relative_to(PACKAGE)}, {found}" for path in files for found in without_an_end(path)] == []


def without_an_end(path: Path) -> list[str]:
    """Where a file lists or shows by itself in a message."""
    found = []
    for nodes in functions(ast.parse(path.read_text(encoding="utf-8"))):
        messages = [node for node in nodes if is_message(node)]
        if not messages:
            continue
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        ended = [node.args[0] for node in calls if ast.unparse(node.func) == "shortened"]
        found += [
            f"line {node.lineno}: {ast.unparse(node)}"
            for node in calls
            if node not in ended
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "join"
            and isinstance(node.func.value, ast.Constant)
            and node.func.value.value in SEPARATORS
            and not is_fixed(node.args[0])
        ]
        found += [
            f"line {node.lineno}: {ast.unparse(node)}"
            for message in messages
            for node in ast.walk(message)
            if isinstance(node, ast.FormattedValue) and node.conversion == ord("r")
        ]
    return sorted(set(found))
