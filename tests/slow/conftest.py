"""`make test-slow` installs lm-evaluation-harness, half a gigabyte with what it needs; CI, which runs nothing of this folder, does not."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["test_harness.py"]
