"""What trainers push is whole, loads as it was and holds no token; what cannot be pushed is said without the token."""

from __future__ import annotations

from pathlib import Path

from support import pushing
from support.stand_in import BAD_TOKEN, READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, HubStandIn, run_script
from support.training import ARGUMENTS

from hf_robust_clip.trainers.trainer import STATE_FILE

SCRIPT = Path(pushing.__file__)
#: Everything that the libraries have to say.
VERBOSE = {"TRANSFORMERS_VERBOSITY": "debug", "HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}
#: What a model needs to be loaded, with its processor.
MODEL = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
#: What training needs to go on.
TRAINING = {STATE_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def assert_no_token(hub: HubStandIn, folder: Path, output: str) -> None:
    """None in any repository, in any file that the process left, or in what it printed."""
    saved = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    everything = [*hub.contents(), *saved, output.encode()]
    assert saved and all(any(b"hub_token" in part for part in group) for group in (hub.contents(), saved))
    for token in (WRITE_TOKEN, READ_TOKEN, STRANGER_TOKEN, BAD_TOKEN):
        assert not any(token.encode() in part for part in everything)


def test_every_strategy_pushes_what_it_is_for(tmp_path: Path) -> None:
    with HubStandIn() as hub:
        scenarios = ("pushes", "adapters")
        output = run_script(hub, SCRIPT, tmp_path / "out", *scenarios, home=tmp_path / "home", token=None, **VERBOSE)
    assert "during training failed" not in output
    assert_adapters(hub)
    pushed = {
        "by-hand": set(),
        "end": set(),
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
    }
    for cls in ARGUMENTS:
        trainer, ways = cls.__name__, ("by-hand", "checkpoint", *pushing.STRATEGIES[cls])
        for way in ways:
            checkpoints = pushed[way]
            files = set(hub.files(f"tester/{trainer}-{way}"))
            assert files >= MODEL | {"training_args.bin"}
            assert ("README.md" in files) == (way in ("by-hand", "end"))
            assert {path.partition("/")[0] for path in files if "checkpoint" in path} == checkpoints
            for checkpoint in checkpoints:
                assert files >= {f"{checkpoint}/{name}" for name in MODEL | TRAINING}
            assert checkpoints or not any(path.endswith(STATE_FILE) for path in files)
        assert hub.repositories[f"tester/{trainer}-by-hand"].private
        for way, steps in (("every_save", (1, 2)), ("all_checkpoints", (1, 2)), ("checkpoint", (3, 6))):
            if way not in ways:
                continue
            repository = hub.repositories[f"tester/{trainer}-{way}"]
            titles = [commit.title for commit in repository.commits()]
            for step in steps:
                # What was pushed then, although training went on and saved again.
                commit = repository.commits()[titles.index(f"Training in progress, step {step}")]
                saved = tmp_path / "out" / f"{trainer}-{way}" / f"checkpoint-{step}" / "model.safetensors"
                assert commit.files["model.safetensors"].content == saved.read_bytes()
    assert_no_token(hub, tmp_path / "out", output)


def assert_adapters(hub: HubStandIn) -> None:
    """Adapters are pushed alone or merged."""
    alone, merged = (set(hub.files(f"tester/{name}")) for name in ("adapters", "merged"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= alone and "model.safetensors" not in alone
    assert {"config.json", "model.safetensors"} <= merged and not any("adapter" in path for path in merged)
    cards = [hub.files(f"tester/{name}")["README.md"].decode() for name in ("adapters", "merged")]
    assert all("base_model: tester/base" in card for card in cards)
    assert ["base_model_relation: adapter" in card for card in cards] == [True, False]


def test_what_goes_wrong_is_said_and_can_be_mended(tmp_path: Path) -> None:
    with HubStandIn() as hub:
        hub.traffic.fail("PUT", "/tester/broken/upload/.*", None)
        hub.traffic.fail("PUT", "/tester/refused/upload/.*", 403)
        hub.traffic.fail("POST", "/api/models/tester/first-fails/commit/main", 500)
        hub.traffic.fail("POST", "/api/models/tester/last-fails/commit/main", 500, nth=2)
        hub.create("tester/existing")
        hub.create("tester/gated", gated=True)
        scenarios = ("interruptions", "refusals")
        output = run_script(hub, SCRIPT, tmp_path / "out", *scenarios, home=tmp_path / "home", token=None, **VERBOSE)
    broken = [path for _, path, status in hub.traffic.requests if status == 0]
    assert len(broken) == 1, "one connection broke"
    assert hub.traffic.requests.count(("PUT", broken[0], 200)) == 1, "and its file was sent again"
    for name in ("broken", "refused"):
        for path in MODEL:
            assert hub.files(f"tester/{name}")[path] == (tmp_path / "out" / name / path).read_bytes()
        assert len(hub.repositories[f"tester/{name}"].commits()) == 2, "nothing came to be in between"
    for name in ("first-fails", "last-fails"):
        assert output.count(f"A push to tester/{name} during training failed.") == 1
    assert set(hub.files("tester/existing")) == {".gitattributes"} and "tester/new" not in hub.repositories
    assert "A push to tester/existing during training failed." in output
    assert 'You don\'t have the rights to write under the namespace "tester"' in output
    assert_no_token(hub, tmp_path / "out", output)
