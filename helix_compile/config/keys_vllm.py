"""vLLM's arguments, as read in its sources (engine and front end) up to autumn 2026, by what they are here."""

from __future__ import annotations

from helix_compile.config.files import of_kinds
from helix_compile.config.recipe import EngineKeys

APPLIED = of_kinds(
    {
        "int": "tensor_parallel_size decode_context_parallel_size pipeline_parallel_size data_parallel_size "
        "prefill_context_parallel_size cp_kv_cache_interleave_size block_size max_num_seqs max_model_len",
        "str": "dcp_comm_backend kv_cache_dtype dtype",
        "bool": "enable_expert_parallel dcp_q_replicate",
    }
)

# understood, checked for their type, and without effect on what is compiled
WITHOUT_EFFECT = of_kinds(
    {
        "str": "model tokenizer tokenizer_mode tokenizer_revision revision code_revision download_dir load_format host "
        "uds root_path distributed_executor_backend attention_backend all2all_backend moe_backend linear_backend "
        "uvicorn_log_level log_config_file chat_template chat_template_content_format response_role tool_call_parser "
        "tool_parser_plugin tool_server reasoning_parser reasoning_parser_plugin ssl_keyfile ssl_certfile ssl_ca_certs "
        "ssl_ciphers otlp_traces_endpoint show_hidden_metrics_for_version scheduling_policy scheduler_cls worker_cls "
        "worker_extension_cls generation_config model_impl config_format runner convert task guided_decoding_backend "
        "prefix_caching_hash_algo kv_offloading_backend offload_backend performance_mode mm_encoder_tp_mode "
        "mm_encoder_attn_backend mm_processor_cache_type mm_tensor_ipc mm_processor_device master_addr "
        "data_parallel_address data_parallel_backend logprobs_mode mamba_cache_dtype mamba_ssm_cache_dtype "
        "mamba_cache_mode mamba_backend gdn_prefill_backend kda_prefill_backend io_processor_plugin device "
        "allowed_local_media_path disable_access_log_for_endpoints logits_processor_pattern jit_monitor_mode "
        "video_pruning_method preemption_mode tool_strict_level override_attention_dtype safetensors_load_strategy "
        "model_weights sparse_indexer_topk_backend mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path log_level "
        "sleep_mode_backend mamba_ssu_algorithm kda_decode_backend cohere_format anthropic_disabled_thinking_effort "
        "fingerprint_mode fingerprint_value",
        "scalar or list": "served_model_name api_key middleware allowed_origins allowed_methods allowed_headers "
        "allowed_media_domains collect_detailed_traces logits_processors ignore_patterns lora_modules "
        "cudagraph_capture_sizes cuda_graph_sizes device_ids numa_bind_nodes numa_bind_cpus cpu_offload_params "
        "offload_params kv_cache_dtype_skip_layers prompt_adapters sleep_preserve_parameter_names",
        "bool": "trust_remote_code enable_chunked_prefill enable_prefix_caching async_scheduling "
        "disable_log_stats disable_log_requests enable_log_requests enable_log_outputs enable_log_deltas "
        "disable_uvicorn_access_log disable_fastapi_docs enable_offline_docs enable_auto_tool_choice "
        "exclude_tools_when_tool_choice_none enable_reasoning enable_prompt_tokens_details "
        "enable_server_load_tracking enable_force_include_usage enable_tokenizer_info_endpoint "
        "enable_request_id_headers return_tokens_as_token_ids disable_frontend_multiprocessing "
        "trust_request_chat_template allow_credentials enable_ssl_refresh log_error_stack tokens_only headless "
        "skip_tokenizer_init enable_prompt_embeds disable_custom_all_reduce enable_flashinfer_autotune "
        "enable_bf16x3_router_gemm language_model_only enable_mm_embeds interleave_mm_strings skip_mm_profiling "
        "mm_encoder_only disable_mm_preprocessor_cache mm_device_do_normalize enable_dbo disable_chunked_mm_input "
        "disable_hybrid_kv_cache_manager disable_cascade_attn calculate_kv_scales enable_sleep_mode "
        "enable_cumem_allocator enable_nccl_comm_suspend enable_batch_sharded_sampling enable_ep_weight_filter "
        "disable_nccl_for_dp_synchronization data_parallel_hybrid_lb data_parallel_external_lb "
        "data_parallel_multi_port_external_lb numa_bind aggregate_engine_logging scheduler_reserve_full_isl "
        "ray_workers_use_nsight use_tqdm_on_load kv_cache_metrics cudagraph_metrics enable_layerwise_nvtx_tracing "
        "enable_mfu_metrics enable_logging_iteration_details jit_monitor_verbose enable_mm_processor_stats "
        "enable_fault_tolerance kv_sharing_fast_prefill use_fp64_gumbel enable_trace_replay use_replayssm "
        "enable_mamba_cache_stochastic_rounding fully_sharded_loras specialize_active_lora "
        "enable_tower_connector_lora enable_mixed_moe_lora_format enable_moe_shared_loras fail_on_environ_validation "
        "use_v2_block_manager disable_async_output_proc multi_step_stream_outputs allow_deprecated_quantization "
        "full_cuda_graph enable_per_request_metrics enable_multimodal_encoder_data_parallel return_sampling_mask "
        "enable_return_routed_experts long_prefill_token_threshold_adaptive enable_shm_tensor_arena monokernel "
        "sleep_mode_offload_cudagraph enable_mamba_shared_prefix_checkpoint swa_bounded_replay trust_request_mm_kwargs "
        "cohere_is_reasoning_model enable_scale_out enable_flash_late_interaction",
        "int": "port api_server_count max_num_batched_tokens max_num_scheduled_tokens max_num_partial_prefills "
        "max_long_partial_prefills long_prefill_token_threshold max_num_queued_reqs max_num_queued_tokens "
        "max_cudagraph_capture_size max_seq_len_to_capture prefix_match_unit prefix_cache_retention_interval seed "
        "max_logprobs max_log_len stream_interval num_gpu_blocks_override kv_cache_memory_bytes kv_cache_memory "
        "max_parallel_loading_workers data_parallel_rank data_parallel_start_rank data_parallel_size_local "
        "data_parallel_rpc_port dp_sync_interval ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold "
        "nnodes node_rank master_port distributed_timeout_seconds cpu_distributed_timeout_seconds "
        "prefill_schedule_interval mamba_block_size mamba_cache_philox_rounds replayssm_buffer_len "
        "mm_shm_cache_max_object_size_mb renderer_num_workers offload_group_size offload_num_in_group "
        "offload_prefetch_step max_loras max_cpu_loras h11_max_incomplete_event_size h11_max_header_count "
        "ssl_cert_reqs shutdown_timeout num_lookahead_slots num_scheduler_steps tokenizer_pool_size "
        "safetensors_prefetch_num_threads safetensors_prefetch_block_size max_num_active_seqs max_lora_cls_labels "
        "sse_keep_alive_interval grpc_port data_parallel_supervisor_port dp_supervisor_probe_failure_threshold",
        "number": "gpu_memory_utilization swap_space cpu_offload_gb kv_offloading_size watermark mm_processor_cache_gb "
        "mm_ipc_gpu_memory_gb video_pruning_rate scheduler_delay_factor kv_cache_metrics_sample "
        "device_memory_utilization mm_encoder_fp8_scale_save_margin dp_supervisor_probe_interval_s "
        "dp_supervisor_probe_timeout_s",
        "str or mapping": "kv_transfer_config kv_events_config ec_transfer_config ec_manager_config attention_config "
        "kernel_config profiler_config structured_outputs_config reasoning_config weight_transfer_config "
        "fault_tolerance_config mamba_config eplb_config additional_config override_generation_config "
        "default_chat_template_kwargs model_loader_extra_config limit_mm_per_prompt media_io_kwargs "
        "mm_processor_kwargs ir_op_priority pooler_config override_pooler_config default_mm_loras "
        "pt_load_map_location ray_runtime_env scheduler_config observability_config aux_output_config watermark_config "
        "custom_histogram_buckets logging_config watchdog_config reasoning_effort_map",
        "any": "hf_token max_lora_rank lora_dtype lora_target_modules "
        "per_request_spec_decode_metrics mm_encoder_attn_dtype mm_hasher_algorithm",
    }
)

