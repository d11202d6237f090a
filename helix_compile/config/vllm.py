"""vLLM's options as fields of HelixOptions, by its own rules; what it would ignore without a word is an error.

Keys may have dashes (as in vLLM's own YAML files) or underscores. In vLLM decode context parallelism reuses the ranks
of tensor parallelism: tensor_parallel_size is all N ranks, so tpa = tensor_parallel_size / decode_context_parallel_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helix_compile.config.files import ConfigSection, of_kinds
from helix_compile.errors import PlanError

MARKERS = (
    "decode_context_parallel_size",
    "cp_kv_cache_interleave_size",
    "dcp_comm_backend",
    "dcp_kv_cache_interleave_size",
    "prefill_context_parallel_size",
    "enable_expert_parallel",
)

# understood, checked for their type, and without effect on what is compiled
WITHOUT_EFFECT = of_kinds(
    {
        "str": "model tokenizer revision download_dir load_format host api_key distributed_executor_backend "
        "attention_backend all2all_backend uvicorn_log_level",
        "str or list": "served_model_name",
        "bool": "trust_remote_code enable_chunked_prefill enable_prefix_caching enforce_eager async_scheduling "
        "disable_log_stats disable_log_requests",
        "int": "port max_num_batched_tokens block_size",
        "number": "gpu_memory_utilization",
        "str or mapping": "compilation_config kv_transfer_config",
    }
)

REFUSED = {
    "dcp_kv_cache_interleave_size": "vLLM renamed it; write cp_kv_cache_interleave_size",
    "speculative_config": "drafts belong to the loop that decodes: generate(prompt_lookup_num_tokens=..., assistant_model=...)",
    "quantization": "quantised weights are not supported",
    "enable_lora": "LoRA is not supported",
    "hf_overrides": "give a checkpoint folder whose config.json says it",
}


def underscored(values: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """The mapping with "-" in keys as "_"; PlanError where both spellings are there."""
    result: dict[Any, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name in result:
            raise PlanError(f"{where}: {name}: got it with dashes and with underscores, expected it once")
        result[name] = value
    return result


def vllm_fields(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """(fields of HelixOptions that the options say or imply, paths of keys that have no effect here).

    Raises:
        PlanError: key path, got, expected.
    """
    top = ConfigSection(underscored(values, where), where)
    ranks, cp = top.count("tensor_parallel_size"), top.count("decode_context_parallel_size")
    if ranks % cp:
        top.refuse(
            "decode_context_parallel_size",
            f"got {cp} with tensor_parallel_size {ranks}, expected a divisor of it: in vLLM these are the same ranks",
        )
    for name in ("pipeline", "data", "prefill_context"):
        top.only(f"{name}_parallel_size", 1, f"{name.replace('_', ' ')} parallelism is not supported")
    top.only("kv_cache_dtype", "auto", "the cache has the dtype of the model")
    top.only("dtype", "auto", "give dtype= or --dtype beside the file")
    fields: dict[str, Any] = {"cp": cp, "tpa": ranks // cp}
    fields["ep"] = ranks if top.flag("enable_expert_parallel") else 1
    interleave = top.count("cp_kv_cache_interleave_size")
    merge = top.choice("dcp_comm_backend", ("ag_rs", "a2a"), "ag_rs")
    if cp == 1:
        for key, differs in (("cp_kv_cache_interleave_size", interleave != 1), ("dcp_comm_backend", merge != "ag_rs")):
            if differs:
                top.wrong(key, "no such key at decode_context_parallel_size 1, where it has no effect")
    else:
        fields |= {"tokens_per_block": interleave, "merge": merge}
        if "block_size" in top.values and top.count("block_size") % interleave:
            top.wrong("block_size", f"a multiple of cp_kv_cache_interleave_size ({interleave})")
        top.taken.discard("block_size")
    for theirs, ours in (("max_num_seqs", "max_batch_size"), ("max_model_len", "max_seq_len")):
        if theirs in top.values:
            fields[ours] = top.count(theirs)
        top.taken.add(theirs)
    return fields, top.finish(WITHOUT_EFFECT, REFUSED)
