"""vLLM's arguments, as read in its sources (engine and front end) up to autumn 2026, by what they are here."""

from __future__ import annotations

from helix_compile.config.files import Changing, of_kinds
from helix_compile.config.recipe import DECOMPRESSED, FP8_LAYERS, FP8_SCALES, ON_CPU, QUANTISED, STATES, EngineKeys

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
_LORA = "LoRA is not supported"
_EXPERTS = "an expert lies once, on the rank that the plan says"
BESIDE = {
    "speculative_config": _DRAFTS,
    "speculative_model": _DRAFTS,
    "num_speculative_tokens": _DRAFTS,
    "spec_method": _DRAFTS,
    "spec_model": _DRAFTS,
    "spec_tokens": _DRAFTS,
    "quantization": QUANTISED,
    "quantization_config": QUANTISED,
    "enable_lora": _LORA,
    "enable_eplb": _EXPERTS,
    "num_redundant_experts": _EXPERTS,
    "enable_elastic_ep": _EXPERTS,
    "expert_placement_strategy": _EXPERTS,
    "elastic_ep_max_dp_size": _EXPERTS,
    "enable_hc_sp": "residual streams are not cut over tokens",
    "engram_config": "engrams are not supported",
}

_PLANNED = "a plan is of decoding"
CHANGING = {
    "override_attention_dtype": Changing("attention computes in the model's dtype", but=("auto",)),
    "runner": Changing(_PLANNED, but=("auto", "generate")),
    "task": Changing(_PLANNED, but=("auto", "generate")),
    "convert": Changing(_PLANNED, but=("auto", "none")),
    "load_format": Changing(QUANTISED, at=("bitsandbytes", "gguf")),
    "cpu_offload_gb": Changing(ON_CPU),
    "offload_group_size": Changing(ON_CPU),
    "mamba_cache_dtype": Changing(STATES, but=("auto",)),
    "mamba_ssm_cache_dtype": Changing(STATES, but=("auto", "float32")),
    "enable_mamba_cache_stochastic_rounding": Changing(STATES),
    "prompt_adapters": Changing("prompt adapters are not supported"),
}
OF_FP8_CACHE = {"kv_cache_dtype_skip_layers": FP8_LAYERS, "calculate_kv_scales": FP8_SCALES}
_SCALES = ("VLLM_Q_SCALE_CONSTANT", "VLLM_K_SCALE_CONSTANT", "VLLM_V_SCALE_CONSTANT")
CHANGING_VARIABLES = {"VLLM_MLA_DISABLE": DECOMPRESSED, **dict.fromkeys(_SCALES, FP8_SCALES)}
_IDLE = (
    "USE_V1 ATTENTION_BACKEND USE_MODELSCOPE LOGGING_LEVEL LOGGING_CONFIG_PATH LOGGING_PREFIX LOG_STATS_INTERVAL "
    "CONFIGURE_LOGGING TRACE_FUNCTION WORKER_MULTIPROC_METHOD ENABLE_V1_MULTIPROCESSING HOST_IP PORT RPC_BASE_PATH "
    "RPC_TIMEOUT RPC_GET_DATA_TIMEOUT_MS ENGINE_READY_TIMEOUT_S ENGINE_ITERATION_TIMEOUT_S EXECUTE_MODEL_TIMEOUT_SECONDS "
    "HTTP_TIMEOUT_KEEP_ALIVE CACHE_ROOT CONFIG_ROOT ASSETS_CACHE NO_USAGE_STATS DO_NOT_TRACK USAGE_SOURCE "
    "USAGE_STATS_SERVER API_KEY S3_ACCESS_KEY_ID S3_SECRET_ACCESS_KEY S3_ENDPOINT_URL PLUGINS TARGET_DEVICE "
    "NCCL_SO_PATH NCCL_INCLUDE_PATH SKIP_P2P_CHECK DISABLE_PYNCCL DISABLED_KERNELS DISABLE_COMPILE_CACHE "
    "ALL2ALL_BACKEND USE_DEEP_GEMM USE_DEEP_GEMM_E8M0 DEEP_GEMM_WARMUP SKIP_DEEP_GEMM_WARMUP MOE_USE_DEEP_GEMM "
    "USE_FLASHINFER_SAMPLER USE_FLASHINFER_MOE_FP16 USE_FLASHINFER_MOE_FP8 USE_FLASHINFER_MOE_FP4 FLASHINFER_MOE_BACKEND "
    "FLASHINFER_WORKSPACE_BUFFER_SIZE FLASHINFER_ALLREDUCE_BACKEND FLASHINFER_AUTOTUNE_CACHE_DIR FLASH_ATTN_VERSION "
    "USE_TRTLLM_ATTENTION USE_CUDNN_PREFILL USE_AOT_COMPILE USE_MEGA_AOT_ARTIFACT USE_STANDALONE_COMPILE "
    "USE_NCCL_SYMM_MEM ALLREDUCE_USE_SYMM_MEM CUSTOM_ALLREDUCE_ALGO USE_RAY_SPMD_WORKER USE_RAY_COMPILED_DAG "
    "USE_RAY_WRAPPED_PP_COMM RAY_DP_PACK_STRATEGY RAY_PER_WORKER_GPUS DP_SIZE DP_RANK DP_RANK_LOCAL DP_MASTER_IP "
    "DP_MASTER_PORT RANDOMIZE_DP_DUMMY_INPUTS NIXL_SIDE_CHANNEL_HOST NIXL_SIDE_CHANNEL_PORT NIXL_ABORT_REQUEST_TIMEOUT "
    "MOONCAKE_BOOTSTRAP_PORT MOONCAKE_ABORT_REQUEST_TIMEOUT KV_CACHE_LAYOUT KV_EVENTS_USE_INT_BLOCK_HASHES "
    "CUDART_SO_PATH SERVER_DEV_MODE ALLOW_LONG_MAX_MODEL_LEN "
    "ALLOW_RUNTIME_LORA_UPDATING ALLOW_INSECURE_SERIALIZATION ENABLE_RESPONSES_API_STORE TORCH_PROFILER_DIR "
    "CUSTOM_SCOPES_FOR_PROFILING NVTX_SCOPES_FOR_PROFILING V1_OUTPUT_PROC_CHUNK_SIZE FUSED_MOE_CHUNK_SIZE "
    "ENABLE_MOE_DP_CHUNK MOE_DP_CHUNK_SIZE MAX_TOKENS_PER_EXPERT_FP4_MOE MARLIN_USE_ATOMIC_ADD "
    "SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD DISABLE_SHARED_EXPERTS_STREAM DBO_COMM_SMS DEEPEP_BUFFER_SIZE_MB "
    "DEEPEP_HIGH_THROUGHPUT_FORCE_INTRA_NODE DEEPEP_LOW_LATENCY_ALLOW_NVLINK DEEPEP_LOW_LATENCY_USE_MNNVL "
    "ENGINE_STARTUP_TIMEOUT SLEEP_WHEN_IDLE TOOL_PARSE_REGEX_TIMEOUT_SECONDS XGRAMMAR_CACHE_MB CPU_KVCACHE_SPACE "
    "CPU_OMP_THREADS_BIND OBJECT_STORAGE_SHM_BUFFER_NAME MM_INPUT_CACHE_GIB IMAGE_FETCH_TIMEOUT VIDEO_FETCH_TIMEOUT "
    "AUDIO_FETCH_TIMEOUT MEDIA_LOADING_THREAD_COUNT LOGITS_PROCESSOR_THREADS DEBUG_LOG_API_SERVER_RESPONSE "
    "DEBUG_DUMP_PATH DEBUG_MFU_METRICS ROCM_USE_AITER ROCM_USE_AITER_MLA ROCM_USE_AITER_MHA ROCM_USE_AITER_MOE "
    "ROCM_USE_AITER_RMSNORM ROCM_USE_AITER_LINEAR ROCM_USE_AITER_FP8BMM ROCM_USE_AITER_FP4BMM ROCM_USE_AITER_TRITON_ROPE "
    "ROCM_USE_AITER_UNIFIED_ATTENTION ROCM_USE_TRITON_ROPE ROCM_USE_SKINNY_GEMM ROCM_CUSTOM_PAGED_ATTN ROCM_FP8_PADDING "
    "ROCM_MOE_PADDING ROCM_QUICK_REDUCE_CAST_BF16_TO_FP16 BATCH_INVARIANT COMPUTE_NANS_IN_LOGITS LOOPBACK_IP "
    "PROCESS_NAME_PREFIX KEEP_ALIVE_ON_ENGINE_DEATH COMMIT BUILD_COMMIT VERSION BASE_DIR"
)
IDLE_VARIABLES = frozenset(f"VLLM_{name}" for name in _IDLE.split())

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
    nullable=("dcp_q_replicate", "block_size", "max_num_seqs", "max_model_len"), short=SHORT,
    graphs=GRAPHS, changing=CHANGING, prefix=("VLLM_",), changing_variables=CHANGING_VARIABLES, idle_variables=IDLE_VARIABLES,
)  # fmt: skip
