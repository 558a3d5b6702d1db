"""Fixtures that several files share: the embedded digits, their processor, and models small enough for a test."""

import gc
import os

# Before anything imports huggingface_hub, which reads it once. Subprocesses of tests inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from support.training import digits as rendered
from support.training import small_model
from transformers import CLIPModel, CLIPProcessor, Trainer

from hf_robust_clip.data.digits import digit_processor

# An iterator over a stream of Parquet files sleeps for so many seconds when it ends, or whenever it is collected.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # of 5
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers with a thread for each core each would only wait for one another.
    torch.set_num_threads(1)


#: Folders and files of tests that train, in this process or in others; elsewhere a test is marked by itself.
TRAINING = (
    *("trainers", "faults", "hub", "benchmarks", "cli/test_train.py", "cli/test_demo.py", "telling/test_pictures.py"),
    *("telling/test_page.py", "test_callbacks.py", "test_docs.py", "test_examples.py", "test_notebook.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that train: `make check` leaves them out. The longest goes first, beside all others."""
    folder = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(folder)
        if path.parts[0] in TRAINING or path.as_posix() in TRAINING:
            item.add_marker(pytest.mark.training)
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture(scope="session", autouse=True)
def no_training_in_the_fast_lane(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `-m "not training"` a test that trains all the same fails, and says what it lacks."""
    with pytest.MonkeyPatch.context() as patch:
        if "not training" in request.config.option.markexpr:
            message = "this test trains: mark it with pytest.mark.training, or name its file in tests/conftest.py"
            patch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail(message))
        yield


@pytest.fixture(scope="module", autouse=True)
def old_garbage() -> None:
    """The Trainer collects garbage before each training, and would look through all that is imported each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def processor() -> CLIPProcessor:
    """Of the digits: 16 x 16 images, captions of at most 16 tokens."""
    return digit_processor()


@pytest.fixture(scope="session")
def digits() -> datasets.Dataset:
    """Every training digit once: `image`, `caption`, `label`, `digit`."""
    return rendered()


@pytest.fixture(scope="session")
def pairs(digits: datasets.Dataset) -> datasets.Dataset:
    """64 training pairs of all ten classes: `image`, `caption`, `label`."""
    return digits.select(range(64)).select_columns(["image", "caption", "label"])


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[int], CLIPModel]:
    """`tiny_model(seed)`: a fresh untrained CLIP that fits `processor`, with two vision layers and one text layer."""
    return partial(small_model, dropout=0.0)
