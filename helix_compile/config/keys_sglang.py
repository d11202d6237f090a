"""SGLang's server arguments, as read in its sources up to autumn 2026, by what they are here."""

from __future__ import annotations

from helix_compile.config.files import Changing, of_kinds
from helix_compile.config.recipe import DECOMPRESSED, EXCHANGED, FP8_SCALES, ON_CPU, QUANTISED, STATES, EngineKeys

APPLIED = of_kinds(
    {
        "int": "tp_size dcp_size pp_size dp_size attn_dp_size ep_size attn_cp_size moe_dp_size dwdp_size max_running_requests "
        "context_length moe_dense_tp_size",
        "str": "dcp_comm_backend moe_a2a_backend kv_cache_dtype dtype disaggregation_mode",
        "bool": "dcp_replicate_q_proj enable_dp_attention enable_ep_moe enable_deepep_moe",
    }
)

# understood, checked for their type, and without effect on what is compiled
WITHOUT_EFFECT = of_kinds(
    {
        "str": "model_path tokenizer_path tokenizer_mode tokenizer_backend load_format revision model_impl "
        "model_config_parser host dist_init_addr fastapi_root_path api_key admin_api_key served_model_name "
        "weight_version chat_template hf_chat_template_name completion_template file_storage_path reasoning_parser "
        "tool_call_parser tool_server sampling_defaults ssl_keyfile ssl_certfile ssl_ca_certs ssl_keyfile_password "
        "log_level log_level_http log_requests_format crash_dump_folder otlp_traces_endpoint trace_modules "
        "schedule_policy retraction_policy radix_eviction_policy radix_cache_backend load_balance_method device "
        "attention_backend decode_attention_backend prefill_attention_backend mm_attention_backend sampling_backend "
        "grammar_backend moe_runner_backend fp8_gemm_backend fp4_gemm_backend bf16_gemm_backend "
        "fp8_gemm_runner_backend fp4_gemm_runner_backend dsa_prefill_backend dsa_decode_backend dsv4_prefill_backend "
        "dsa_paged_mqa_logits_backend dsa_topk_backend nsa_prefill_backend nsa_decode_backend mamba_backend "
        "linear_attn_backend linear_attn_decode_backend linear_attn_prefill_backend linear_attn_verify_backend "
        "cuda_graph_backend_prefill cuda_graph_tc_compiler piecewise_cuda_graph_compiler "
        "flashinfer_allreduce_fusion_backend flashinfer_mxfp4_moe_precision deepep_mode deepep_v2_mode "
        "deepep_dispatcher_output_dtype expert_distribution_recorder_mode expert_balancedness_report_mode "
        "elastic_ep_backend mooncake_ib_device cp_strategy prefill_cp_mode dsa_prefill_cp_mode nsa_prefill_cp_mode hicache_host_memory_mode hicache_write_policy "
        "hicache_io_backend hicache_mem_layout hicache_storage_backend hicache_storage_prefetch_policy "
        "lmcache_config_file flexkv_config_file disaggregation_transfer_backend disaggregation_ib_device "
        "disaggregation_decode_retraction_backup encoder_transfer_backend pdmux_config_path "
        "startup_weight_load_mode download_dir remote_instance_weight_loader_seed_instance_ip "
        "remote_instance_weight_loader_backend weight_cache_mode weight_cache_socket offload_mode "
        "image_processor_backend mm_global_cache_backend mm_feature_transport mamba_ssm_dtype "
        "mamba_radix_cache_strategy lora_eviction_policy lora_backend quantization_param_path rl_on_policy_target "
        "tokenizer_metrics_custom_labels_header export_metrics_to_file_dir kv_canary kv_canary_real_data "
        "debug_tensor_dump_output_folder debug_tensor_dump_input_file msprobe_dump_config return_hidden_states_mode "
        "constrained_json_whitespace_pattern eplb_algorithm ep_dispatch_algorithm nccl_init_addr sidecar warmups "
        "forward_pass_metrics_worker_id forward_pass_metrics_ipc_name decrypted_config_file rl_quant_profile "
        "torchao_config aux_hidden_state_capture boundary_reduction decrypted_draft_config_file "
        "disaggregation_decode_allocation_policy dsv4_attn_backend flashinfer_a2a_dispatch_type load_publish_endpoint "
        "modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path monokernel_backend "
        "otlp_service_name prefill_kv_cache_dequant_dtype qsa_indexer_dtype spec_trace_dir "
        "unified_cache_external_linker_backend watermark_config watermark_key watermark_key_b",
        "bool": "trust_remote_code skip_tokenizer_init skip_server_warmup enable_multimodal language_only "
        "language_model_only enable_mixed_chunk enable_dynamic_chunking enable_priority_scheduling "
        "disable_priority_preemption abort_on_priority_when_disabled schedule_low_priority_values_first "
        "disable_radix_cache disable_hybrid_swa_memory enable_page_major_kv_layout enable_unified_memory "
        "disable_chunked_prefix_cache disable_overlap_schedule enable_dp_lm_head enable_tp_lm_head_all_to_all "
        "enable_dp_attention_local_control_broadcast enable_attn_tp_input_scattered disable_attn_tp_gather "
        "enable_p2p_check sleep_on_idle use_ray mlx_enable_sampling enable_http2 smg_grpc_mode grpc_mode "
        "enable_ssl_refresh enable_cache_report strip_thinking_cache enable_strict_thinking allow_auto_truncate "
        "stream_response_default_include_usage incremental_streaming_output stream_output enable_streaming_session "
        "enable_session_radix_cache log_requests show_time_cost enable_metrics enable_mfu_metrics "
        "enable_metrics_for_all_schedulers enable_request_time_stats_logging enable_forward_pass_metrics enable_trace "
        "export_metrics_to_file constrained_json_disable_any_whitespace disable_flashinfer_autotune "
        "disable_cuda_graph_padding disable_prefill_cuda_graph "
        "disable_piecewise_cuda_graph enable_piecewise_cuda_graph enable_breakable_cuda_graph "
        "enable_profile_cuda_graph enable_cudagraph_gc debug_cuda_graph enable_layerwise_nvtx_marker enable_nccl_nvls "
        "enable_symm_mem triton_attention_reduce_in_fp32 flashinfer_mla_disable_ragged enable_fused_qk_norm_rope "
        "enable_precise_embedding_interpolation enable_fused_moe_sum_all_reduce enable_deepseek_v4_fp4_indexer "
        "disable_custom_all_reduce enable_mscclpp enable_torch_symm_mem enable_scattered_sconv pre_warm_nccl "
        "enable_flashinfer_allreduce_fusion enforce_disable_flashinfer_allreduce_fusion enable_aiter_allreduce_fusion "
        "enable_torch_compile enable_torch_compile_debug_mode enable_flashinfer_mla enable_flashmla enable_flashinfer_cutlass_moe "
        "enable_flashinfer_trtllm_moe enable_flashinfer_cutedsl_moe enable_w4a4_mxfp4_megamoe "
        "disable_flashinfer_cutlass_moe_fp4_allgather disable_shared_experts_fusion enforce_shared_experts_fusion "
        "enable_waterfill enable_elastic_expert_backup elastic_ep_rejoin enable_prefill_cp "
        "enable_dsa_cache_layer_split enable_hierarchical_cache enable_lmcache enable_flexkv "
        "enable_broadcast_mm_inputs_process enable_prefix_mm_cache mm_enable_dp_encoder enable_mm_global_cache "
        "trust_mm_content_hashes disable_fast_image_processor keep_mm_feature_on_device enable_two_batch_overlap "
        "enable_single_batch_overlap disaggregation_decode_enable_radix_cache "
        "disaggregation_decode_enable_offload_kvcache enable_adaptive_dispatch_to_encoder enable_pdmux "
        "weight_loader_disable_mmap weight_loader_prefetch_checkpoints weight_loader_drop_cache_after_load "
        "remote_instance_weight_loader_start_seed_via_transfer_engine delete_ckpt_after_loading "
        "checkpoint_engine_wait_weights_before_ready enable_prefill_delayer enable_deterministic_inference "
        "enable_dynamic_batch_tokenizer enable_tokenizer_batch_encode disable_tokenizer_batch_decode "
        "enable_memory_saver enable_weights_cpu_backup enable_draft_weights_cpu_backup "
        "enable_custom_logit_processor enable_return_hidden_states enable_return_routed_experts "
        "enable_return_indexer_topk disable_outlines_disk_cache enable_mis enable_nan_detection enable_tf32_matmul "
        "enable_lora_overlap_loading experts_shared_outer_loras lora_use_virtual_experts lora_strict_loading "
        "enable_mamba_cache_stochastic_rounding enable_int8_mamba_checkpoint enable_linear_replayssm "
        "enable_linear_replayssm_spec prefill_only_disable_kv_cache disable_jump_forward disable_mla "
        "disable_nan_detection disable_cp_decode_attn_tp enable_prefill_context_parallel "
        "enable_dsa_prefill_context_parallel enable_nsa_prefill_context_parallel enable_dsa_prefill_cp_layersplit "
        "prefill_round_robin_balance disable_aiter_allreduce_fusion_in_decode disable_aiter_allreduce_fusion_in_prefill "
        "disaggregation_enable_kv_checksum dllm_fdfo enable_amd_monokernel enable_decoder_swa_bounded_replay "
        "enable_dsa_fused_indexer enable_encoder_swa_bounded_replay enable_hicache enable_http_worker_reuseport "
        "enable_layernorm_sp enable_lean_attention enable_linker_mla_dedup enable_megamoe_for_layernorm_sp "
        "enable_nvidia_megakernel enable_pd_role_switch enable_response_store enable_return_aux_hidden_states "
        "enable_unified_cache_external_linker enable_watermark return_input_ids return_output_ids "
        "trust_request_chat_template watermark_default_enabled watermark_enforce_all",
        "int": "port nccl_port grpc_port smg_http_sidecar_port gated_launch_port tokenizer_worker_num "
        "detokenizer_worker_num max_queued_requests max_total_tokens chunked_prefill_size max_prefill_tokens "
        "prefill_max_requests prefill_decode_interval default_priority_value priority_scheduling_preemption_threshold "
        "page_size c128_page_size num_continuous_decode_steps scheduler_recv_interval dist_timeout nnodes node_rank "
        "pp_max_micro_batch_size max_micro_batch_size pp_async_batch_depth base_gpu_id gpu_id_step random_seed "
        "http2_max_concurrent_streams asr_max_buffer_seconds asr_max_concurrent_sessions stream_interval "
        "batch_notify_size log_requests_level load_snapshot_publish_interval decode_log_interval cuda_graph_max_bs "
        "cuda_graph_max_bs_decode cuda_graph_max_bs_prefill piecewise_cuda_graph_max_tokens "
        "triton_attention_num_kv_splits triton_attention_split_tile_size torch_compile_max_bs "
        "eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk expert_distribution_recorder_buffer_size "
        "fuseep_mode max_mamba_cache_size mamba_max_states_per_path mamba_cache_philox_rounds mamba_track_interval "
        "int8_mamba_ckpt_size linear_replayssm_cache_len hicache_size mm_processor_worker_num mm_io_worker_num "
        "media_url_max_file_size_mb mm_preprocess_cache_size_mb max_lora_rank max_loaded_loras max_loras_per_batch "
        "max_lora_chunk_size offload_group_size offload_num_in_group offload_prefetch_step "
        "disaggregation_bootstrap_port disaggregation_decode_extra_slots disaggregation_decode_polling_interval "
        "disaggregation_decode_tp disaggregation_decode_dp disaggregation_prefill_pp num_reserved_decode_tokens "
        "optimistic_prefill_attempts encoder_bootstrap_port sm_group_num weight_loader_prefetch_num_threads "
        "remote_instance_weight_loader_seed_instance_service_port engine_info_bootstrap_port weight_cache_timeout "
        "prefill_delayer_max_delay_passes min_free_slots_delay kv_canary_sweep_interval "
        "dynamic_batch_tokenizer_batch_size constrained_json_max_whitespace_cnt context_bucket "
        "cuda_graph_max_seq_len_prefill cuda_graph_prefill_max_context dsa_triton_union grpc_http_sidecar_port "
        "grpc_response_timeout_secs grpc_worker_threads hicache_storage_prefetch_retry_max_attempts "
        "hicache_storage_prefetch_retry_poll_interval http2_initial_connection_window_size prefill_decode_interval_min_bs "
        "sampling_mask_max_tokens swa_prefix_tails watermark_context_window",
        "number": "mem_fraction_static schedule_conservativeness swa_full_tokens_ratio watchdog_timeout "
        "soft_watchdog_timeout gc_warning_threshold_secs eplb_min_rebalancing_utilization_threshold "
        "elastic_ep_scale_timeout mamba_full_memory_ratio hicache_ratio tbo_token_distribution_threshold "
        "cpu_offload_gb lora_drain_wait_threshold prefill_delayer_token_usage_low_watermark "
        "prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms dynamic_batch_tokenizer_batch_timeout "
        "disaggregation_decode_host_receive_threshold hicache_host_memory_fraction watermark_max_probability "
        "watermark_mixing_probability",
        "str or list": "log_requests_target uvicorn_access_log_exclude_prefixes lora_target_modules "
        "flashinfer_autotune_skip_ops encoder_urls encoder_register_urls custom_weight_loader "
        "tokenizer_metrics_allowed_custom_labels prompt_tokens_buckets generation_tokens_buckets allowed_media_domains "
        "sidecar_args",
        "scalar or list": "cuda_graph_bs cuda_graph_bs_decode cuda_graph_bs_prefill piecewise_cuda_graph_tokens numa_node "
        "gc_threshold bucket_time_to_first_token bucket_e2e_request_latency bucket_inter_token_latency debug_tensor_dump_layers "
        "prefill_delayer_forward_passes_buckets prefill_delayer_wait_seconds_buckets "
        "remote_instance_weight_loader_send_weights_group_ports return_aux_hidden_state_layer_ids",
        "any": "deepep_config hicache_storage_backend_extra_config extra_metric_labels kv_events_config "
        "default_chat_template_kwargs preferred_sampling_params model_loader_extra_config mm_process_config "
        "limit_mm_data_per_request forward_hooks modelexpress_config model_checksum init_expert_location "
        "disaggregation_config radix_eviction_policy_config stat_loggers unified_cache_external_linker_config",
    }
)