GRAPHS = of_kinds({"bool": "enforce_eager", "any": "compilation_config optimization_level"})

REFUSED = {
    "dcp_kv_cache_interleave_size": "vLLM renamed it; write cp_kv_cache_interleave_size",
    "hf_overrides": "give a checkpoint folder whose config.json says it",
    "hf_config_path": "give a checkpoint folder whose config.json says it",
    "model_class_overrides": "the model that is planned is given beside the file",
    "rope_scaling": "give a checkpoint folder whose config.json says it",
    "rope_theta": "give a checkpoint folder whose config.json says it",
    "disable_sliding_window": "windows are the model's own, read off its mask: nothing switches them off",
    "diffusion_config": "diffusion models are not supported",
    "config": "it names another file; give that one",
}

_DRAFTS = "drafts belong to the loop that decodes: generate(prompt_lookup_num_tokens=..., assistant_model=...)"
_QUANT = "a checkpoint says itself how its weights are quantised, and they are computed in --dtype"
_LORA = "LoRA is not supported"
_EXPERTS = "an expert lies once, on the rank that the plan says"
BESIDE = {
    "speculative_config": _DRAFTS,
    "speculative_model": _DRAFTS,
    "num_speculative_tokens": _DRAFTS,
    "spec_method": _DRAFTS,
    "spec_model": _DRAFTS,
    "spec_tokens": _DRAFTS,
    "quantization": _QUANT,
    "quantization_config": _QUANT,
    "enable_lora": _LORA,
    "enable_eplb": _EXPERTS,
    "num_redundant_experts": _EXPERTS,
    "enable_elastic_ep": _EXPERTS,
    "expert_placement_strategy": _EXPERTS,
    "elastic_ep_max_dp_size": _EXPERTS,
    "enable_hc_sp": "residual streams are not cut over tokens",
    "engram_config": "engrams are not supported",
}

