"""The metrics for `evaluate` give the measures, without a network, side by side."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_robust_clip.evaluation import measures
from hf_robust_clip.evaluation.metrics import (
    AccuracyMetric,
    AttackSuccessMetric,
    PoisonSuccessMetric,
    SplitQualityMetric,
)

PREDICTIONS, REFERENCES = [0, 1, 2, 2, 1, 0, 2], [0, 1, 1, 2, 2, 1, 0]


def expected_figures() -> dict[type, dict[str, float]]:
    success = measures.poison_success(PREDICTIONS, REFERENCES)
    return {
        AccuracyMetric: {
            "accuracy": measures.accuracy(PREDICTIONS, REFERENCES),
            "balanced_accuracy": measures.balanced_accuracy(PREDICTIONS, REFERENCES),
        },
        AttackSuccessMetric: {
            "attack_success_rate": measures.attack_success_rate(PREDICTIONS, REFERENCES, 2),
            "triggered_accuracy": measures.triggered_accuracy(PREDICTIONS, REFERENCES, 2),
        },
        PoisonSuccessMetric: {
            "poison_success_rate": success.rate,
            "poison_success_rate_low": success.low,
            "poison_success_rate_high": success.high,
        },
    }


def options(metric: type) -> dict[str, int]:
    return {"target": 2} if metric is AttackSuccessMetric else {}


@pytest.mark.parametrize("metric", [AccuracyMetric, AttackSuccessMetric, PoisonSuccessMetric])
def test_at_once_in_batches_and_one_by_one(metric: type):
    expected = expected_figures()[metric]
    given = options(metric)
    assert metric().compute(predictions=PREDICTIONS, references=REFERENCES, **given) == expected
    module = metric()
    for part in (slice(0, 3), slice(3, 7)):
        module.add_batch(predictions=np.array(PREDICTIONS[part]), references=torch.tensor(REFERENCES[part]))
    assert module.compute(**given) == expected
    # What was computed is gone.
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        module.add(prediction=prediction, reference=reference)
    assert module.compute(**given) == expected
    named = {
        name: [f"class {value}" for value in values]
        for name, values in (("predictions", PREDICTIONS), ("references", REFERENCES))
    }
    assert metric().compute(**named, **{name: f"class {value}" for name, value in given.items()}) == expected


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_split_quality_of_probabilities(threshold: float | None):
    probabilities, poisoned = [0.9, 0.4, 0.5, 0.1, 0.35], [False, True, True, True, False]
    given = {} if threshold is None else {"threshold": threshold}
    found = SplitQualityMetric().compute(predictions=probabilities, references=poisoned, **given)
    safe = [value >= (0.5 if threshold is None else threshold) for value in probabilities]
    assert found == measures.split_quality(safe, poisoned, probabilities)._asdict()


def test_split_quality_of_flags():
    safe, poisoned = [True, True, False, False], [False, True, True, False]
    found = SplitQualityMetric().compute(predictions=safe, references=poisoned)
    assert found == measures.split_quality(safe, poisoned)._asdict()


def test_a_target_of_another_kind_than_the_predictions_is_refused():
    with pytest.raises(ValueError, match="target='2' must be a class as predictions has them, such as 0"):
        AttackSuccessMetric().compute(predictions=PREDICTIONS, references=REFERENCES, target="2")


def test_threads_do_not_get_into_each_others_way():
    def run(number: int) -> float:
        module = AccuracyMetric()
        for batch in range(5):
            module.add_batch(predictions=[number, batch], references=[number, -1])
        return module.compute()["accuracy"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(10))) == [0.5] * 10


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that imports the evaluators, then holds a batch until it is told to compute."""
    names = [path.stem for path in Path(measures.__file__).parent.glob("*.py") if path.stem != "metrics"]
    program = (
        "import sys, importlib\n"
        f"for name in {names}: importlib.import_module('hf_robust_clip.evaluation.' + name)\n"
        "print('evaluate' in sys.modules, flush=True)\n"
        "from hf_robust_clip.evaluation.metrics import AccuracyMetric\n"
        "module = AccuracyMetric()\n"
        "module.add_batch(predictions=[1, 2], references=[1, 1])\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "print(module.compute()['accuracy'], flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_METRICS_CACHE": str(tmp_path / "metrics")},
        cwd=Path(__file__).parents[2],
    )
    yield process
    process.kill()
    process.communicate()


def test_processes_do_not_get_into_each_others_way_and_evaluate_is_imported_late(
    other_process: subprocess.Popen, tmp_path: Path
):
    assert other_process.stdin is not None and other_process.stdout is not None
    assert other_process.stdout.readline() == "False\n"
    module = AccuracyMetric()
    module.add_batch(predictions=[1], references=[1])
    assert other_process.stdout.readline() == "ready\n"
    assert module.compute() == {"accuracy": 1.0, "balanced_accuracy": 1.0}
    other_process.stdin.write("\n")
    other_process.stdin.flush()
    assert other_process.stdout.readline() == "0.5\n"
    assert not (tmp_path / "metrics").exists()


def test_files_serve_those_who_ask_for_them(tmp_path: Path):
    module = AccuracyMetric(keep_in_memory=False, cache_dir=str(tmp_path), experiment_id="mine")
    module.add_batch(predictions=PREDICTIONS, references=REFERENCES)
    assert any(tmp_path.rglob("mine-*.arrow"))
    assert module.compute() == expected_figures()[AccuracyMetric]
