"""Our own configuration file: the fields of HelixOptions under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helix_compile.config_section import ConfigSection

ELSEWHERE = {
    name: f"it is no option of a file; give it beside the file, as {name}= or on the command line"
    for name in ("model", "world", "device", "dtype")
}
# what other engines call a field of ours
ALIASES = {
    "context_parallel_size": "cp", "decode_context_parallel_size": "cp", "kvp": "cp", "tensor_parallel_size": "tpa",
    "moe_expert_parallel_size": "ep", "cp_kv_cache_interleave_size": "tokens_per_block", "dcp_comm_backend": "merge",
}  # fmt: skip


def own_fields(
    values: Mapping[str, Any],
    where: str,
    counts: tuple[str, ...],
    choices: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    """The fields that are written, each checked for its type and choices.

    Args:
        counts: names of the fields that are ints >= 1.
        choices: name -> allowed strings.

    Raises:
        PlanError: key path, got, expected.
    """
    section = ConfigSection(values, where)
    for name in counts:
        section.count(name)
    for name, allowed in choices.items():
        section.choice(name, allowed, allowed[0])
    alias = {name: f"write {ours!r}, our name of it" for name, ours in ALIASES.items()}
    section.finish({}, ELSEWHERE | alias)
    return dict(values)
