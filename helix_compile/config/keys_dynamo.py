"""What the workers of NVIDIA Dynamo take besides their engine's arguments, as read in its documentation up to autumn 2026."""

from __future__ import annotations

from helix_compile.config.files import of_kinds

# none of them says what a rank computes or holds; which worker it is, is looked at
WORKER = of_kinds(
    {
        "bool": "is_decode_worker is_prefill_worker use_vllm_tokenizer use_sglang_tokenizer publish_events_and_metrics "
        "use_nixl_connect durable_kv_events enable_local_indexer enable_multimodal multimodal_processor multimodal_worker "
        "multimodal_encode_worker multimodal_decode_worker",
        "int": "migration_limit",
        "str": "endpoint namespace store_kv discovery_backend request_plane event_plane custom_jinja_template modality "
        "dyn_tool_call_parser dyn_reasoning_parser dump_config_to disaggregation_mode disaggregation_strategy",
        "scalar or list": "connector",
    }
)
SHORT_TRTLLM = {
    "model_path": "model",
    "extra_engine_args": "extra_llm_api_options",
    "expert_parallel_size": "moe_expert_parallel_size",
}


def is_of_prefill(said: dict[str, object]) -> bool:
    """This worker computes prompts and hands their caches over: its layout is not the decode step's."""
    return bool(said.get("is_prefill_worker")) or str(said.get("disaggregation_mode", "")).lower() in (
        "prefill",
        "encode",
    )