MARKERS = (
    "decode_context_parallel_size",
    "cp_kv_cache_interleave_size",
    "dcp_kv_cache_interleave_size",
    "prefill_context_parallel_size",
    "enable_expert_parallel",
    "dcp_q_replicate",
)

SHORT = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "dcp": "decode_context_parallel_size",
    "pcp": "prefill_context_parallel_size",
    "ep": "enable_expert_parallel",
    "dpr": "data_parallel_rank",
    "dpn": "data_parallel_rank",
    "dpl": "data_parallel_size_local",
    "dpa": "data_parallel_address",
    "dpp": "data_parallel_rpc_port",
    "dpb": "data_parallel_backend",
    "dph": "data_parallel_hybrid_lb",
    "dpe": "data_parallel_external_lb",
    "dpm": "data_parallel_multi_port_external_lb",
    "dpsr": "data_parallel_start_rank",
    "q": "quantization",
    "n": "nnodes",
    "r": "node_rank",
    "asc": "api_server_count",
    "cc": "compilation_config",
    "ac": "attention_config",
    "sc": "speculative_config",
    "dc": "diffusion_config",
    "O": "optimization_level",
    "o": "optimization_level",
}

VLLM = EngineKeys(
    "vLLM", MARKERS, APPLIED, WITHOUT_EFFECT, REFUSED, BESIDE,
    nullable=("dcp_q_replicate", "block_size", "max_num_seqs", "max_model_len"), short=SHORT, graphs=GRAPHS,
)  # fmt: skip
