"""Published recipes of decode context parallelism (values only), and what must come of them.

A line: name, what is published, fields of HelixOptions or the sentence of the refusal, and the same read leniently
(None: as before).
"""

from __future__ import annotations

from typing import Any, NamedTuple

CACHE = "the cache has the dtype of the model; --lenient (lenient=True) plans it so and says what changes"
ULYSSES = "CP type must be HELIX for MLA, but got ULYSSES, the default"


class PublishedRecipe(NamedTuple):
    """One line of the table."""

    name: str
    source: Any
    strict: dict[str, Any] | str
    lenient: dict[str, Any] | None = None


_CACHE = {"enable_block_reuse": False, "enable_partial_reuse": False}
_NIXL = {"backend": "NIXL", "transceiver_runtime": "PYTHON"}
_UCX = {"backend": "UCX"}
_LITE = {**_CACHE, "tokens_per_block": 32, "use_kv_cache_manager_v2": True}
_R1 = {
    "num_instances": 1,
    "pipeline_parallel_size": 1,
    "enable_chunked_prefill": False,
    "max_batch_size": 1,
    "max_seq_len": 100000,
    "moe_config": {"backend": "TRTLLM"},
    "kv_cache_config": {**_CACHE, "max_tokens": 100000, "dtype": "fp8"},
    "cache_transceiver_config": {**_UCX, "max_tokens_in_buffer": 100000},
}
_MOONCAKE = (
    '{"kv_connector":"MooncakeStoreConnector","kv_role":"kv_both","kv_load_failure_policy":"recompute",'
    '"kv_connector_extra_config":{"load_async":true,"lookup_async":true,"enable_offload":false}}'
)
_PREFILL = '{"mla_prefill_backend":"TRTLLM_RAGGED","use_prefill_query_quantization":true}'
_K3 = {
    "served-model-name": "moonshotai/Kimi-K3",
    "tensor-parallel-size": 8,
    "decode-context-parallel-size": 8,
    "dcp-comm-backend": "a2a",
    "trust-remote-code": True,
    "load-format": "fastsafetensors",
    "moe-backend": "auto",
    "gpu-memory-utilization": 0.92,
    "no-enable-flashinfer-autotune": True,
    "kv-cache-dtype": "fp8",
    "kv-transfer-config": _MOONCAKE,
    "attention-backend": "TOKENSPEED_MLA",
    "attention-config": _PREFILL,
    "enable-prefix-caching": True,
    "language-model-only": True,
    "prefix-match-unit": 128,
}

