"""All three servers on this machine, ended together.

python examples/disaggregated/serve.py examples/disaggregated/serve.yaml
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from serving import Serving, end_with_parent

SERVERS = ("context_server.py", "generation_server.py", "router.py")


def main(arguments: list[str]) -> int:
    """Start them; they end by Ctrl-C or SIGTERM (status 0), or with the router. Without another one the router says what is missing."""
    Serving.read(arguments[0])  # what is wrong with it is said once
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(__file__).parent
    started = {
        name: subprocess.Popen(
            [sys.executable, str(folder / name), *(arguments if name == "router.py" else arguments[:1])],
            start_new_session=True,  # Ctrl-C is ours alone
            preexec_fn=end_with_parent,
        )
        for name in SERVERS
    }
    try:
        running = dict(started)
        while "router.py" in running:
            time.sleep(0.2)
            for name in [name for name, server in running.items() if server.poll() is not None]:
                print(f"{name} ended with status {running.pop(name).returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for server in started.values():
            server.terminate()
        for server in started.values():
            server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
