"""TensorRT-LLM's options as fields of HelixOptions, by its own rules; what it would ignore without a word is an error.

Keys, rules and messages as read in its sources (LLM arguments, CpConfig, Mapping) up to autumn 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helix_compile.config.files import ConfigSection, of_kinds

CP_TYPES = ("ULYSSES", "STAR", "RING", "HELIX")
DEFAULT_TOKENS_PER_BLOCK = 32  # of kv_cache_config

MARKERS = (
    "context_parallel_size",
    "cp_config",
    "kv_cache_config",
    "moe_expert_parallel_size",
    "moe_tensor_parallel_size",
    "moe_cluster_parallel_size",
    "context_servers",
    "generation_servers",
)

# understood, checked for their type, and without effect on what is compiled
WITHOUT_EFFECT = of_kinds(
    {
        "int": "max_num_tokens max_input_len gpus_per_node stream_interval num_postprocess_workers port",
        "str": "model tokenizer backend attn_backend load_format allreduce_strategy guided_decoding_backend "
        "log_level hostname host",
        "bool": "trust_remote_code disable_overlap_scheduler enable_chunked_prefill print_iter_log "
        "enable_iter_perf_stats enable_autotuner",
        "mapping": "cuda_graph_config torch_compile_config scheduler_config moe_config cache_transceiver_config",
        "number": "batching_wait_timeout_ms",
    }
)

CACHE_WITHOUT_EFFECT = of_kinds(
    {
        "number": "free_gpu_memory_fraction",
        "int": "max_tokens host_cache_size event_buffer_max_size max_gpu_total_bytes secondary_offload_min_priority",
        "bool": "enable_block_reuse enable_partial_reuse copy_on_partial_reuse onboard_blocks",
    }
)

_SERVERS = "this is a file of disaggregated serving; give its generation_servers section alone"

REFUSED = {
    "context_servers": _SERVERS,
    "generation_servers": _SERVERS,
    "speculative_config": "drafts belong to the loop that decodes: generate(prompt_lookup_num_tokens=..., assistant_model=...)",
    "sparse_attention_config": "sparse attention is not supported",
    "quant_config": "quantised weights are not supported",
    "lora_config": "LoRA is not supported",
    "enable_lora": "LoRA is not supported",
}

CACHE_REFUSED = {
    "max_attention_window": "sliding windows are not supported",
    "sink_token_length": "attention sinks are not supported",
}


def trtllm_fields(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """(fields of HelixOptions that the options say or imply, paths of keys that have no effect here).

    Raises:
        PlanError: key path, got, expected.
    """
    top = ConfigSection(values, where)
    fields: dict[str, Any] = {"cp": top.count("context_parallel_size"), "tpa": top.count("tensor_parallel_size")}
    top.only("pipeline_parallel_size", 1, "pipeline parallelism is not supported")
    top.only("enable_attention_dp", False, "attention data parallelism is not supported")
    top.only("max_beam_width", 1, "beam search is not supported")
    top.only("dtype", "auto", "give dtype= or --dtype beside the file")
    fields["ep"] = _expert_parallel(top, fields["cp"] * fields["tpa"])
    for name in ("max_batch_size", "max_seq_len"):
        if name in values:
            fields[name] = top.count(name)
    idle: list[str] = []
    stated, tokens_per_block = False, DEFAULT_TOKENS_PER_BLOCK
    if (cache := top.section("kv_cache_config")) is not None:
        stated = "tokens_per_block" in cache.values
        tokens_per_block = cache.count("tokens_per_block", DEFAULT_TOKENS_PER_BLOCK)
        cache.only("dtype", "auto", "the cache has the dtype of the model")
        idle += cache.finish(CACHE_WITHOUT_EFFECT, CACHE_REFUSED)
    helix = top.section("cp_config")
    if helix is not None:
        idle += _check_helix(helix, fields["cp"], tokens_per_block, stated)
    elif fields["cp"] > 1:
        top.refuse(
            "cp_config",
            "got none, expected {cp_type: HELIX, tokens_per_block: N}: CP type must be HELIX for MLA, but got ULYSSES, the default",
        )
    if stated or helix is not None:
        fields["tokens_per_block"] = tokens_per_block
    return fields, idle + top.finish(WITHOUT_EFFECT, REFUSED)


def _check_helix(helix: ConfigSection, cp: int, tokens_per_block: int, stated: bool) -> list[str]:
    """The rules of cp_config; paths of its keys without effect here."""
    given = helix.text("cp_type", "ULYSSES")
    kind = given.upper()
    if kind not in CP_TYPES:
        helix.refuse("cp_type", f"Invalid cp_type: {given}. Must be one of: {', '.join(CP_TYPES)}; expected HELIX")
    if kind != "HELIX":
        default = "" if "cp_type" in helix.values else ", the default"
        helix.refuse("cp_type", f"CP type must be HELIX for MLA, but got {kind}{default}; expected HELIX")
    if cp == 1:
        helix.refuse(
            "cp_type",
            "got HELIX with context_parallel_size 1, expected context_parallel_size >= 2: TensorRT-LLM runs plain tensor parallelism then and does not say so",
        )
    if "tokens_per_block" not in helix.values:
        helix.refuse(
            "tokens_per_block",
            f"got none, expected {tokens_per_block}, as kv_cache_config.tokens_per_block: TensorRT-LLM requires it for HELIX but skips its check where it is missing",
        )
    block = helix.count("tokens_per_block")
    if block != tokens_per_block:
        default = "" if stated else "; the latter is the default, state it"
        helix.refuse(
            "tokens_per_block",
            f"When HELIX parallelism is active, cp_config.tokens_per_block ({block}) must match "
            f"kv_cache_config.tokens_per_block ({tokens_per_block}). got {block}, expected {tokens_per_block}{default}",
        )
    # which wires TensorRT-LLM exchanges over: understood, without effect on the numbers or the plan here
    by_nccl = helix.flag("use_nccl_for_alltoall", True)
    helix.taken.add("fifo_version")
    if "fifo_version" in helix.values:
        version = helix.count("fifo_version")
        if version > 2:
            helix.wrong("fifo_version", "1 or 2: TensorRT-LLM takes anything but 1 for 2 and does not say so")
        if by_nccl:
            said = "true" if "use_nccl_for_alltoall" in helix.values else "true by default"
            helix.refuse(
                "fifo_version",
                f"got {version} where use_nccl_for_alltoall is {said}, expected no fifo_version: TensorRT-LLM ignores it then",
            )
    helix.finish({}, {})
    return [f"cp_config.{k}" for k in ("use_nccl_for_alltoall", "fifo_version") if k in helix.values]


def _expert_parallel(top: ConfigSection, world_size: int) -> int:
    """moe_tp * moe_ep must be the world; what is not stated follows as in TensorRT-LLM's Mapping (ep = 1 by default)."""
    top.only("moe_cluster_parallel_size", 1, "clusters of experts are not supported")
    has_ep, has_tp = (k in top.values for k in ("moe_expert_parallel_size", "moe_tensor_parallel_size"))
    ep, tpf = top.count("moe_expert_parallel_size"), top.count("moe_tensor_parallel_size")
    if not has_tp:
        tpf = world_size // ep
    elif not has_ep:
        ep = world_size // tpf
    if ep * tpf != world_size:
        key = "moe_expert_parallel_size" if has_ep else "moe_tensor_parallel_size"
        top.refuse(
            key,
            f"moe_tp_size * moe_ep_size * moe_cluster_size must equal to moe_world_size, but got {tpf} * {ep} * 1 != "
            f"{world_size}; expected factors of tensor_parallel_size * context_parallel_size",
        )
    return ep
