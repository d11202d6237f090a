"""TensorRT-LLM's arguments, as read in its sources (LLM arguments, disaggregated serving) up to autumn 2026, by what they are here."""

from __future__ import annotations

from dataclasses import replace

from helix_compile.config.files import Changing, of_kinds
from helix_compile.config.recipe import EXCHANGED, STATES, EngineKeys

APPLIED = of_kinds(
    {
        "int": "context_parallel_size tensor_parallel_size pipeline_parallel_size moe_expert_parallel_size "
        "moe_tensor_parallel_size moe_cluster_parallel_size max_batch_size max_seq_len max_beam_width",
        "bool": "enable_attention_dp",
        "str": "dtype",
        "mapping": "cp_config kv_cache_config moe_config",
        "list": "pp_partition",
    }
)

# understood, checked for their type, and without effect on what is compiled
WITHOUT_EFFECT = of_kinds(
    {
        "int": "max_num_tokens max_input_len gpus_per_node stream_interval num_postprocess_workers port "
        "garbage_collection_gen0_threshold batch_wait_timeout_iters iter_stats_max_iterations "
        "request_stats_max_iterations perf_metrics_max_requests encoder_max_batch_size encoder_max_num_tokens "
        "num_serve_frontends max_stats_len num_instances max_retries req_timeout_secs "
        "health_check_interval_secs server_role_port node_id num_workers",
        "str": "model tokenizer tokenizer_mode custom_tokenizer backend attn_backend load_format allreduce_strategy "
        "guided_decoding_backend log_level hostname host revision tokenizer_revision reasoning_parser tool_parser "
        "post_processor_hook postprocess_tokenizer_dir otlp_traces_endpoint perf_metrics_output_dir "
        "orchestrator_type sampler_type generation_config checkpoint_format checkpoint_loader checkpoint_io_policy "
        "ray_worker_extension_cls prefill_cuda_graph_backend served_model_name chat_template batching_type "
        "schedule_style kv_cache_transfer_mode metadata_server_config_file server_role "
        "disagg_coordinator_url",
        "bool": "trust_remote_code skip_tokenizer_init disable_overlap_scheduler enable_chunked_prefill print_iter_log "
        "enable_iter_perf_stats enable_iter_req_stats enable_autotuner enable_lm_head_tp_in_adp "
        "enable_layerwise_nvtx_marker enable_min_latency enable_energy_metrics return_perf_metrics "
        "gather_generation_logits disable_mm_encoder enable_resource_governor enable_in_graph_sampling "
        "enable_speculative_beam_history_d2h enable_early_first_token_response enable_low_latency_host_dispatch "
        "enable_encoder_decoder_mixed_cuda_graph sampler_force_async_worker use_fine_grained_sync "
        "use_cute_dsl_blockscaling_mm use_cute_dsl_blockscaling_bmm use_cute_dsl_bf16_bmm use_cute_dsl_bf16_gemm "
        "normalize_log_probs fail_fast_on_attention_window_too_large allow_request_chat_template "
        "gen_strip_message_history gen_tokids_ctxbytes",
        "mapping": "encoder_cuda_graph_config torch_compile_config scheduler_config "
        "cache_transceiver_config attention_dp_config nvfp4_gemm_config peft_cache_config kv_connector_config "
        "prometheus_metrics_config telemetry_config env_overrides multimodal_config mx_config gms_config "
        "ray_placement_config ray_worker_nsight_options sleep_config reorder_policy_config "
        "layer_wise_benchmarks_config extended_runtime_perf_knob_config conditional_disagg_config disagg_cluster "
        "disagg_cluster_config otlp_config router perf_metrics_config",
        "number": "batching_wait_timeout_ms batch_wait_timeout_ms batch_wait_max_tokens_ratio free_gpu_memory_fraction",
        "list": "prefill_capture_num_tokens urls",
        "any": "build_config batched_logits_processor mpi_session postproc_workers",
    }
)

GRAPHS = {"cuda_graph_config": "mapping"}

CACHE_WITHOUT_EFFECT = of_kinds(
    {
        "number": "free_gpu_memory_fraction cross_kv_cache_fraction max_util_for_resume kv_pool_rebalance_cooldown_secs "
        "kv_pool_rebalance_ratio_threshold kv_pool_rebalance_moving_average_decay",
        "int": "max_tokens host_cache_size disk_cache_size event_buffer_max_size max_gpu_total_bytes "
        "secondary_offload_min_priority attention_dp_events_gather_period_ms iteration_stats_interval "
        "mamba_ssm_philox_rounds mamba_state_cache_interval kv_pool_rebalance_min_sampled_kv_caches "
        "kv_pool_rebalance_target_ratio_update_interval kv_pool_rebalance_check_interval disk_prefetch_num_reqs "
        "fp8_context_mla_kv_len_cap avg_seq_len",
        "bool": "enable_block_reuse enable_partial_reuse copy_on_partial_reuse onboard_blocks use_uvm "
        "mamba_ssm_stochastic_rounding enable_swa_scratch_reuse enable_kv_pool_rebalance",
        "str": "disk_cache_path mamba_ssm_cache_dtype kv_cache_event_hash_algo",
        "mapping": "kv_events_config mamba_state_config block_reuse_config",
        "list": "pool_ratio",
        "any": "use_kv_cache_manager_v2",
    }
)

MOE_WITHOUT_EFFECT = of_kinds(
    {
        "str": "backend",
        "int": "max_num_tokens",
        "bool": "disable_finalize_fusion use_low_precision_moe_combine use_cute_dsl_nvfp4",
        "any": "warp_decode",
    }
)

