"""What the commands leave out of what the libraries say, and what they do not."""

import warnings

import pytest
from transformers.utils import logging

from hf_robust_clip.cli.progress import quiet_libraries


def test_what_may_decide_over_a_result_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.get_logger("transformers.trainer")
    handler = logging.get_logger("transformers").handlers[0]
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "emit", lambda record: shown.append(record.getMessage()))
        with quiet_libraries(), pytest.warns(UserWarning, match="missing adapter keys"):
            logger.warning("There were missing keys in the checkpoint model loaded")
            logger.warning("CLIPModel LOAD REPORT from: folder")
            logger.warning("`CLIPImageProcessor` requires torchvision")
            warnings.warn("Found missing adapter keys", stacklevel=1)
    assert shown == ["There were missing keys in the checkpoint model loaded"]
    assert not handler.filters
