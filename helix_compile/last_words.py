"""What this process says before SIGTERM ends it, also while its main thread waits inside C++ and runs no Python.

torchrun ends survivors about 0.1 s after a death. A rank that hangs in gloo can't run a signal handler; but Python's own C
handler writes to a pipe at once, and a thread reads it, speaks and ends the process, as SIGTERM would have.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

EXIT_STATUS = 128 + signal.SIGTERM
PATIENCE_S = 2.0  # for a store that does not answer any more; torchrun sends SIGKILL after 30


def before_sigterm(speak: Callable[[], None]) -> bool:
    """Call `speak` when SIGTERM comes, then end. False where somebody else handles SIGTERM or wakes up by signals.

    Call it in the main thread; the first caller in a process has it.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return False
    hear, wake = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        os.close(hear)
        os.close(wake)
        return False

    def listen() -> None:
        while signal.SIGTERM not in os.read(hear, 64):
            pass
        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(PATIENCE_S)
        os._exit(EXIT_STATUS)

    def handle(number: int, frame: Any) -> None:
        threading.Event().wait()  # the thread ends this process

    threading.Thread(target=listen, daemon=True, name="helix last words").start()
    signal.signal(signal.SIGTERM, handle)
    return True