# of sparse_attention_config with algorithm dsa: these are the model's, the others are of kernels
INDEXER = ("index_n_heads", "index_head_dim", "index_topk")

_EXPERTS = "an expert lies once, on the rank that the plan says"
_LORA = "LoRA is not supported"
_QUANT = "a checkpoint says itself how its weights are quantised, and they are computed in --dtype"
MOE_BESIDE = {"load_balancer": _EXPERTS}

REFUSED = {
    "sparse_attention_config": "which keys are attended to is the model's own: an indexer in it (dsa) is planned",
    "kv_cache_compression_config": "the cache holds every token",
    "model_kwargs": "give a checkpoint folder whose config.json says it",
    "encode_only": "encoders are not supported",
    "mm_encoder_only": "encoders are not supported",
    "dwdp_config": "it shares experts of a prefill server; a plan is of decoding",
}

BESIDE = {
    "speculative_config": "drafts belong to the loop that decodes: generate(prompt_lookup_num_tokens=..., assistant_model=...)",
    "decoding_config": "drafts belong to the loop that decodes",
    "quant_config": _QUANT,
    "force_dynamic_quantization": _QUANT,
    "lora_config": _LORA,
    "enable_lora": _LORA,
    "enable_prompt_adapter": "prompt adapters are not supported",
    "enable_mla_skip_correction": "the softmax is corrected at every step, exactly",
    "mla_skip_correction_threshold": "the softmax is corrected at every step, exactly",
}

CHANGING = {
    "allreduce_strategy": Changing(EXCHANGED, at=("lowprecision",)),
    "attn_backend": Changing(
        "each token attends to all before it", at=("flashinfer_star_attention", "vanilla_star_attention")
    ),
    "build_config": Changing("engines that are built are not planned: give the options of the PyTorch backend"),
}
CACHE_CHANGING = {
    "mamba_ssm_cache_dtype": Changing(STATES, but=("auto", "float32")),
    "mamba_ssm_stochastic_rounding": Changing(STATES),
}
MOE_CHANGING = {"use_low_precision_moe_combine": Changing(EXCHANGED)}
# of the servers in front, or of both kinds of servers each: stated at the top they say nothing of generation_servers
DISAGGREGATED = (
    "hostname", "port", "max_retries", "perf_metrics_max_requests", "disagg_cluster", "conditional_disagg_config", "otlp_config",
    "node_id", "num_workers", "disagg_coordinator_url", "allow_request_chat_template", "gen_strip_message_history",
    "gen_tokids_ctxbytes", "schedule_style", "router", "num_instances", "urls",
)  # fmt: skip

CACHE_REFUSED = {
    "max_attention_window": "windows are the model's own, read off its mask; the cache keeps all tokens",
    "sink_token_length": "a prefix that stays visible behind a window is not supported; sinks that are parameters are the model's own",
}

MARKERS = (
    "context_parallel_size",
    "cp_config",
    "kv_cache_config",
    "moe_expert_parallel_size",
    "moe_tensor_parallel_size",
    "moe_cluster_parallel_size",
    "context_servers",
    "generation_servers",
    "worker_config",
    "cache_transceiver_config",
    "disable_overlap_scheduler",
)

TRTLLM = EngineKeys(
    "TensorRT-LLM", MARKERS, APPLIED, WITHOUT_EFFECT, REFUSED, BESIDE,
    nullable=(
        "cp_config", "moe_expert_parallel_size", "moe_tensor_parallel_size", "moe_cluster_parallel_size",
        "max_batch_size", "max_seq_len", "max_beam_width", "pp_partition", "cuda_graph_config",
    ),
    graphs=GRAPHS,
    changing=CHANGING,
)  # fmt: skip

# what `trtllm-serve MODEL` takes besides: these have no effect here, and options of a file have other names
COMMAND_ONLY = of_kinds(
    {
        "str": "media_io_kwargs disagg_cluster_uri",
        "list": "custom_module_dirs",
        "number": "video_pruning_rate",
        "bool": "grpc",
    }
)
COMMAND_FILE, COMMAND_CACHE = "extra_llm_api_options", "kv_cache_dtype"
TRTLLM_COMMAND = replace(
    TRTLLM,
    applied={**APPLIED, COMMAND_FILE: "str", COMMAND_CACHE: "str"},
    without_effect={**WITHOUT_EFFECT, **COMMAND_ONLY},
    refused={**REFUSED, "extra_visual_gen_options": "diffusion models are not supported"},
    short={
        "tp_size": "tensor_parallel_size",
        "pp_size": "pipeline_parallel_size",
        "cp_size": "context_parallel_size",
        "ep_size": "moe_expert_parallel_size",
        "cluster_size": "moe_cluster_parallel_size",
        "kv_cache_free_gpu_memory_fraction": "free_gpu_memory_fraction",
        "hf_revision": "revision",
        "config": COMMAND_FILE,
    },
)
# `trtllm-serve disaggregated`: the file says all
TRTLLM_DISAGGREGATED = EngineKeys(
    "TensorRT-LLM", (), {"config_file": "str"},
    of_kinds({"int": "server_start_timeout request_timeout metrics_log_interval", "str": "log_level metadata_server_config_file"}),
    {}, {}, short={"c": "config_file", "t": "server_start_timeout", "r": "request_timeout", "l": "log_level",
                   "m": "metadata_server_config_file"},
)  # fmt: skip
TRTLLM_OTHER_SERVERS = ("mm_embedding_serve", "embeddings", "visual_gen")