PUBLISHED = [
    PublishedRecipe(
        "trtllm blog21",
        {
            "context_parallel_size": 2,
            "cp_config": {
                "cp_type": "HELIX",
                "tokens_per_block": 32,
                "use_nccl_for_alltoall": False,
                "fifo_version": 2,
            },
            "kv_cache_config": {"tokens_per_block": 32},
        },
        {"cp": 2, "tpa": 1, "ep": 1, "tokens_per_block": 32},
    ),
    PublishedRecipe(
        "trtllm ctxtp2 gentp1cp2",
        {
            "hostname": "localhost",
            "model": "DeepSeek-V3-Lite/bf16",
            "free_gpu_memory_fraction": 0.25,
            "backend": "pytorch",
            "cuda_graph_config": None,
            "context_servers": {
                "num_instances": 1,
                "kv_cache_config": _LITE,
                "tensor_parallel_size": 2,
                "cache_transceiver_config": _NIXL,
            },
            "generation_servers": {
                "num_instances": 1,
                "tensor_parallel_size": 1,
                "pipeline_parallel_size": 1,
                "context_parallel_size": 2,
                "enable_chunked_prefill": False,
                "cp_config": {"cp_type": "HELIX", "tokens_per_block": 32},
                "kv_cache_config": _LITE,
                "cache_transceiver_config": _NIXL,
            },
        },
        {"cp": 2, "tpa": 1, "ep": 1, "tokens_per_block": 32},
    ),
    PublishedRecipe(
        "trtllm R1 FP4",
        {
            "hostname": "localhost",
            "port": 8000,
            "model": "DeepSeek-R1-FP4",
            "backend": "pytorch",
            "disable_overlap_scheduler": True,
            "cuda_graph_config": None,
            "context_servers": {**_R1, "tensor_parallel_size": 4, "max_num_tokens": 100000, "urls": ["localhost:8001"]},
            "generation_servers": {
                **_R1,
                "tensor_parallel_size": 1,
                "context_parallel_size": 4,
                "max_num_tokens": 32,
                "urls": ["localhost:8002"],
            },
        },
        ULYSSES,
    ),
    PublishedRecipe(
        "trtllm generation only",
        {
            "hostname": "localhost",
            "port": 8000,
            "model": "DeepSeek-V3-Lite/bf16",
            "backend": "pytorch",
            "cuda_graph_config": None,
            "context_servers": {"num_instances": 0},
            "generation_servers": {
                "num_instances": 1,
                "tensor_parallel_size": 1,
                "pipeline_parallel_size": 1,
                "context_parallel_size": 2,
                "cp_config": {"cp_type": "helix"},
                "cache_transceiver_config": _UCX,
                "urls": ["localhost:8002"],
            },
        },
        {"cp": 2, "tpa": 1, "ep": 1, "tokens_per_block": 32},
    ),
    PublishedRecipe(
        "vllm b200 tp8 pp2",
        {
            **_K3,
            "pipeline-parallel-size": 2,
            "max-model-len": 1048576,
            "enable-prompt-tokens-details": True,
            "enable-auto-tool-choice": True,
            "tool-call-parser": "kimi_k3",
            "reasoning-parser": "kimi_k3",
            "max-num-seqs": 32,
            "max-num-batched-tokens": 8192,
            "speculative-config": '{"model":"Inferact/Kimi-K3-DSpark","num_speculative_tokens":7,"method":"dspark"}',
            "compilation-config": '{"cudagraph_mode":"FULL_AND_PIECEWISE","cudagraph_capture_sizes":[8,16,24]}',
        },
        CACHE,
        {
            "cp": 8,
            "tpa": 1,
            "ep": 1,
            "tokens_per_block": 1,
            "merge": "a2a",
            "pp": 2,
            "stage": 0,
            "pp_split": "middle",
            "max_batch_size": 32,
            "max_seq_len": 1048576,
        },
    ),
    PublishedRecipe(
        "vllm gb300 dcp8",
        {**_K3, "max-num-batched-tokens": 16384, "stream-interval": 10, "max-cudagraph-capture-size": 1024},
        CACHE,
        {"cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "a2a", "pp": 1},
    ),
    PublishedRecipe(
        "vllm glm-5.3",
        {
            "model": "Inferact/GLM-5.3-NVFP4",
            "tensor-parallel-size": 4,
            "decode-context-parallel-size": 4,
            "dcp-comm-backend": "ag_rs",
            "kv-cache-dtype": "fp8_e4m3",
            "speculative-config": '{"method":"mtp","num_speculative_tokens":5}',
        },
        CACHE,
        {"cp": 4, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "ag_rs"},
    ),
    PublishedRecipe(
        "vllm kimi-k3 dcp8",
        {
            "model": "moonshotai/Kimi-K3",
            "tensor-parallel-size": 8,
            "decode-context-parallel-size": 8,
            "dcp-comm-backend": "a2a",
            "attention-backend": "TOKENSPEED_MLA",
            "attention-config": _PREFILL,
        },
        {"cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "a2a"},
    ),
    PublishedRecipe(
        "sglang kimi-k3",
        "--tp-size 8 --dcp-size 8 --disable-custom-all-reduce --mem-fraction-static 0.85",
        {"cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "ag_rs", "q_proj": "gather"},
    ),
    PublishedRecipe(
        "sglang glm-5.3",
        "--tp-size 4 --ep-size 4 --dcp-size 4 --dcp-comm-backend a2a --dcp-replicate-q-proj",
        {"cp": 4, "tpa": 1, "ep": 4, "tokens_per_block": 1, "merge": "a2a", "q_proj": "replicate"},
    ),
    PublishedRecipe(
        "sglang glm-5.2 PD",
        "--tp-size 8 --dcp-size 8 --page-size 128 --mem-fraction-static 0.90 --speculative-algorithm EAGLE "
        "--speculative-num-steps 5 --speculative-eagle-topk 1 --kv-cache-dtype fp8_e4m3",
        CACHE,
        {"cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "ag_rs"},
    ),
    PublishedRecipe(
        "sglang kimi-k3 x32",
        "--tp-size 32 --ep-size 32 --enable-dp-attention --dp-size 4 --enable-dp-lm-head --dcp-size 8 "
        "--moe-a2a-backend megamoe --kv-cache-dtype fp8_e4m3",
        CACHE,
        {"cp": 8, "tpa": 1, "ep": 8, "tokens_per_block": 1, "merge": "ag_rs"},
    ),
]
