"""vLLM's options as fields of HelixOptions, by its own rules; what it would ignore without a word is an error.

Keys may have dashes (as in vLLM's own YAML files and on its command line) or underscores. In vLLM decode context
parallelism reuses the ranks of tensor parallelism: tensor_parallel_size is all N ranks of a stage and a replica, so
tpa = tensor_parallel_size / decode_context_parallel_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helix_compile.config.command import as_mapping
from helix_compile.config.files import NOTHING, ConfigSection
from helix_compile.config.keys_vllm import OF_FP8_CACHE, VLLM
from helix_compile.config.recipe import (
    ConfigFields,
    Recipe,
    add_stages,
    check_cache_dtype,
    check_cache_scales,
    check_environment,
    read_dtype,
    replica_note,
    without_nulls,
)

_FITS_MEMORY = ("auto", -1, "-1")


def vllm_fields(
    values: Mapping[str, Any], where: str, lenient: bool = False, environment: Mapping[str, str] | None = None
) -> ConfigFields:
    """What the options, keys underscored, say or imply.

    Raises:
        PlanError: key path, got, expected.
    """
    environment = environment or {}
    values, idle = without_nulls(
        values, {**VLLM.without_effect, **VLLM.graphs, **VLLM.refused, **VLLM.beside}, VLLM.nullable
    )
    top = ConfigSection(values, where, lenient=lenient)
    top.check_names(VLLM.kinds)
    if values.get("dcp_kv_cache_interleave_size") == 1:  # renamed, and its default
        top.kind("dcp_kv_cache_interleave_size", "int")
        idle.append("dcp_kv_cache_interleave_size")
    ranks, cp = top.count("tensor_parallel_size"), top.count("decode_context_parallel_size")
    if ranks % cp:
        top.refuse(
            "decode_context_parallel_size",
            f"got {cp} with tensor_parallel_size {ranks}, expected a divisor of it: vLLM reuses the ranks of tensor parallelism",
        )
    top.only("prefill_context_parallel_size", 1, "context parallelism of the prefill is not supported")
    fields: dict[str, Any] = {"cp": cp, "tpa": ranks // cp}
    by_experts = top.flag("enable_expert_parallel")
    fields["ep"] = ranks if by_experts else 1
    replicas = top.count("data_parallel_size")
    if replicas > 1:
        engine = f"of {replicas * ranks}, as the engine has it"
        laid = (
            f"its experts lie over these ranks in place {engine}"
            if by_experts
            else f"experts are cut over these ranks in place {engine}"
        )
        top.notes.append(replica_note("data_parallel_size", replicas, ranks, laid))
    add_stages(fields, top.count("pipeline_parallel_size"), "middle")
    interleave = top.count("cp_kv_cache_interleave_size")
    merge = top.choice("dcp_comm_backend", ("ag_rs", "a2a"), "ag_rs")
    if cp == 1:
        for key, differs in (("cp_kv_cache_interleave_size", interleave != 1), ("dcp_comm_backend", merge != "ag_rs")):
            if differs:
                top.wrong(key, "no such key at decode_context_parallel_size 1, where it has no effect")
    else:
        fields |= {"tokens_per_block": interleave, "merge": merge}
        if "block_size" in values and top.count("block_size") % interleave:
            top.wrong("block_size", f"a multiple of cp_kv_cache_interleave_size ({interleave})")
    if cp > 1:
        _unsaid(top, fields)
    if "block_size" in values:
        top.taken.add("block_size")
        top.kind("block_size", "int")
        idle.append("block_size")
    _query(top, fields, environment)
    idle += _graphs(top, fields)
    for theirs, ours in (("max_num_seqs", "max_batch_size"), ("max_model_len", "max_seq_len")):
        top.taken.add(theirs)
        if theirs == "max_model_len" and values.get(theirs) in _FITS_MEMORY:
            idle.append(theirs)
        elif theirs in values:
            fields[ours] = top.count(theirs)
    dtype = read_dtype(top)
    cache_dtype = check_cache_dtype(top, "kv_cache_dtype", fields)
    _partition(top, environment)
    if values.get("additional_config", "") not in NOTHING:
        top.notes.append("additional_config has keys of a plug-in's own: what they change is not planned")
    check_cache_scales(top, OF_FP8_CACHE, fields)
    idle += top.finish(VLLM.without_effect, VLLM.refused, VLLM.beside, VLLM.changing)
    idle += check_environment(top, VLLM, environment, _ENVIRONMENT)
    return ConfigFields("vLLM", fields, tuple(idle), Recipe(top.said(), cache_dtype, dtype), where)


_ENVIRONMENT = ("VLLM_DCP_Q_REPLICATE", "VLLM_PP_LAYER_PARTITION")


def _unsaid(top: ConfigSection, fields: dict[str, Any]) -> None:
    """What vLLM decides by itself where a recipe does not say how tokens are dealt and partial results exchanged."""
    if "dcp_comm_backend" not in top.values:
        top.notes.append(
            "dcp_comm_backend is not said: planned with ag_rs, which vLLM takes unless the model asks for another"
        )
    transfer = str(top.values.get("kv_transfer_config", ""))
    if "NixlConnector" in transfer and "cp_kv_cache_interleave_size" not in top.values:
        why = "kv_transfer_config names NixlConnector, and cp_kv_cache_interleave_size is not said: vLLM takes its block size then"
        if "block_size" in top.values:
            fields["tokens_per_block"] = top.count("block_size")
            top.notes.append(why)
        else:
            top.notes.append(f"{why}, which is not said either: planned with 1")


def _query(top: ConfigSection, fields: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Where queries are projected: a flag says it, or an environment variable; else the model does."""
    stated = "dcp_q_replicate" in top.values
    replicated = top.flag("dcp_q_replicate")
    if (variable := environment.get("VLLM_DCP_Q_REPLICATE")) is not None:
        if variable not in ("0", "1"):
            top.refuse("VLLM_DCP_Q_REPLICATE", f"got {variable!r}, expected 0 or 1")
        stated, replicated = True, variable == "1"
    if fields["cp"] == 1:
        if replicated:
            top.refuse("dcp_q_replicate", "got True at decode_context_parallel_size 1, where it has no effect")
    elif stated:
        fields["q_proj"] = "replicate" if replicated else "gather"
    else:
        top.notes.append(
            "dcp_q_replicate is not said, and then the model decides in vLLM whether queries are gathered: planned "
            "with q_proj=replicate"
        )


