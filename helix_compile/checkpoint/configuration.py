"""config.json as it is published -> transformers' configuration of its text model, and what it says besides.

Nothing is executed and nothing is asked: an auto_map is ignored. Renames, spellings and refusals are tables below.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helix_compile.checkpoint.rope_stated import rope_of
from helix_compile.errors import CheckpointError


class Rename(NamedTuple):
    """A model_type that is another one's architecture."""

    to: str
    evidence: str


RENAMES = {
    "kimi_k2": Rename("deepseek_v3", "its architectures and its auto_map name DeepSeek's own DeepseekV3ForCausalLM")
}

# releases whose architecture transformers does not have: what is missing, and the nearest model type that it has
NOT_THERE = {
    "kimi_k3": (
        "its MLA without rope and with an output gate, the activation `situ`, latent experts and residual blocks "
        "are in no class of transformers",
        "kimi_linear",
    ),
    "pangu_ultra_moe": ("it has key names and sandwich norms of its own", "deepseek_v3"),
}

# keys of one meaning; a release may spell it in a way that the class of its architecture does not read
SPELLINGS = (
    ("n_routed_experts", "num_experts", "num_local_experts", "num_routed_experts"),
    ("n_shared_experts", "num_shared_experts"),
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    ("num_hidden_layers", "num_layers", "n_layers"),
    ("dtype", "torch_dtype"),
)

_SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

# keys that the class does not read: these values are what it computes, others would be computed wrongly
_SIGMOID: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
_SPARSE = {**_SIGMOID, "moe_layer_freq": (1,), "mlp_bias": (False, None)}
MEANT: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v3": {**_SIGMOID, "moe_layer_freq": (1,)},
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "moe_layer_freq": (1,),
        "use_mla": (True,),
        "norm_topk_prob": (False, None),
    },
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "glm4_moe_lite": _SIGMOID,
    "axk1": {"scoring_func": ("sigmoid",)},
    "bailing_hybrid": {"score_function": ("sigmoid",)},
    "kimi_linear": {"mla_use_nope": (True,), "moe_router_activation_func": ("sigmoid",), "moe_layer_freq": (1,)},
    "longcat_flash": {
        "mla_scale_q_lora": (True,),
        "mla_scale_kv_lora": (True,),
        "zero_expert_type": ("identity",),
        "attention_method": ("MLA",),
        "norm_topk_prob": (False, None),
    },
    "mistral4": {"scoring_func": ("softmax",)},
}

TEXT_KEYS = ("text_config", "language_config", "llm_config")
# where wrappers keep the weights of their text model
TEXT_PREFIXES = ("language_model.", "model.language_model.", "text_model.", "model.text_model.", "llm.")
# where AutoGPTQ and AutoAWQ said what config.json says today
_OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_OF_THE_WRAPPER = ("torch_dtype", "dtype", "quantization_config", "tie_word_embeddings")
# a head of latent attention has a K and a V of its own: these classes repeat none, whatever num_key_value_heads says
_ONE_KV_A_HEAD = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "mistral4", "youtu", "longcat_flash")
_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "kv_lora_rank", "vocab_size")

# folders of other tools: how a file's name ends, and what can be done
_OTHER_FORMATS = {
    "params.json": "Mistral's own format, which is not read: take the release's config.json and model-*.safetensors",
    ".gguf": "of llama.cpp, which is not read: take the release's safetensors",
    "model_index.json": "of a pipeline of diffusers: pass the folder of its text model",
    "rank0.engine": "of a built TensorRT engine, which holds no weights to cut: take the release's safetensors",
    ".distcp": "of torch.distributed.checkpoint: write it by save_pretrained first",
}


@dataclass(frozen=True)
class Configuration:
    """What a config.json says.

    Attributes:
        config: of the text model, without quantization_config.
        model_class: transformers' causal language model of it.
        quantisations: what is said of quantised weights, and the file that says it: config.json, hf_quant_config.json.
        wrapped: the text model is part of another one; its weights have a prefix of TEXT_PREFIXES.
        notes: what was renamed, unwrapped or left unread.
    """

    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    quantisations: tuple[tuple[dict[str, Any], Path], ...]
    wrapped: bool
    notes: tuple[str, ...]