GRAPHS = of_kinds(
    {
        "bool": "disable_cuda_graph disable_decode_cuda_graph",
        "str": "cuda_graph_backend_decode",
        "any": "cuda_graph_config",
    }
)

REFUSED = {
    "json_model_override_args": "give a checkpoint folder whose config.json says it",
    "is_embedding": "embedding models are not supported",
    "encoder_only": "encoders are not supported",
    "dllm_algorithm": "diffusion models are not supported",
    "dllm_algorithm_config": "diffusion models are not supported",
    "enable_hisparse": "the cache lies on the ranks: no part of it in the host's memory",
    "hisparse_config": "the cache lies on the ranks: no part of it in the host's memory",
    "hierarchical_sparse_attention_extra_config": "the cache lies on the ranks: no part of it in the host's memory",
    "enable_double_sparsity": "which keys are attended to is the model's own",
    "enable_dense_mlp_attn_tp": "FFNs are cut over all ranks",
    "enable_shared_experts_attn_tp": "FFNs are cut over all ranks",
    "shared_experts_tp_size": "FFNs are cut over all ranks",
    "enable_kv_cache_sharding": "it shards the caches of prompts; those of a server that decodes are sharded by dcp_size",
    "enable_cp_decode_attn_tp": "it needs attn_cp_size > 1, which is not supported; decode context parallelism is dcp_size",
    "config": "it names another file; give that one",
}

