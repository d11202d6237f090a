"""What a configuration file says, whoever wrote it; config/reading.py finds out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helix_compile.config.options import OWN_NAMES, own_fields
from helix_compile.config.reading import read_recipe
from helix_compile.config.recipe import ConfigFields


def fields_of_file(source: Mapping[str, Any] | str | Path, lenient: bool = False) -> ConfigFields:
    """Read a TOML, YAML, JSON or text file, or the text of a command, of any dialect.

    Raises:
        PlanError: a file that can't be read, keys of several dialects, or what the dialect's own reader refuses.
    """
    return read_recipe(source, own_fields, OWN_NAMES, lenient=lenient)
