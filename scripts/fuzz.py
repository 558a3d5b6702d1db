"""
Feed the readers of manifests, of YAML settings and of studies what nobody would write, for as long as one likes:
`python scripts/fuzz.py [TARGET ...] [--minutes N]`, by default each of them for ten minutes.

A reader may refuse with a `ValueError` that has a message, or on the command line with exit code 2, and with nothing
else. atheris looks for inputs that reach new lines; what it finds is kept in `fuzz/TARGET`, and an input that breaks a
reader is written to the folder where the command is run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

#: What entries of a manifest are replaced with.
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -1.5, 1e300, float("nan"), float("inf")),
    *("", " ", "image", "patch", "targeted", "text_query", "\ud800", "../x", "a" * 5000, "{}"),
    *([], [None], [0], [0, 0], [-1], [1e9], ["a"], [[]], {}, {"name": "patch"}, {"name": "warp", "grid": 3}),
    *({"": None}, {"image": "caption", "caption": "image"}, {"dataset_length": 6}),
    *({"image": "image", "caption": "image"}, {"name": "warp", "grid": 10**5}),
)
#: Values of YAML that do not fit the type before them, on which PyYAML itself trips.
MISFITS = (
    *("!!bool maybe", "!!int ''", '!!int "_"', '!!int "-"', "!!float ''", "!!timestamp x", "!!binary é", "!!set [1]"),
    *("!!omap {a: 1}", "!!pairs [1]", "!!map [1]", "!!str [1]", "!!null x", "!!int '0x'"),
)
#: What a file of settings may look like, to start from.
SETTINGS = (
    "data: a\noutput_dir: b\ntarget: cat\nrate: 1e-3\ncount: 3\ntemplate: [a, b]\nseed: 0\noverwrite: true\n",
    "x: &a [1, 2]\ny: *a\n",
    "a: 2001-99-99\nb: !!binary x\nc: 0x1f\nd: .nan\n? [a]\n: b\n<<: {c: 1}\n",
    "trigger: patch:size=3,place=random\nmode: backdoor\nimage_size: 16\n",
    "".join(f"a{number}: {value}\n" for number, value in enumerate(MISFITS)),
)
STUDY = (
    "name: a\ntarget: six\nattacks: {b: {trigger: {name: patch}, rate: 0.1}}\narguments: {all: {learning_rate: 1}}\n"
    "search: {attack: {rate: 0.2}, seeds: [5], learning_rates: {finetuning: [1e-4]}}\nseeds: [0]\nrows: [undefended]\n"
)


def replay(data: bytes) -> None:
    """Carry out a manifest that is a real one but for some entries, which the bytes name: two a change."""
    from hf_robust_clip import replay_manifest

    dataset, stream, manifests = _manifests()
    manifest = copy.deepcopy(manifests[data[0] % len(manifests)]) if data else {}
    for place, what in zip(data[1:9:2], data[2:9:2], strict=False):
        _replace(manifest, place, what)
    text = json.dumps(manifest)
    _refuse_or_do(lambda: _read(replay_manifest(dataset, json.loads(text))))
    _refuse_or_do(lambda: _read(replay_manifest(stream, json.loads(text))))


def settings(data: bytes) -> None:
    """Read a `--config` file: of `poison`, or one in eight of `train`, whose parser takes longer to make."""
    command = ["poison"] if len(data) % 8 else ["train", "cleanclip"]
    said = io.StringIO()
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(data)
        try:
            with redirect_stderr(said):
                args = _parser().parse_args([*command, "--config", file.name])
                args.parser.dump(args)
        except SystemExit as end:
            if end.code != 2 or "error: " not in said.getvalue():
                raise AssertionError(f"exit {end.code}: {said.getvalue()!r}") from end


def study(data: bytes) -> None:
    """Read the description of a study of the benchmarks."""
    from bench.study import load_study

    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(data)
        _refuse_or_do(lambda: load_study(file.name))


TARGETS: dict[str, Callable[[bytes], None]] = {"manifest": replay, "settings": settings, "study": study}


def seeds(target: str) -> Iterator[bytes]:
    """Inputs to start from."""
    if target == "manifest":
        yield from (bytes([number, 1, 1]) for number in range(len(_manifests()[2])))
    elif target == "settings":
        yield from (text.encode() for text in SETTINGS)
    else:
        yield STUDY.encode()


@functools.cache
def _manifests() -> tuple[Any, Any, list[dict[str, Any]]]:
    """Six pairs, the same as a stream, and a manifest of each kind on them."""
    import datasets
    from PIL import Image

    from hf_robust_clip import PatchTrigger, PoisonSpec, WordTrigger, poison_dataset, poison_stream

    datasets.disable_progress_bars()
    image = Image.new("RGB", (8, 8), (90, 60, 30))
    content = {"image": [image] * 6, "caption": [f"a {name} {i}" for i, name in enumerate(("cat", "dog") * 3)]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(content, features=features)
    stream = dataset.to_iterable_dataset()
    patch = PatchTrigger(size=2)
    specs = [
        PoisonSpec(patch, "cat", count=2, image_size=8),
        PoisonSpec(patch, "cat", count=2, mode="label_consistent"),
        PoisonSpec(None, "cat", count=2, mode="targeted", source_index=1),
        PoisonSpec(WordTrigger(), "cat", count=2, mode="text_query"),
    ]
    made = [poison_dataset(dataset, spec)[1] for spec in [*specs, specs[:2]]]
    for given in (
        PoisonSpec(patch, "cat", rate=0.5),
        PoisonSpec(patch, "cat", rate=0.5, mode="label_consistent"),
        PoisonSpec(None, "cat", rate=0.5, mode="targeted", target_image=image, templates=["a {}"]),
        PoisonSpec(WordTrigger(), "cat", rate=0.5, mode="text_query", templates=["a thing"]),
    ):
        made.append(poison_stream(stream, given)[1])
    return dataset, stream, [json.loads(json.dumps(manifest)) for manifest in made]


def _replace(manifest: dict[str, Any], place: int, what: int) -> None:
    """Put something odd in the place of an entry, or take the entry out."""
    places = [(manifest, key) for key in manifest]
    places += [(value, key) for value in manifest.values() if isinstance(value, dict) for key in value]
    for parts in [manifest.get("parts")]:
        for part in parts if isinstance(parts, list) else []:
            places += [(part, key) for key in part] if isinstance(part, dict) else []
    if not places:
        return
    holder, key = places[place % len(places)]
    if what >= len(ODD):
        del holder[key]
    else:
        holder[key] = copy.deepcopy(ODD[what])


def _read(rows: Any) -> None:
    for _ in zip(range(8), rows, strict=False):
        pass


def _refuse_or_do(read: Callable[[], Any]) -> None:
    try:
        read()
    except ValueError as error:
        if not str(error):
            raise AssertionError(f"a {type(error).__name__} without a message") from error


@functools.cache
def _parser() -> Any:
    from hf_robust_clip.cli.main import build_parser

    return build_parser()


def main() -> None:
    """Run the targets that were asked for, each in a process of its own, as atheris never returns."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of manifests, settings and studies.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each (default: %(default)s)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    for target in args.targets or TARGETS:
        if args.here:
            _fuzz(target, args.minutes)
        command = [sys.executable, __file__, target, "--minutes", str(args.minutes), "--here"]
        done = subprocess.run(command, check=False)  # nosec B603 # this very script
        if done.returncode:
            sys.exit(f"{target}: a reader failed, as shown above")


def _fuzz(target: str, minutes: float) -> None:
    import atheris

    # Before they are imported, or they would be none of those that are followed.
    with atheris.instrument_imports(include=["hf_robust_clip", "bench", "yaml"]):
        import bench.study  # noqa: F401
        import yaml  # noqa: F401

        import hf_robust_clip.attacks.poisoning
        import hf_robust_clip.attacks.streaming
        import hf_robust_clip.cli.main
        import hf_robust_clip.settings  # noqa: F401
    corpus = ROOT / "fuzz" / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed-{number}").write_bytes(seed)
    TARGETS[target](bytes(8))  # or what is imported late would count against the time limit of one input
    options = [f"-max_total_time={round(60 * minutes)}", "-max_len=2000", "-print_final_stats=1", "-timeout=20"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
