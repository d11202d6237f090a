"""SGLang's options as fields of HelixOptions, by its own rules; what it would ignore without a word is an error.

tp_size is all ranks of a pipeline stage; with data-parallel attention they are dp_size replicas (attn_dp_size in newer versions). Decode context
parallelism reuses the ranks of a replica, and deals single tokens: token t lies on rank t % dcp_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helix_compile.config.command import as_mapping
from helix_compile.config.files import ConfigSection
from helix_compile.config.keys_sglang import OF_FP8_CACHE, SGLANG
from helix_compile.config.recipe import (
    ConfigFields,
    Recipe,
    add_stages,
    check_cache_dtype,
    check_cache_scales,
    check_environment,
    experts_of_replica,
    read_dtype,
    replica_note,
    without_nulls,
)


def sglang_fields(
    values: Mapping[str, Any], where: str, lenient: bool = False, environment: Mapping[str, str] | None = None
) -> ConfigFields:
    """What the options, keys underscored and by their first names, say or imply.

    Raises:
        PlanError: key path, got, expected.
    """
    environment = environment or {}
    values, idle = without_nulls(
        values, {**SGLANG.without_effect, **SGLANG.graphs, **SGLANG.refused, **SGLANG.beside}, SGLANG.nullable
    )
    top = ConfigSection(values, where, lenient=lenient)
    top.check_names(SGLANG.kinds)
    for key in ("attn_cp_size", "moe_dp_size", "dwdp_size"):
        top.only(key, 1, "this split is not supported; decode context parallelism is dcp_size")
    if top.choice("disaggregation_mode", ("null", "decode", "prefill"), "null") == "prefill":
        top.wrong("disaggregation_mode", "'decode' or 'null': a plan is of decoding; give the decode server's recipe")
    all_ranks, cp = top.count("tp_size"), top.count("dcp_size")
    replicas, shared, key = _replicas(top)
    if shared and all_ranks % replicas:
        why = "enable_dp_attention" if key == "dp_size" else "they are attention's replicas"
        top.refuse(key, f"got {replicas} with tp_size {all_ranks}, expected a divisor of it: {why}")
    ranks = all_ranks // replicas if shared else all_ranks
    if ranks % cp:
        of = f"tp_size / {key}" if shared else "tp_size"
        top.refuse(
            "dcp_size",
            f"got {cp} with {of} {ranks}, expected a divisor of it: SGLang reuses the ranks of attention's tensor parallelism",
        )
    fields: dict[str, Any] = {"cp": cp, "tpa": ranks // cp}
    ep = _expert_parallel(top, all_ranks)
    fields["ep"] = experts_of_replica(ep, ranks)
    _check_dense(top, ranks)
    if replicas > 1:
        laid = (
            f"experts lie over ep={fields['ep']} of these ranks, in the engine over ep={ep} of all {all_ranks}"
            if shared
            else "the others are whole servers of their own"
        )
        top.notes.append(replica_note(key, replicas, ranks, laid))
    add_stages(fields, top.count("pp_size"), "last")
    _exchange(top, fields)
    idle += _graphs(top, fields)
    for theirs, ours in (("max_running_requests", "max_batch_size"), ("context_length", "max_seq_len")):
        if theirs in values:
            fields[ours] = top.count(theirs)
        top.taken.add(theirs)
    if shared and "max_batch_size" in fields:
        fields["max_batch_size"] = max(1, fields["max_batch_size"] // replicas)
    dtype = read_dtype(top)
    cache_dtype = check_cache_dtype(top, "kv_cache_dtype", fields)
    if environment.get("SGLANG_PP_LAYER_PARTITION"):
        top.refuse(
            "SGLANG_PP_LAYER_PARTITION",
            f"got {environment['SGLANG_PP_LAYER_PARTITION']!r}, expected no such variable: stages of stated sizes are not "
            "planned, those that SGLang makes by itself are",
        )
    check_cache_scales(top, OF_FP8_CACHE, fields)
    idle += top.finish(SGLANG.without_effect, SGLANG.refused, SGLANG.beside, SGLANG.changing)
    idle += check_environment(top, SGLANG, environment, ("SGLANG_PP_LAYER_PARTITION",))
    return ConfigFields("SGLang", fields, tuple(idle), Recipe(top.said(), cache_dtype, dtype), where)


def _replicas(top: ConfigSection) -> tuple[int, bool, str]:
    """(replicas of attention or of the whole model, do they share the ranks of tp_size, the key that says so)."""
    servers, attention = top.count("dp_size"), top.count("attn_dp_size")
    shared = top.flag("enable_dp_attention")
    if servers > 1 and attention > 1:
        top.wrong("attn_dp_size", f"no such key with dp_size {servers}: SGLang takes one of the two")
    if attention > 1:
        return attention, True, "attn_dp_size"
    return servers, shared, "dp_size"


def _expert_parallel(top: ConfigSection, ranks: int) -> int:
    """ep_size; where experts are exchanged all-to-all, SGLang makes it tp_size whatever is said."""
    ep = top.count("ep_size")
    backend = top.text("moe_a2a_backend", "none")
    old = [key for key in ("enable_ep_moe", "enable_deepep_moe") if top.flag(key)]
    if backend in ("none", "ascend_tp") and not old:
        return ep
    if "ep_size" in top.values and ep != ranks:
        cause = f"moe_a2a_backend={backend}" if backend != "none" else old[0]
        top.notes.append(f"ep_size={ep}: SGLang makes it tp_size, {ranks}, with {cause}")
    return ranks


def _check_dense(top: ConfigSection, ranks: int) -> None:
    top.taken.add("moe_dense_tp_size")
    if top.values.get("moe_dense_tp_size", ranks) != ranks:
        top.wrong("moe_dense_tp_size", f"{ranks}, or no such key: dense FFNs are cut over all ranks of a replica")


def _graphs(top: ConfigSection, fields: dict[str, Any]) -> list[str]:
    """Whether steps of decoding are recorded: what is said last in this order holds. Returns keys that say nothing of it."""
    if any([top.flag("disable_cuda_graph"), top.flag("disable_decode_cuda_graph")]):
        fields["cuda_graphs"] = False
    elif {"disable_cuda_graph", "disable_decode_cuda_graph"} & top.values.keys():
        fields["cuda_graphs"] = True
    config = as_mapping(top.values.get("cuda_graph_config"))
    top.taken.add("cuda_graph_config")
    idle = [key for key in ("cuda_graph_config",) if key in top.values]
    phase = config.get("decode") if isinstance(config, Mapping) else None
    backend = phase.get("backend") if isinstance(phase, Mapping) else None
    flagged = top.text("cuda_graph_backend_decode", "")
    if said := backend or flagged:
        fields["cuda_graphs"] = said != "disabled"
    return [] if backend else idle


def _exchange(top: ConfigSection, fields: dict[str, Any]) -> None:
    """The exchange and the projection of queries; without decode context parallelism there is neither."""
    merge = top.choice("dcp_comm_backend", ("ag_rs", "a2a", "fi_a2a"), "ag_rs")
    stated = "dcp_replicate_q_proj" in top.values
    replicated = top.flag("dcp_replicate_q_proj")
    if fields["cp"] == 1:
        for key, differs in (("dcp_comm_backend", merge != "ag_rs"), ("dcp_replicate_q_proj", replicated)):
            if differs:
                top.wrong(key, "no such key at dcp_size 1, where it has no effect")
        return
    if replicated and merge == "ag_rs":
        top.wrong("dcp_replicate_q_proj", "no such key with dcp_comm_backend ag_rs, where SGLang gathers queries")
    if "dcp_comm_backend" not in top.values:
        top.notes.append(
            "dcp_comm_backend is not said: planned with ag_rs, SGLang's default; newer versions (0.5.23) take a2a on a card"
        )
    fields |= {"tokens_per_block": 1, "merge": "ag_rs" if merge == "ag_rs" else "a2a"}
    if merge == "fi_a2a":
        top.notes.append("dcp_comm_backend=fi_a2a: the same exchange as a2a, over FlashInfer's transport")
    if stated or merge == "ag_rs":
        fields["q_proj"] = "replicate" if replicated else "gather"
    else:
        top.notes.append(
            "dcp_replicate_q_proj is not said, and then the model decides in SGLang whether queries are gathered: planned "
            "with q_proj=replicate"
        )
