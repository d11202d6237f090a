"""TensorRT-LLM's options as fields of HelixOptions, by its own rules; what it would ignore without a word is an error.

Keys, rules and messages as read in its sources (LLM arguments, CpConfig, Mapping) up to autumn 2026. Of a file of
disaggregated serving the generation servers are read: Helix is how they decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helix_compile.config.files import ConfigSection
from helix_compile.config.keys_trtllm import (
    CACHE_CHANGING,
    CACHE_REFUSED,
    CACHE_WITHOUT_EFFECT,
    DISAGGREGATED,
    INDEXER,
    MOE_BESIDE,
    MOE_CHANGING,
    MOE_WITHOUT_EFFECT,
    TRTLLM,
)
from helix_compile.config.recipe import (
    ConfigFields,
    Recipe,
    add_stages,
    check_cache_dtype,
    experts_of_replica,
    read_dtype,
    replica_note,
    without_nulls,
)
from helix_compile.errors import PlanError

CP_TYPES = ("ULYSSES", "STAR", "RING", "HELIX")
DEFAULT_TOKENS_PER_BLOCK = 32  # of kv_cache_config


def trtllm_fields(values: Mapping[str, Any], where: str, lenient: bool = False) -> ConfigFields:
    """What the options, or the generation servers of a disaggregated file, say or imply.

    Raises:
        PlanError: key path, got, expected.
    """
    values, prefix, idle = _generation(values, where)
    known = {**TRTLLM.without_effect, **TRTLLM.refused, **TRTLLM.beside}
    said_graphs = {"cuda_graphs": values["cuda_graph_config"] is not None} if "cuda_graph_config" in values else {}
    values, nulls = without_nulls(values, known, TRTLLM.nullable, prefix)
    idle += nulls
    top = ConfigSection(values, where, prefix, lenient)
    top.check_names(TRTLLM.kinds)
    fields: dict[str, Any] = {"cp": top.count("context_parallel_size"), "tpa": top.count("tensor_parallel_size")}
    fields |= said_graphs  # a null switches them off
    if "cuda_graph_config" in values:
        top.kind("cuda_graph_config", "mapping")
    top.only("max_beam_width", 1, "beam search is not supported")
    _stages(top, fields)
    ep = _expert_parallel(top, fields["cp"] * fields["tpa"])
    fields["ep"] = ep
    if top.flag("enable_attention_dp") and fields["tpa"] > 1:
        replicas, all_ranks = fields["tpa"], fields["tpa"] * fields["cp"]
        fields |= {"tpa": 1, "ep": experts_of_replica(ep, fields["cp"])}
        laid = f"experts lie over ep={fields['ep']} of these ranks, in the engine over ep={ep} of all {all_ranks}"
        top.notes.append(replica_note("enable_attention_dp", replicas, fields["cp"], laid))
    for name in ("max_batch_size", "max_seq_len"):
        if name in values:
            fields[name] = top.count(name)
        top.taken.add(name)
    stated, tokens_per_block, cache_dtype = False, DEFAULT_TOKENS_PER_BLOCK, ""
    cache = _section(top, "kv_cache_config", {**CACHE_WITHOUT_EFFECT, **CACHE_REFUSED}, idle)
    if cache is not None:
        stated = "tokens_per_block" in cache.values
        tokens_per_block = cache.count("tokens_per_block", DEFAULT_TOKENS_PER_BLOCK)
    helix = top.section("cp_config")
    if helix is not None:
        idle += _check_helix(helix, fields["cp"], tokens_per_block, stated)
    elif fields["cp"] > 1:
        top.refuse(
            "cp_config",
            "got none, expected {cp_type: HELIX, tokens_per_block: N}: CP type must be HELIX for MLA, but got ULYSSES, the default",
        )
    if cache is not None:
        cache_dtype = check_cache_dtype(cache, "dtype", fields)
        idle += cache.finish(CACHE_WITHOUT_EFFECT, CACHE_REFUSED, changing=CACHE_CHANGING)
    if stated or helix is not None:
        fields["tokens_per_block"] = tokens_per_block
    dtype = read_dtype(top)
    _check_indexer(top, idle)
    moe = _section(top, "moe_config", {**MOE_WITHOUT_EFFECT, **MOE_BESIDE}, idle)
    if moe is not None:
        balancer = moe.values.get("load_balancer")
        if isinstance(balancer, Mapping) and balancer.get("num_slots", 0) in (0, None):
            moe.taken.add("load_balancer")  # no more slots than experts
        idle += moe.finish(MOE_WITHOUT_EFFECT, {}, MOE_BESIDE, MOE_CHANGING)
    idle += top.finish(TRTLLM.without_effect, TRTLLM.refused, TRTLLM.beside, TRTLLM.changing)
    return ConfigFields("TensorRT-LLM", fields, tuple(idle), Recipe(top.said(), cache_dtype, dtype), where)


def _check_indexer(top: ConfigSection, idle: list[str]) -> None:
    """DeepSeek's sparse attention is planned as the model has it; the rest of its section is about kernels."""
    given = top.values.get("sparse_attention_config")
    if not isinstance(given, Mapping) or str(given.get("algorithm", "")).lower() != "dsa":
        return
    top.taken.add("sparse_attention_config")
    for key in INDEXER:
        if given.get(key) is not None:
            top.refuse(
                f"sparse_attention_config.{key}",
                f"got {given[key]!r}, expected no such key: give a checkpoint folder whose config.json says it",
            )
    idle.append(f"{top.prefix}sparse_attention_config")


