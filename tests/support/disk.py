"""A disk that is full, by the kernel: a file that grows past a limit is refused (EFBIG; Python ignores SIGXFSZ)."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

REASON = "File too large"


@contextmanager
def full_after(num_bytes: int) -> Iterator[None]:
    """No file that this process writes may grow past `num_bytes` while this is open."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
