"""While a model is captured torch logs the traceback of each error that it also raises, once for every caller on the way."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("torch._subclasses.fake_tensor", "torch.export")


@contextmanager
def raised_not_logged() -> Iterator[None]:
    """Drop records with a traceback from torch's fake tensors and torch.export, in this thread, while this is open.

    The error itself is told by what is raised. Whoever set TORCH_LOGS, or made the loggers talk, sees it all.
    """
    thread = threading.get_ident()
    quiet = [] if os.environ.get("TORCH_LOGS") else [logging.getLogger(n) for n in _LOGGERS]
    quiet = [logger for logger in quiet if not logger.isEnabledFor(logging.INFO)]

    def kept(record: logging.LogRecord) -> bool:
        return record.exc_info is None or record.thread != thread

    for logger in quiet:
        logger.addFilter(kept)
    try:
        yield
    finally:
        for logger in quiet:
            logger.removeFilter(kept)
