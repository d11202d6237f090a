"""Options as the recipe of an engine: a command line of vLLM or SGLang, a YAML of TensorRT-LLM.

What is written is read back by the reader of that engine. Every option that does not come back as it is has no argument
there: a comment says it, in a form that the reader takes (`# not in vLLM: v_up=before: ...`).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import yaml

from helix_compile.config.options import FP8_E4M3, OPTIONS, OWN_NAMES, HelixOptions, own_fields
from helix_compile.config.reading import read_recipe
from helix_compile.errors import PlanError

_BLOCK = 16  # tokens of vLLM's own pages, unless a backend wants larger ones
_PAGES = (16, 32, 64, 128)

_WHY = {
    "v_up": "W_UV is multiplied {value} the exchange here; there is no argument for it",
    "ep": "experts lie over {ep} of the {ranks} ranks here, tpa apart from the FFN's own split; the engine has no such degree",
    "tokens_per_block": "blocks of {value} tokens are dealt in turn here; the engine deals others, unequal to these",
    "merge": "the exchange here; the engine has one way",
    "q_proj": "where queries are projected here; the engine has one way",
    "stage": "the stage that is planned; the engine runs all of them",
    "pp_split": "how layers that pp does not divide are dealt here; the engine deals them otherwise",
    "lower": "how the graph runs here",
    "cache_dtype": "what the cache is in here; the engine has no such format",
    "cache_scale": "what the cache's values are divided by here; the engine takes scales from the checkpoint",
    "pad_heads": "heads and experts that do not divide are padded with zeros here; the engine decides for itself",
    "window": "where the cache of sliding windows lies here ({value}); the engine decides for itself",
    "head": "embedding and output head are {value}ed here; the engine decides for itself",
    "check": "when ranks compare what they were given for a step here",
    "overlap": "what runs while partial attention is exchanged here; the engine has no such order",
    "unmatched": "what happens here to layers that are not recognised",
}


def engine_recipe(options: HelixOptions, ep: int, engine: str, model: str) -> str:
    """The text; see HelixPlan.to_engine.

    Args:
        options: of the plan.
        ep: the expert parallelism that was planned, also where the options leave it open.
        engine: one of ENGINE_NAMES.
        model: what the engine is to load.
    """
    name, write = check_engine(engine)
    text = write(options, ep, model)
    suffix = ".yaml" if name == "TensorRT-LLM" else ""
    read = read_recipe(yaml.safe_load(text) if suffix else text, own_fields, OWN_NAMES, name)
    back = HelixOptions(**read.fields)
    head = [f"# {line}" for line in _head(name, options, model)]
    for field in OPTIONS:
        value = getattr(options, field)
        if value != getattr(back, field):
            said = str(value).lower() if value is None or isinstance(value, bool) else value
            if isinstance(value, tuple):  # of one number too, as Python has it
                said = ",".join(map(str, value)) + ("," if len(value) == 1 else "")
            head.append(f"# not in {name}: {field}={said}: {_why(field, value, ep, options)}")
    return "\n".join((*head, text))


def check_engine(engine: str) -> tuple[str, Callable[[HelixOptions, int, str], str]]:
    """(the engine's name, what writes its recipe).

    Raises:
        PlanError: no such engine.
    """
    if engine not in _WRITERS:
        raise PlanError(f"engine {engine!r} is unknown; expected one of {', '.join(map(repr, _WRITERS))}")
    return _WRITERS[engine]


def _why(field: str, value: Any, ep: int, options: HelixOptions) -> str:
    if field == "ep" and value is None:
        return f"the largest that divides the ranks and the experts, {ep} for this model"
    ranks = options.cp * options.tpa
    return _WHY.get(field, "ours alone").format(value=value, ep=ep, ranks=ranks)


def _head(name: str, options: HelixOptions, model: str) -> list[str]:
    layout = f"cp={options.cp}, tpa={options.tpa}"
    if name != "TensorRT-LLM":
        return [f"{name}: {layout}"]
    lines = [f"TensorRT-LLM: {layout}; trtllm-serve {shlex.quote(model)} --extra_llm_api_options THIS_FILE"]
    if options.cp > 1:
        lines.append("HELIX decodes; prefill servers of their own (context_servers) hand it their caches")
    return lines


def _vllm(options: HelixOptions, ep: int, model: str) -> str:
    ranks = options.cp * options.tpa
    flags = [f"--tensor-parallel-size {ranks}"]
    if options.cp > 1:
        flags += [f"--decode-context-parallel-size {options.cp}", f"--dcp-comm-backend {options.merge}"]
        if any(page % options.tokens_per_block == 0 for page in _PAGES):
            flags.append(f"--cp-kv-cache-interleave-size {options.tokens_per_block}")
            if options.tokens_per_block > _BLOCK:
                flags.append(f"--block-size {options.tokens_per_block}")
        flags.append("--dcp-q-replicate" if options.q_proj == "replicate" else "--no-dcp-q-replicate")
    if ep == ranks > 1:
        flags.append("--enable-expert-parallel")
    if options.pp > 1:
        flags.append(f"--pipeline-parallel-size {options.pp}")
    if options.cache_dtype != "auto":
        flags.append(f"--kv-cache-dtype {options.cache_dtype}")
    if not options.cuda_graphs:
        flags.append("""--compilation-config '{"cudagraph_mode": "NONE"}'""")
    flags += [f"--max-num-seqs {options.max_batch_size}", f"--max-model-len {options.max_seq_len}"]
    return _command(f"vllm serve {shlex.quote(model)}", flags)


def _sglang(options: HelixOptions, ep: int, model: str) -> str:
    flags = [f"--tp-size {options.cp * options.tpa}"]
    if options.cp > 1:
        flags += [f"--dcp-size {options.cp}", f"--dcp-comm-backend {options.merge}"]
        if options.merge == "a2a":
            flags.append("--dcp-replicate-q-proj" if options.q_proj == "replicate" else "--no-dcp-replicate-q-proj")
    if ep > 1:
        flags.append(f"--ep-size {ep}")
    if options.pp > 1:
        flags.append(f"--pp-size {options.pp}")
    if options.cache_dtype == FP8_E4M3:
        flags.append(f"--kv-cache-dtype {FP8_E4M3}")
    if not options.cuda_graphs:
        flags.append("--disable-decode-cuda-graph")
    flags += [f"--max-running-requests {options.max_batch_size}", f"--context-length {options.max_seq_len}"]
    return _command(f"python -m sglang.launch_server --model-path {shlex.quote(model)}", flags)


def _command(program: str, flags: list[str]) -> str:
    return " \\\n  ".join((program, *flags)) + "\n"


def _trtllm(options: HelixOptions, ep: int, model: str) -> str:
    values: dict[str, Any] = {
        "tensor_parallel_size": options.tpa,
        "context_parallel_size": options.cp,
        "pipeline_parallel_size": options.pp,
        "moe_expert_parallel_size": ep,
        "moe_tensor_parallel_size": options.cp * options.tpa // ep,
        "max_batch_size": options.max_batch_size,
        "max_seq_len": options.max_seq_len,
    }
    if options.cp > 1:
        values["cp_config"] = {"cp_type": "HELIX", "tokens_per_block": options.tokens_per_block}
    values["kv_cache_config"] = {"tokens_per_block": options.tokens_per_block}
    if options.cache_dtype != "auto":
        values["kv_cache_config"]["dtype"] = "fp8" if options.cache_dtype == FP8_E4M3 else options.cache_dtype
    if not options.cuda_graphs:
        values["cuda_graph_config"] = None
    return yaml.safe_dump(values, sort_keys=False)


_WRITERS: dict[str, tuple[str, Callable[[HelixOptions, int, str], str]]] = {
    "vllm": ("vLLM", _vllm),
    "sglang": ("SGLang", _sglang),
    "trtllm": ("TensorRT-LLM", _trtllm),
}
ENGINE_NAMES = tuple(_WRITERS)