_DRAFTS = "drafts belong to the loop that decodes: generate(prompt_lookup_num_tokens=..., assistant_model=...)"
_LORA = "LoRA is not supported"
_EXPERTS = "an expert lies once, on the rank that the plan says"
_SPECULATIVE = (
    "algorithm draft_model_path draft_model draft_model_revision draft_load_format num_steps eagle_topk "
    "num_draft_tokens dflash_block_size dspark_block_size dspark_sps_table_path dspark_confidence_sts_path "
    "dspark_align_verify_tokens_to_graph_tier accept_threshold_single accept_threshold_acc use_rejection_sampling "
    "token_map attention_mode draft_attention_backend dsa_topk_backend draft_kv_cache_dtype draft_window_size "
    "moe_runner_backend moe_a2a_backend draft_model_quantization skip_dp_mlp_sync adaptive adaptive_config "
    "ngram_min_bfs_breadth ngram_max_bfs_breadth ngram_match_type ngram_max_trie_depth ngram_capacity "
    "ngram_external_corpus_path ngram_external_sam_budget ngram_external_corpus_max_tokens "
    "ngram_min_match_window_size ngram_max_match_window_size ngram_branch_length boundary_reduction "
    "domino_candidate_pool_size use_block_verification draft_sink_size enable_w4a4_mxfp4_megamoe"
)
BESIDE = {
    **{f"speculative_{name}": _DRAFTS for name in _SPECULATIVE.split()},
    "enable_multi_layer_eagle": _DRAFTS,
    "decoupled_spec_role": _DRAFTS,
    "decoupled_spec_bind_endpoint": _DRAFTS,
    "decoupled_spec_connect_endpoints": _DRAFTS,
    "decoupled_spec_rank": _DRAFTS,
    "quantization": QUANTISED,
    "modelopt_quant": QUANTISED,
    "quantize_and_serve": QUANTISED,
    "enable_quant_communications": EXCHANGED,
    "enable_fp32_lm_head": "the head computes in the model's dtype",
    "enable_lora": _LORA,
    "lora_paths": _LORA,
    "enable_eplb": _EXPERTS,
    "ep_num_redundant_experts": _EXPERTS,
    "max_ep_size": _EXPERTS,
    "ep_join_mode": _EXPERTS,
    "elastic_ep_join_mode": _EXPERTS,
    "ep_join_rank_offset": _EXPERTS,
    "elastic_ep_join_rank_offset": _EXPERTS,
    "elastic_ep_initial_size": _EXPERTS,
    "enable_paged_experts": ON_CPU,
    "paged_experts_num_resident": ON_CPU,
    "ple_offload_embedding": ON_CPU,
    "ple_offload_backend": ON_CPU,
    "ple_offload_dir": ON_CPU,
    "uno_lora_path": _LORA,
    "kt_weight_path": ON_CPU,
    "kt_method": ON_CPU,
    "kt_cpuinfer": ON_CPU,
    "kt_threadpool_count": ON_CPU,
    "kt_num_gpu_experts": ON_CPU,
    "kt_max_deferred_experts_per_token": ON_CPU,
}