def _graphs(top: ConfigSection, fields: dict[str, Any]) -> list[str]:
    """Whether steps are recorded: enforce_eager decides, then cudagraph_mode, then a level of optimisation, whose 0 has no graphs.

    Returns:
        Keys that say nothing of it.
    """
    stated = "enforce_eager" in top.values
    if top.flag("enforce_eager"):
        fields["cuda_graphs"] = False
    elif stated:
        fields["cuda_graphs"] = True
    given = {key: top.values[key] for key in ("optimization_level", "compilation_config") if key in top.values}
    top.taken |= given.keys()
    config = as_mapping(given.get("compilation_config"))
    said: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    mode = said.get("cudagraph_mode", said.get("use_cudagraph"))  # the second is that of older versions
    decides = "compilation_config" if mode is not None else ""
    if not decides:  # -O0, which older versions keep as the whole configuration
        decides = next((key for key, value in given.items() if str(value) in ("0", "O0")), "")
    if decides and fields.get("cuda_graphs") is not False:
        fields["cuda_graphs"] = mode is not None and str(mode).rpartition(".")[2].lower() not in ("none", "0", "false")
    return [key for key in given if key != decides]


def _partition(top: ConfigSection, environment: Mapping[str, str]) -> None:
    if environment.get("VLLM_PP_LAYER_PARTITION"):
        top.refuse(
            "VLLM_PP_LAYER_PARTITION",
            f"got {environment['VLLM_PP_LAYER_PARTITION']!r}, expected no such variable: stages of stated sizes are not "
            "planned, those that vLLM makes by itself are",
        )