def read_configuration(path: Path) -> Configuration:
    """Read a config.json, or that of a folder. No code of the folder runs.

    Raises:
        CheckpointError: no such file, not JSON, an architecture that transformers does not have, values that its class
            does not take.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: can't be read: there is no such file{other_format(file.parent)}")
    stated = _json(file)
    outer = stated.pop("quantization_config", None)
    notes: list[str] = []
    stated, wrapped = _text_model(file, stated, notes)
    inner = stated.pop("quantization_config", None)
    own = [said for said in (outer, None if inner == outer else inner) if said]  # two are held against each other
    quantisations = _quantisations(file, own, notes)
    config = _in_its_wrapper(_built(file, stated, notes), notes)
    return Configuration(config, causal_class(config, file), quantisations, wrapped, tuple(notes))


def _quantisations(file: Path, own: list[Any], notes: list[str]) -> tuple[tuple[dict[str, Any], Path], ...]:
    """What config.json says, and hf_quant_config.json beside it, which modelopt writes."""
    found = [(dict(said), file) for said in own]
    beside = file.with_name("hf_quant_config.json")
    if beside.is_file():
        said = _json(beside).get("quantization") or {}
        if said.get("quant_algo"):
            found.append(({"quant_method": "modelopt", **said}, beside))
        else:
            notes.append(f"{beside.name} quantises no weights: no effect")
    for name, method in _OLD_FILES.items():
        if not found and (old := file.with_name(name)).is_file():
            found.append(({**_json(old), "quant_method": method}, old))
    return tuple(found)


def causal_class(config: PretrainedConfig, file: Path | str = "the configuration") -> type[PreTrainedModel]:
    """The causal language model of a configuration, also where transformers' own table has none for it.

    Raises:
        CheckpointError: there is none.
    """
    found = _causal_class_of(type(config))
    if found is not None:
        return found
    raise CheckpointError(
        f"{file}: transformers has no causal language model of model_type {config.model_type!r} alone"
    )


def _causal_class_of(config: type[PretrainedConfig]) -> type[PreTrainedModel] | None:
    """Of transformers' table; else of the module of that configuration, where a text model may run in a wrapper alone."""
    if config in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[config]
    try:
        home = vars(importlib.import_module(config.__module__.replace(".configuration_", ".modeling_")))
    except ImportError:
        return None
    endings = ("ForCausalLM", "ForConditionalGeneration") if "text_config" in config.sub_configs else ("ForCausalLM",)
    models: list[type[PreTrainedModel]] = [
        x for x in home.values() if inspect.isclass(x) and issubclass(x, PreTrainedModel)
    ]
    return next((x for x in models if x.__name__.endswith(endings) and x.config_class is config), None)


def _in_its_wrapper(config: PretrainedConfig, notes: list[str]) -> PretrainedConfig:
    """A text model without a causal language model of its own, in the wrapper that has one (Mistral-Large-4)."""
    if _causal_class_of(type(config)) is None:
        for outer in vars(sys.modules[type(config).__module__]).values():
            of_text = inspect.isclass(outer) and getattr(outer, "sub_configs", {}).get("text_config") is type(config)
            if of_text and (model := _causal_class_of(outer)) is not None:
                notes.append(
                    f"{config.model_type} runs in {model.__name__} alone: its parts for images are transformers' defaults"
                )
                return outer(text_config=config.to_dict(), tie_word_embeddings=config.tie_word_embeddings)
    return config


def _json(file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(file.read_text(encoding="utf-8-sig"))  # an editor may have put a mark before it
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file}: can't be read: expected an object, got {type(stated).__name__}")
    return stated


def _text_model(file: Path, stated: dict[str, Any], notes: list[str]) -> tuple[dict[str, Any], bool]:
    """The part of a wrapper's configuration that is its text model's."""
    kind = stated.get("model_type")
    _refuse_known(file, kind)
    key = next((k for k in TEXT_KEYS if isinstance(stated.get(k), dict) and _says_what(stated[k])), None)
    if key is None or _is_language_model(kind):
        return stated, False
    inner = stated[key].get("model_type")
    if {kind, inner} <= set(CONFIG_MAPPING) and _causal_class_of(CONFIG_MAPPING[inner]) is None:
        model = _causal_class_of(CONFIG_MAPPING[kind])
        if model is not None:
            notes.append(f"{kind}: its text model runs in {model.__name__} alone, which is taken whole, without images")
            return stated, False
    text = _with_the_wrappers(stated, stated[key], notes)
    others = [k for k in stated if k.endswith("_config") and k != key and isinstance(stated[k], dict)]
    beside = f"; {', '.join(others)} left out" if others else ""
    named = text.get("model_type") or text["architectures"][0]
    notes.append(f"{kind}: its text model ({key}: {named}) is taken{beside}")
    return text, True