_WHOLE = "a rank's cache is its tokens of every layer"
_PREFILL = "context parallelism of the prefill is not supported"
CHANGING = {
    "disable_mla": Changing(DECOMPRESSED),
    "torchao_config": Changing(QUANTISED),
    "rl_quant_profile": Changing(QUANTISED),
    "load_format": Changing(QUANTISED, at=("bitsandbytes", "gguf", "flash_rl")),
    "enable_w4a4_mxfp4_megamoe": Changing(QUANTISED),
    "enable_deepseek_v4_fp4_indexer": Changing("keys of an indexer are cached in the model's dtype"),
    "deepep_dispatcher_output_dtype": Changing(EXCHANGED, but=("auto", "bf16", "bfloat16")),
    "init_expert_location": Changing(_EXPERTS, but=("trivial",)),
    "enable_dsa_cache_layer_split": Changing(_WHOLE),
    "enable_dsa_prefill_cp_layersplit": Changing(_WHOLE),
    "enable_prefill_cp": Changing(_PREFILL),
    "enable_prefill_context_parallel": Changing(_PREFILL),
    "enable_dsa_prefill_context_parallel": Changing(_PREFILL),
    "enable_nsa_prefill_context_parallel": Changing(_PREFILL),
    "prefill_only_disable_kv_cache": Changing("a plan is of decoding"),
    "cpu_offload_gb": Changing(ON_CPU),
    "offload_group_size": Changing(ON_CPU, but=(-1, "-1")),
    "mamba_ssm_dtype": Changing(STATES, but=("auto", "float32")),
    "enable_mamba_cache_stochastic_rounding": Changing(STATES),
    "enable_int8_mamba_checkpoint": Changing(STATES),
    "enable_tf32_matmul": Changing("products of float32 matrices are in float32"),
    "forward_hooks": Changing("hooks change what a module computes"),
    "decrypted_config_file": Changing("give a checkpoint folder whose config.json says it"),
}
OF_FP8_CACHE = {"quantization_param_path": FP8_SCALES}
_IDLE = (
    "USE_MODELSCOPE HOST_IP PORT LOGGING_CONFIG_PATH LOG_MS LOG_REQUEST_HEADERS TORCH_PROFILER_DIR PROFILE_WITH_STACK "
    "ALLOW_OVERWRITE_LONGER_CONTEXT_LEN WAIT_BEFORE_KILL_SCHEDULER_SECONDS SET_CPU_AFFINITY BLOCK_NONZERO_RANK_CHILDREN "
    "ENABLE_JIT_DEEPGEMM JIT_DEEPGEMM_PRECOMPILE JIT_DEEPGEMM_FAST_WARMUP DG_CACHE_DIR DG_USE_NVRTC USE_DEEPGEMM_BMM "
    "ENABLE_FLASHINFER_FP8_GEMM ENABLE_FLASHINFER_GEMM FLASHINFER_WORKSPACE_SIZE FLASHINFER_USE_TENSOR_CORE "
    "FLASHINFER_PREFILL_SPLIT_TILE_SIZE FLASHINFER_DECODE_SPLIT_TILE_SIZE DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK "
    "DEEPEP_BF16_DISPATCH MOONCAKE_CUSTOM_MEM_POOL MOONCAKE_TRANS_THREAD DISAGGREGATION_BOOTSTRAP_TIMEOUT "
    "DISAGGREGATION_WAITING_TIMEOUT DISAGGREGATION_HEARTBEAT_INTERVAL DISAGGREGATION_HEARTBEAT_MAX_FAILURE "
    "DISAGGREGATION_THREAD_POOL_SIZE DISAGGREGATION_QUEUE_SIZE DISAGGREGATION_NUM_PRE_ALLOCATE_REQS "
    "DECODE_BOOTSTRAP_TIMEOUT HACK_SEQ_BOOTSTRAP_ROOM LOCAL_IP_NIC IS_FLASHINFER_AVAILABLE USE_AITER AITER_MLA_PERSIST "
    "ROCM_FUSED_DECODE_MLA MOE_PADDING SCHEDULER_MAX_RECV_PER_POLL SCHEDULER_SKIP_ALL_GATHER ENABLE_SPEC_V2 "
    "ENABLE_OVERLAP_PLAN_STREAM ENABLE_TORCH_COMPILE CLIP_MAX_NEW_TOKENS_ESTIMATION INIT_NEW_TOKEN_RATIO "
    "MIN_NEW_TOKEN_RATIO_FACTOR NEW_TOKEN_RATIO_DECAY_STEPS RETRACT_DECODE_STEPS DISABLE_TP_MEMORY_INBALANCE_CHECK "
    "ENABLE_TP_MEMORY_INBALANCE_CHECK CUTEDSL_MOE_NVFP4_DISPATCH BLACKWELL_OVERLAP_SHARED_EXPERTS_OUTSIDE_SBO "
    "DP_ROUND_ROBIN TOOL_STRICT_LEVEL HEALTH_CHECK_TIMEOUT RECORD_STEP_TIME CI_SMALL_KV_SIZE TEST_STUCK_DETOKENIZER "
    "GRPC_PORT EXTERNAL_MODEL_PACKAGE EXTERNAL_MM_MODEL_ARCH VLM_CACHE_SIZE_MB IMAGE_MAX_PIXELS RESIZE_RESAMPLE"
)
IDLE_VARIABLES = frozenset(f"SGLANG_{name}" for name in _IDLE.split())
CHANGING_VARIABLES = {"SGLANG_NVFP4_CKPT_FP8_GEMM_IN_ATTN": QUANTISED, "SGLANG_CPU_QUANTIZATION": QUANTISED}

