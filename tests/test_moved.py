"""Modules that docs and examples named before they moved: they import for one version more, and warn."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest

import helix_compile
from helix_compile.moved import MOVED

# what the docs and examples of that version took from each
NAMES = {
    "helix_compile.checkpoint_load": ["load_deepseek_v3"],
    "helix_compile.costs": ["predict_costs"],
    "helix_compile.dynamic_cache": ["parts_of_dynamic_cache"],
    "helix_compile.graph_queries": ["critical_path", "is_convex", "reduced_edges", "to_networkx"],
    "helix_compile.handover": ["CacheEntries"],
    "helix_compile.handover_file": ["read_cache", "write_cache"],
    "helix_compile.numerics": ["WidenedIslands"],
    "helix_compile.ops": [],  # files that inspect(out) wrote import it for what it registers
    "helix_compile.options": ["HelixOptions"],
    "helix_compile.passes.check_layouts": ["typing_rule", "whole_on_whole"],
    "helix_compile.passes.fx_edit": ["aten", "calls"],
    "helix_compile.passes.typing_rules": ["elementwise"],
    "helix_compile.verification": ["verify"],
}


@pytest.mark.parametrize("old", MOVED, ids=str)
def test_the_old_name_is_the_module_and_warns(old: str) -> None:
    sys.modules.pop(old, None)
    new = importlib.import_module(MOVED[old])
    spec = new.__spec__
    with pytest.warns(DeprecationWarning, match=f"{old} is {MOVED[old]} now") as told:
        exec(f"import {old}", {})
    assert told[0].filename == "<string>"  # the line that says the old name, not one of importlib's
    assert sys.modules[old] is new and new.__spec__ is spec
    assert all(getattr(new, name) is not None for name in NAMES[old])


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"helix_compile\.coasts"):
        importlib.import_module("helix_compile.coasts")


def test_as_a_user_writes_it() -> None:
    code = (
        "from helix_compile.options import HelixOptions as one\nimport helix_compile.costs as costs\n"
        "from helix_compile import HelixOptions as two\nassert one is two and costs.predict_costs\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("DeprecationWarning: helix_compile.options is helix_compile.config.options now") == 1


def test_nothing_of_ours_uses_an_old_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert all(getattr(helix_compile, name) is not None for name in helix_compile.__all__)
