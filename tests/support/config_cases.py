"""Random configurations, and what TensorRT-LLM's and vLLM's rules make of them, written apart from the loaders."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

ODD = st.sampled_from([None, True, 0, -1, "4", 4.0, [4], {}, {"a": 1}, "", 1 << 70])
SIZE = st.sampled_from([1, 2, 2, 4, 4, 8])


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`good`, or now and then something odd."""
    return st.integers(0, 19).flatmap(lambda n: ODD if n == 0 else good)


def some(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping with these keys, and now and then one that nobody knows."""
    known = st.fixed_dictionaries(required, optional=optional)
    extra = st.sampled_from([{}, {}, {}, {}, {}, {}, {}, {"cp_sise": 4}, {"xyz": None}])
    return st.builds(lambda a, b: a | b, known, extra)


BLOCK = mostly(st.sampled_from([32, 32, 32, 16]))
TRTLLM = some(
    {
        "context_parallel_size": mostly(SIZE),
        "cp_config": mostly(
            some(
                {
                    "cp_type": mostly(st.sampled_from(["HELIX", "HELIX", "helix", "Helix", "STAR", "HELLX"])),
                    "tokens_per_block": BLOCK,
                },
                {"use_nccl_for_alltoall": mostly(st.booleans()), "fifo_version": mostly(st.sampled_from([1, 2, 3]))},
            )
        ),
    },
    {
        "tensor_parallel_size": mostly(SIZE),
        "moe_expert_parallel_size": mostly(SIZE),
        "moe_tensor_parallel_size": mostly(SIZE),
        "pipeline_parallel_size": mostly(st.sampled_from([1, 1, 2])),
        "max_num_tokens": mostly(st.integers(1, 9)),
        "max_seq_len": mostly(st.integers(1, 9)),
        "kv_cache_config": mostly(some({"tokens_per_block": BLOCK}, {"enable_block_reuse": mostly(st.booleans())})),
    },
)
VLLM = some(
    {"tensor_parallel_size": mostly(st.sampled_from([4, 8])), "decode_context_parallel_size": mostly(SIZE)},
    {
        "cp_kv_cache_interleave_size": mostly(SIZE),
        "dcp_comm_backend": mostly(st.sampled_from(["a2a", "ag_rs", "fi_a2a"])),
        "enable_expert_parallel": mostly(st.booleans()),
        "block_size": mostly(st.sampled_from([4, 16])),
        "max_model_len": mostly(st.integers(1, 9)),
        "model": mostly(st.just("x")),
    },
)
OWN = some(
    {"cp": mostly(SIZE)},
    {
        "tpa": mostly(SIZE),
        "ep": mostly(SIZE),
        "tokens_per_block": mostly(SIZE),
        "merge": mostly(st.sampled_from(["a2a", "ag_rs", "a2"])),
        "v_up": mostly(st.sampled_from(["auto", "after"])),
        "overlap": mostly(st.sampled_from(["none", "hopb"])),
        "max_seq_len": mostly(SIZE),
    },
)


def _counts(values: dict[str, Any], *names: str) -> bool:
    return all(type(values[n]) is int and 0 < values[n] < 1 << 31 for n in names if n in values)


def _keys(values: Any, *names: str) -> bool:
    """A mapping with something in it, none of it None, and only these keys."""
    return type(values) is dict and bool(values) and set(values) <= set(names) and None not in values.values()


def _stated(values: Any, *nullable: str) -> Any:
    """The mapping without nulls of these keys, where they ask for nothing."""
    if type(values) is not dict:
        return values
    return {k: v for k, v in values.items() if v is not None or k not in nullable}


def own_result(m: dict[str, Any]) -> dict[str, Any] | None:
    """Fields that our own file must give, None where it must be refused."""
    ints = ("cp", "tpa", "ep", "tokens_per_block", "max_seq_len")
    words = {"merge": ("a2a", "ag_rs"), "v_up": ("auto", "after"), "overlap": ("none", "hopb")}
    if not _keys(m, *ints, *words) or not _counts(m, *ints) or "cp" not in m:
        return None
    if any(n in m and m[n] not in allowed for n, allowed in words.items()):
        return None
    if m["cp"] * m.get("tpa", 1) % m.get("ep", 1):
        return None
    if m["cp"] == 1 and any(n in m and m[n] != words[n][0] for n in words):
        return None
    return m


def trtllm_result(m: dict[str, Any]) -> dict[str, Any] | None:
    """Fields that TensorRT-LLM's options must give, None where they must be refused."""
    ints = (
        "context_parallel_size",
        "tensor_parallel_size",
        "moe_expert_parallel_size",
        "moe_tensor_parallel_size",
        "pipeline_parallel_size",
        "max_seq_len",
    )
    optional = ("max_num_tokens", "max_seq_len", "cp_config", "moe_expert_parallel_size", "moe_tensor_parallel_size")
    m = _stated(m, *optional)
    if not _keys(m, *ints, "cp_config", "kv_cache_config", "max_num_tokens") or not _counts(m, *ints):
        return None
    if "kv_cache_config" in m and m["kv_cache_config"] == {}:
        return None
    cache = _stated(m.get("kv_cache_config", {"enable_block_reuse": True}), "enable_block_reuse")
    cache = {"enable_block_reuse": True} if cache == {} else cache
    helix = m.get("cp_config")
    if helix is None:  # null, or not there: plain tensor parallelism
        helix = {"cp_type": "HELIX"} if m["context_parallel_size"] == 1 else {}
    elif m["context_parallel_size"] == 1:
        return None
    if not _keys(helix, "cp_type", "tokens_per_block", "use_nccl_for_alltoall", "fifo_version"):
        return None
    if not _keys(cache, "tokens_per_block", "enable_block_reuse"):
        return None
    # booleans that must be booleans; an int of max_num_tokens may be any
    if type(m.get("max_num_tokens", 1)) is not int or type(cache.get("enable_block_reuse", True)) is not bool:
        return None
    nccl = helix.get("use_nccl_for_alltoall", True)
    if (
        type(nccl) is not bool
        or not _counts(helix, "tokens_per_block", "fifo_version")
        or not _counts(cache, "tokens_per_block")
    ):
        return None
    if "fifo_version" in helix and (nccl or helix["fifo_version"] > 2):
        return None
    cp, tp = m["context_parallel_size"], m.get("tensor_parallel_size", 1)
    if type(helix.get("cp_type")) is not str or helix["cp_type"].upper() != "HELIX":
        return None
    block = cache.get("tokens_per_block", 32)
    if helix.get("tokens_per_block", block) != block or m.get("pipeline_parallel_size", 1) >= 1 << 31:
        return None
    tpf, ep = m.get("moe_tensor_parallel_size"), m.get("moe_expert_parallel_size")
    if ep is None:
        ep = 1 if tpf is None else cp * tp // tpf
    if (cp * tp // ep if tpf is None and ep else tpf) * ep != cp * tp:
        return None
    kept = {"max_seq_len": m["max_seq_len"]} if "max_seq_len" in m else {}
    if "tokens_per_block" in cache or "cp_config" in m:
        kept["tokens_per_block"] = block
    pp = m.get("pipeline_parallel_size", 1)
    return {"cp": cp, "tpa": tp, "ep": ep, **kept, **({"pp": pp} if pp > 1 else {})}


def vllm_result(m: dict[str, Any]) -> dict[str, Any] | None:
    """Fields that vLLM's options must give, None where they must be refused."""
    ints = ("tensor_parallel_size", "decode_context_parallel_size", "cp_kv_cache_interleave_size", "max_model_len")
    m = _stated(m, "model", "max_model_len", "block_size")
    # a file's values become words of a command line: a number may be text
    m = {k: 4 if v == "4" and k in (*ints, "block_size") else v for k, v in m.items()}
    if m.get("max_model_len") == -1:  # as much as fits: ours stays
        m = {k: v for k, v in m.items() if k != "max_model_len"}
    if not _keys(m, *ints, "dcp_comm_backend", "enable_expert_parallel", "block_size", "model"):
        return None
    block, ep = m.get("block_size", 16), m.get("enable_expert_parallel", False)
    # a name may be any text, and a number is one
    if not _counts(m, *ints) or type(block) is not int or type(ep) is not bool:
        return None
    if type(m.get("model", "")) not in (str, int, float):
        return None
    tp, cp = m["tensor_parallel_size"], m["decode_context_parallel_size"]
    merge, turn = m.get("dcp_comm_backend", "ag_rs"), m.get("cp_kv_cache_interleave_size", 1)
    if tp % cp or merge not in ("ag_rs", "a2a"):
        return None
    if cp == 1 and (merge != "ag_rs" or turn != 1):
        return None
    if cp > 1 and "block_size" in m and (block < 1 or block % turn):
        return None
    kept = {"max_seq_len": m["max_model_len"]} if "max_model_len" in m else {}
    helix = {"tokens_per_block": turn, "merge": merge} if cp > 1 else {}
    return {"cp": cp, "tpa": tp // cp, "ep": tp if ep else 1, **helix, **kept}