MARKERS = (
    "dcp_size",
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
    "dcp_replicate_q_proj",
    "enable_dp_attention",
    "mem_fraction_static",
    "moe_a2a_backend",
)

SHORT = {
    "tensor_parallel_size": "tp_size",
    "decode_context_parallel_size": "dcp_size",
    "pipeline_parallel_size": "pp_size",
    "data_parallel_size": "dp_size",
    "attention_data_parallel_size": "attn_dp_size",
    "expert_parallel_size": "ep_size",
    "attention_context_parallel_size": "attn_cp_size",
    "moe_data_parallel_size": "moe_dp_size",
    "tp": "tp_size",
    "dcp": "dcp_size",
    "pp": "pp_size",
    "dp": "dp_size",
    "ep": "ep_size",
    "model": "model_path",
}

SGLANG = EngineKeys(
    "SGLang", MARKERS, APPLIED, WITHOUT_EFFECT, REFUSED, BESIDE,
    nullable=("dcp_replicate_q_proj", "moe_dense_tp_size", "max_running_requests", "context_length"), short=SHORT,
    graphs=GRAPHS, changing=CHANGING, prefix=("SGLANG_",), changing_variables=CHANGING_VARIABLES,
    idle_variables=IDLE_VARIABLES,
)  # fmt: skip