def _with_the_wrappers(wrapper: dict[str, Any], text: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What the text model does not say, or says null of, is the wrapper's; the two names of dtype are one key."""
    said = {k: v for k, v in text.items() if not (v is None and k in _OF_THE_WRAPPER)}
    dtypes = {k: said[k] for k in ("dtype", "torch_dtype") if k in said}
    taken = {k: wrapper[k] for k in _OF_THE_WRAPPER if wrapper.get(k) is not None and k not in said}
    for key in ("dtype", "torch_dtype"):
        if dtypes and wrapper.get(key) not in (None, *dtypes.values()):
            own = next(iter(dtypes.values()))
            notes.append(f"the wrapper's {key} is {wrapper[key]!r}, its text model's {own!r}: the latter is taken")
        if dtypes:
            taken.pop(key, None)
    return {**taken, **said}


def _says_what(text: dict[str, Any]) -> bool:
    """DeepSeek-OCR's names a class, and no model_type."""
    return bool(text.get("model_type") or text.get("architectures"))


def _is_language_model(kind: Any) -> bool:
    """Its causal language model takes this configuration, and not a part of it, nor images besides (Llama 4, Gemma 3)."""
    if kind not in CONFIG_MAPPING or (config := CONFIG_MAPPING[kind]) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    model = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    return model.config_class is config and not model.__name__.endswith("ForConditionalGeneration")


def _kind_by_class(file: Path, stated: dict[str, Any], notes: list[str]) -> str:
    """The model_type of a configuration that names a class of transformers alone."""
    named = next(iter(stated.get("architectures") or ()), None)
    kinds = [kind for kind, own in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if own == named]
    if not kinds:
        beside = f" (architectures: {named})" if named else ""
        raise CheckpointError(
            f"{file}: model_type is {stated.get('model_type')!r}{beside}; expected the name of an architecture"
        )
    notes.append(f"no model_type: read as {kinds[0]}, whose class {named} is")
    return kinds[0]


def other_format(folder: Path) -> str:
    """What a folder without config.json holds instead, as the end of a sentence; "" where that says nothing."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for ending, what in _OTHER_FORMATS.items():
        if found := next((name for name in names if name.endswith(ending)), None):
            return f"; {found} is {what}"
    return ""


def _refuse_known(file: Path, kind: Any) -> None:
    if kind in NOT_THERE and kind not in CONFIG_MAPPING:
        missing, nearest = NOT_THERE[kind]
        raise CheckpointError(f"{file}: model_type {kind!r} is not in transformers: {missing} (nearest: {nearest})")


def _check_dtype(file: Path, key: str, said: Any) -> None:
    if not isinstance(said, str) or isinstance(getattr(torch, said, None), torch.dtype):
        return
    names = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype) and value.is_floating_point]
    likely = _SHORT_DTYPES.get(said.lower()) or difflib.get_close_matches(said, names, n=1, cutoff=0.0)[0]
    raise CheckpointError(f"{file}: {key} is {said!r}, which is no dtype of torch; did you mean {likely!r}?")


def _built(file: Path, stated: dict[str, Any], notes: list[str]) -> PretrainedConfig:
    kind = stated.get("model_type")
    if not isinstance(kind, str):
        kind = _kind_by_class(file, stated, notes)
    _refuse_known(file, kind)
    stated = {k: v for k, v in stated.items() if not (k in ("dtype", "torch_dtype") and v == "auto")}  # what is stored
    for key in ("dtype", "torch_dtype"):
        _check_dtype(file, key, stated.get(key))
    if kind not in CONFIG_MAPPING and kind in RENAMES:
        rename = RENAMES[kind]
        notes.append(f"model_type {kind} is read as {rename.to}: {rename.evidence}")
        kind = rename.to
    elif kind not in CONFIG_MAPPING and (own := _in_lower_case(kind, stated)):
        notes.append(f"model_type {kind} is read as {own}, which has the class that its architectures name")
        kind = own
    elif stated.get("auto_map") and kind in CONFIG_MAPPING:
        notes.append(f"auto_map ignored: {kind} is transformers' own, no code of the checkpoint runs")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{file}: model_type {kind!r} is not in transformers{_nearest(kind, stated)}")
    cls = CONFIG_MAPPING[kind]
    for key, values in MEANT.get(kind, {}).items():
        if stated.get(key, values[0]) not in values:
            raise CheckpointError(
                f"{file}: {key}={stated[key]!r}: transformers' {kind} reads no {key} and computes {values[0]!r}"
            )
    given = {k: v for k, v in stated.items() if k not in ("auto_map", "model_type")}
    _respell(file, given, cls)
    _group_of_experts(file, given, cls)
    _check_counts(file, kind, given)
    rope_of(file, given, notes)
    activation = given.get("hidden_act")
    if activation is not None and activation not in ACT2FN:
        raise CheckpointError(f"{file}: hidden_act {activation!r} is no activation of transformers")
    try:
        return cls.from_dict(given)
    except Exception as error:  # transformers checks a config by many exception classes of its own
        raise CheckpointError(f"{file}: can't be read: {' '.join(str(error).split())}") from error


def _nearest(kind: str, stated: dict[str, Any]) -> str:
    """The architecture of a name like it; else, of one with latents, DeepSeek's; a name like none names none."""
    near = difflib.get_close_matches(kind, list(CONFIG_MAPPING), 1, 0.6)
    near = [k for k in CONFIG_MAPPING if kind.startswith(f"{k}_")][-1:] or near
    if stated.get("kv_lora_rank") and not (near and _has_latents(near[0])):
        near = ["deepseek_v3"]
    return f" (nearest: {near[0]})" if near else ""


def _has_latents(kind: str) -> bool:
    return "kv_lora_rank" in inspect.signature(CONFIG_MAPPING[kind]).parameters


def _group_of_experts(file: Path, given: dict[str, Any], cls: type[PretrainedConfig]) -> None:
    """Published files say null where experts are in no groups: one group. A null beside groups is nobody's default."""
    own = cls()
    said: dict[str, Any] = {key: given.get(key, getattr(own, key, None)) for key in ("n_group", "topk_group")}
    nulls = [key for key in said if key in given and given[key] is None]
    others = {key: value for key, value in said.items() if key in given and value not in (None, 1)}
    if nulls and (others or (nulls == ["topk_group"] and said["n_group"] not in (None, 1))):
        told = ", ".join(f"{key}={json.dumps(value)}" for key, value in said.items())
        raise CheckpointError(f"{file}: {told}: expected two numbers, or null for both where experts are in no groups")
    if nulls:
        given |= dict.fromkeys(said, 1)
    elif set(said) & set(given) and all(type(value) is int for value in said.values()):
        groups, chosen = said.values()
        if not 1 <= chosen <= groups:
            raise CheckpointError(f"{file}: topk_group={chosen} of n_group={groups}: expected 1 to {groups}")


def _check_counts(file: Path, kind: str, given: dict[str, Any]) -> None:
    """Counts that no model has, by their names: a class would fail somewhere inside, or build a model without layers."""
    for key in _COUNTS:
        number = given.get(key)
        if type(number) is int and number < 1:
            raise CheckpointError(f"{file}: {key} is {number}, expected 1 or more")
    experts, chosen = (next((given[k] for k in names if k in given), None) for names in (SPELLINGS[0], SPELLINGS[2]))
    if isinstance(experts, int) and isinstance(chosen, int) and not 0 <= chosen <= experts:
        raise CheckpointError(f"{file}: {chosen} experts a token of {experts}: expected 0 to {experts}")
    heads, kv = given.get("num_attention_heads"), given.get("num_key_value_heads")
    if kind in _ONE_KV_A_HEAD and given.get("kv_lora_rank") and type(heads) is type(kv) is int and kv != heads:
        raise CheckpointError(
            f"{file}: num_key_value_heads={kv} beside num_attention_heads={heads}: latent attention of transformers' {kind} "
            "has a K and a V of its own for each head; expected the same number, or no such key"
        )


def _in_lower_case(kind: str, stated: dict[str, Any]) -> str:
    """Transformers' name of an architecture whose publisher writes it in capitals (AXK1); "" if it is another."""
    own = kind.lower()
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(own)
    return own if own in CONFIG_MAPPING and named in (stated.get("architectures") or ()) else ""


def _respell(file: Path, values: dict[str, Any], cls: type[PretrainedConfig]) -> None:
    """Spell each key as the class does, in place; a meaning that is stated twice must be stated alike."""
    read = {*cls().to_dict(), *cls.attribute_map}
    for names in SPELLINGS:
        given = {name: values[name] for name in names if values.get(name) is not None}
        if any(one != other for one, other in itertools.combinations(given.values(), 2)):
            told = ", ".join(f"{k}={json.dumps(v, sort_keys=True)}" for k, v in given.items())
            raise CheckpointError(f"{file}: {told}: of one meaning, but not the same")
        own = next((name for name in names if name in read), None)
        # transformers reads both names of dtype itself
        if own in (None, "dtype") or any(name in read for name in given):
            continue
        if given:
            values[own] = values.pop(next(iter(given)))