def _generation(values: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str, list[str]]:
    """(the options of the generation servers, their path in the file, what else the file holds)."""
    if "worker_config" in values:
        workers = values["worker_config"]
        found = workers.get("gen") if isinstance(workers, Mapping) else None
        if not isinstance(found, Mapping):
            raise PlanError(
                f"{where}: worker_config.gen: got {type(found).__name__}, expected the generation servers' options"
            )
        rest = [k for k in values if k != "worker_config"] + [f"worker_config.{k}" for k in workers if k != "gen"]
        return found, "worker_config.gen.", rest
    if "generation_servers" not in values:
        if "context_servers" in values:
            raise PlanError(
                f"{where}: generation_servers: got none beside context_servers, expected the servers that decode"
            )
        return values, "", []
    found = values["generation_servers"]
    if not isinstance(found, Mapping) or not found:
        raise PlanError(
            f"{where}: generation_servers: got {type(found).__name__}"
            f"{' without options' if isinstance(found, Mapping) else ''}, expected the options of the servers that decode"
        )
    for key in (k for k in found if k in values and k not in DISAGGREGATED and values[k] != found[k]):
        raise PlanError(
            f"{where}: {key}: got {values[key]!r} at the top and {found[key]!r} in generation_servers, expected one of them: "
            "TensorRT-LLM refuses what is specified both in the top-level and in the generation_servers section, but with "
            "different values"
        )
    # what stands at the top holds for both kinds of servers
    above = {k: v for k, v in values.items() if k not in ("generation_servers", "context_servers") and k not in found}
    rest = ["context_servers"] if "context_servers" in values else []
    return {**above, **found}, "", rest


def _section(top: ConfigSection, key: str, keys: Mapping[str, Any], idle: list[str]) -> ConfigSection | None:
    """The mapping below a key, without the nulls that ask for nothing."""
    given = top.values.get(key)
    if key == "moe_config" and given == {}:
        top.taken.add(key)
        return None
    if not isinstance(given, Mapping) or not given:
        return top.section(key)  # none, or refused
    top.taken.add(key)
    prefix = f"{top.prefix}{key}."
    kept, nulls = without_nulls(given, keys, ("dtype",) if key == "kv_cache_config" else (), prefix)
    idle += nulls
    return ConfigSection(kept, top.where, prefix, top.lenient, top.notes, top.left_out) if kept else None


def _stages(top: ConfigSection, fields: dict[str, Any]) -> None:
    pp = top.count("pipeline_parallel_size")
    add_stages(fields, pp, "first")
    if "pp_partition" not in top.values:
        return
    top.kind("pp_partition", "list")
    sizes = top.values["pp_partition"]
    even = all(isinstance(s, int) and 0 <= sizes[0] - s <= 1 for s in sizes) and sizes == sorted(sizes, reverse=True)
    if len(sizes) != pp or not even:
        top.wrong("pp_partition", f"{pp} sizes that differ by one at most, the larger first: others are not planned")


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
        helix.notes.append(
            f"cp_config.tokens_per_block is not said: kv_cache_config.tokens_per_block, {tokens_per_block}, is taken; "
            "TensorRT-LLM wants both, but skips its check where this one is missing"
        )
    block = helix.count("tokens_per_block", tokens_per_block)
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
