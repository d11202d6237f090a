"""A refusal is one error, not also pages of torch's log; whoever asked for torch's log gets it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from helix_compile import CaptureError, helix_compile
from helix_compile.capture.checks import raised_not_logged
from tests.support.gqa_models import fresh_gqa


@pytest.fixture
def records() -> Any:
    """What torch's loggers let through, as its own handler on stderr would get it."""
    found: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record)

    handler = Kept()
    loggers = [logging.getLogger(n) for n in ("torch._subclasses.fake_tensor", "torch.export")]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)


class Wider(nn.Module):
    """A layer whose meta fails: it adds a tensor of another width."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.new_zeros(x.shape[-1] + 1)


def refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(b"not a program")
    with pytest.raises(CaptureError, match=r"broken\.pt2 can't be loaded"):
        helix_compile(broken, cp=2)
    model = fresh_gqa()
    model.model.layers[1].mlp = Wider().eval()
    with pytest.raises(CaptureError, match=r"must match the size|broadcast a dimension"):
        helix_compile(model, cp=2)


def test_a_refusal_is_told_once(
    records: list[logging.LogRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    refused(tmp_path)
    assert [r.getMessage() for r in records] == []
    monkeypatch.setenv("TORCH_LOGS", "+dynamo")
    refused(tmp_path)
    assert {r.name for r in records} == {"torch._subclasses.fake_tensor", "torch.export"}


def test_what_is_no_error_of_ours_is_still_logged(records: list[logging.LogRecord]) -> None:
    logger = logging.getLogger("torch.export")

    def elsewhere() -> None:
        logger.warning("of another thread", exc_info=ValueError())

    with raised_not_logged():
        logger.warning("without a traceback")
        logger.warning("dropped", exc_info=ValueError())
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
    logger.warning("afterwards", exc_info=ValueError())
    expected = ["without a traceback", "of another thread", "afterwards"]
    assert [r.getMessage() for r in records] == expected
