"""generate(): transformers' own loop over a compiled module, through a private adapter.

The adapter is a GenerationMixin whose forward is one step. Greedy search, sampling, num_return_sequences, stopping
criteria, streamers, prompt lookup and assisted decoding are transformers' code, unchanged. What would silently be wrong
is refused with a reason.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from helix_compile.errors import RuntimeFault
from helix_compile.ir.cache_argument import CACHE_NAMES
from helix_compile.runtime.compiled import CompiledModule
from helix_compile.runtime.drafts import CroppedCache, check_drafts, within_room
from helix_compile.runtime.step import check_ids, checked_mask

# the field of an output that holds its cache: renamed in transformers 5.24
_OUTPUT_CACHE = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__annotations__)
_GUIDANCE = "classifier-free guidance steps the model a second time with a cache of its own"
REFUSED_ARGUMENTS = {
    **dict.fromkeys(CACHE_NAMES, "the sharded cache belongs to the compiled module"),
    "inputs_embeds": "the compiled graph starts at input_ids",
    "assistant_tokenizer": "drafts are compared as token ids: the assistant must have the same vocabulary",
    "custom_generate": "a custom loop may keep a cache of its own",
    "position_ids": "positions are counted by the module: the number of tokens of a row so far",
    "negative_prompt_ids": _GUIDANCE,
    "synced_gpus": "all ranks take the same steps by construction",
}
_SPARE = 8  # candidates beyond the k-th that may equal it, before all logits are gathered
_CANDIDATE_BYTES = 16
_INNER = "the compiled step returns logits only"
REFUSED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beam search reorders sequences between steps; the sharded cache can't follow"),
    "num_beam_groups": ((None, 1), "beam search reorders sequences between steps"),
    "constraints": ((None,), "constrained search is beam search: it reorders sequences"),
    "force_words_ids": ((None,), "constrained search is beam search: it reorders sequences"),
    "guidance_scale": ((None, 1), _GUIDANCE),
    "penalty_alpha": ((None,), "contrastive search branches the cache"),
    "dola_layers": ((None,), "it reads the hidden states of inner layers"),
    "assistant_early_exit": ((None,), f"it stops at an inner layer; {_INNER}"),
    "use_mtp": ((None, False), f"its heads read the last hidden state; {_INNER}"),
    "speculation_type": ((None,), f"its drafts read hidden states; {_INNER}"),
    "cache_implementation": ((None,), "the cache is the module's own sharded one"),
    "use_cache": ((None, True), "without its cache the module has no context"),
    "prefill_chunk_size": ((None,), "long prompts are cut into chunks inside a step already"),
    "output_attentions": ((None, False), "attention weights are never whole on one rank"),
    "output_hidden_states": ((None, False), _INNER),
}


def generate(
    compiled: CompiledModule, input_ids: Tensor | None, attention_mask: Tensor | None, options: dict[str, Any]
) -> Any:
    """Generate by transformers' own loop on an empty cache.

    Args:
        compiled: the module; its cache is reset first.
        input_ids: prompt [B, S], left-padded where lengths differ; transformers' own name `inputs` is taken too.
        attention_mask: [B, S]; None: inferred from pad_token_id as transformers does, else ones.
        options: anything that transformers' generate() takes.

    Raises:
        RuntimeFault: an option that can't be right on a sharded cache, or more tokens than it holds, with the reason.
    """
    if (inputs := options.pop("inputs", None)) is not None:
        if input_ids is not None:
            raise RuntimeFault("generate: both input_ids and inputs are given; pass one of them")
        input_ids = inputs
    settings = _settings(compiled, options)
    _refuse(settings, options)
    input_ids, attention_mask = _checked_prompts(compiled, input_ids, attention_mask, settings)
    _check_room(compiled, attention_mask, settings)
    check_drafts(compiled, settings, options, input_ids.shape[0])
    sequences = input_ids.shape[0] * (settings.num_return_sequences or 1)
    capacity = compiled.plan.options.max_batch_size
    if sequences > capacity:
        raise RuntimeFault(
            f"generate: {input_ids.shape[0]} prompts x num_return_sequences={settings.num_return_sequences or 1} = "
            f"{sequences} sequences > max_batch_size={capacity}"
        )
    if settings.max_time is not None and len(compiled.ranks) < compiled.plan.layout.world_size:
        raise RuntimeFault(
            f"generate: max_time={settings.max_time} is refused on real ranks: their clocks would stop them at "
            "different steps; use max_new_tokens"
        )
    compiled.world.share_random_state(compiled.device)
    compiled.reset()
    adapter: Any = _Adapter(compiled, padding=int((attention_mask == 0).sum()))
    with torch.no_grad():
        tokens = adapter.generate(
            input_ids.to(compiled.device), attention_mask=attention_mask.to(compiled.device), **options
        )
    compiled.world.settle()
    return tokens


def _checked_prompts(
    compiled: CompiledModule, ids: Tensor | None, mask: Tensor | None, settings: GenerationConfig
) -> tuple[Tensor, Tensor]:
    if compiled.device.type == "meta":
        raise RuntimeFault("generate: the model is on the meta device: it can be inspected, not run")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise RuntimeFault(f"generate: input_ids must be a tensor [B, S], got {got}")
    check_ids(ids, compiled.facts.vocab_size, compiled.plan.options.max_batch_size)
    if mask is None:
        mask = _inferred_mask(ids, settings)
    if not isinstance(mask, Tensor):
        raise RuntimeFault(f"generate: attention_mask must be a tensor [B, S], got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise RuntimeFault(f"generate: attention_mask must be [B, S] = {list(ids.shape)}, got {list(mask.shape)}")
    open_ended = (mask[:, -1:] == 0).any(dim=1).nonzero().flatten().tolist()
    if open_ended:
        raise RuntimeFault(
            f"generate: rows {open_ended} end in padding, but the next token follows the last column; pad on the left"
        )
    checked_mask(mask, ids)
    return ids, mask


def _inferred_mask(ids: Tensor, settings: GenerationConfig) -> Tensor:
    """The rule of transformers: padding is where pad_token_id stands, unless that is an end token too."""
    pad, eos = settings.pad_token_id, settings.eos_token_id
    ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    if pad is None or int(pad) in ends:
        return torch.ones_like(ids)
    return (ids != int(pad)).to(ids.dtype)


def _check_room(compiled: CompiledModule, mask: Tensor, settings: GenerationConfig) -> None:
    """The longest row with all its new tokens fits; the last one is returned, but never put into the cache."""
    columns, prompt = mask.shape[1], int(mask.sum(dim=1).max())
    new = settings.max_new_tokens
    if new is not None and (isinstance(new, bool) or not isinstance(new, int) or new < 1):
        raise RuntimeFault(f"generate: max_new_tokens must be an int >= 1, got {new!r}")
    if new is None and settings.max_length is not None:
        new = settings.max_length - columns
        if new < 1:
            raise RuntimeFault(
                f"generate: max_length={settings.max_length} leaves no room for a new token behind {columns} columns; "
                "pass max_new_tokens instead"
            )
    needed, capacity = prompt + (new or 1) - 1, compiled.plan.options.max_seq_len
    if needed > capacity:
        raise RuntimeFault(
            f"generate: {prompt} prompt tokens + {new or 1} new - 1 = {needed} > max_seq_len={capacity}; "
            f"compile with max_seq_len={needed} or ask for fewer"
        )


def _settings(compiled: CompiledModule, options: dict[str, Any]) -> GenerationConfig:
    """The generation config that transformers will arrive at, as far as refusals need it."""
    given, own = options.get("generation_config"), _own_settings(compiled)
    settings = copy.deepcopy(given or own)
    if given is not None:  # what the caller's configuration leaves open
        settings.update(**own.to_dict(), defaults_only=True, allow_custom_entries=True)
    for name, value in options.items():
        if name in REFUSED_SETTINGS or hasattr(settings, name):
            setattr(settings, name, value)
    return settings


def _own_settings(compiled: CompiledModule) -> GenerationConfig:
    facts = compiled.facts
    return facts.generation_config or GenerationConfig.from_model_config(facts.config)


def _refuse(settings: GenerationConfig, options: dict[str, Any]) -> None:
    for name, reason in REFUSED_ARGUMENTS.items():
        if options.get(name) is not None:
            raise RuntimeFault(f"generate: {name} is refused: {reason}")
    for name, (allowed, reason) in REFUSED_SETTINGS.items():
        value = getattr(settings, name, None)
        if value not in allowed:
            raise RuntimeFault(f"generate: {name}={value!r} is refused: {reason}")


class _Adapter(nn.Module, GenerationMixin):
    """What GenerationMixin asks of a model, on top of a compiled module's step."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _compiled: CompiledModule
    _is_stateful = False  # drafts are taken back by truncate(); what would branch the cache is refused before

    def __init__(self, compiled: CompiledModule, padding: int):
        super().__init__()
        object.__setattr__(self, "_compiled", compiled)
        self._padding = padding
        self._cache: CroppedCache | None = None
        self.config = compiled.facts.config
        self.generation_config = copy.deepcopy(_own_settings(compiled))
        self._steps = 0
        self._greedy = self._samples = False
        self._top: TopOfLogits | None = None  # known when transformers has read the configuration

    @property
    def device(self) -> torch.device:
        return self._compiled.device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self._compiled.plan.dtype)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        return nullcontext()  # nothing to switch: experts are one op

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *sizes: int,
    ) -> None:
        """The module brings its own cache; a loop that takes tokens back gets what stands for it."""
        wants_logits = generation_config.output_scores or generation_config.output_logits
        self._greedy = generation_mode == GenerationMode.GREEDY_SEARCH and not wants_logits
        self._samples = generation_mode == GenerationMode.SAMPLE and not wants_logits
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            self._cache = model_kwargs[_OUTPUT_CACHE] = CroppedCache(self._compiled)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)
        self._greedy = self._greedy and not len(processors)  # a processor reads logits of other words
        self._top = top_of(processors) if self._samples else None
        return processors

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(**kwargs)
        capacity = self._compiled.plan.options.max_seq_len
        generator.get_candidates = within_room(generator.get_candidates, self._padding, capacity)
        return generator

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The whole prompt first, then what is new; the mask comes in total length, or None for all ones."""
        new = input_ids.shape[1] if self._steps == 0 else next_sequence_length or 1
        mask = None if attention_mask is None else attention_mask[:, -new:]
        return {"input_ids": input_ids[:, -new:], "attention_mask": mask, "logits_to_keep": logits_to_keep}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 1, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        self._steps += 1
        if logits_to_keep == 1 and (short := self._short_step(input_ids, attention_mask)) is not None:
            return CausalLMOutputWithPast(logits=short, **{_OUTPUT_CACHE: self._cache})
        logits = self._compiled(input_ids, attention_mask, logits_to_keep=logits_to_keep)
        return CausalLMOutputWithPast(logits=logits, **{_OUTPUT_CACHE: self._cache})

    def _short_step(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Logits [B, 1, vocab] of a step that exchanges only those that are read, -inf elsewhere; None where all are."""
        compiled = self._compiled
        if self._greedy:
            best = compiled.best_words(input_ids, attention_mask)
            return None if best is None else self._of_words(best[:, :, None])
        if self._top is None or (count := _exchanged(compiled, self._top.top_k)) is None:
            return None
        found = compiled.top_words(input_ids, attention_mask, count)
        if found is None:
            return None
        candidates, whole = found
        if not self._top.is_complete(candidates, compiled.facts.vocab_size):
            return whole()
        return self._of_words(candidates.flatten(2, 3))

    def _of_words(self, candidates: Tensor) -> Tensor:
        """Logits [B, 1, vocab] of candidates [B, 1, n, 2]; those of rows of zeros are left out."""
        vocab = self._compiled.facts.vocab_size
        values, words = candidates[..., 0], candidates[..., 1].long()
        logits = values.new_full((*values.shape[:2], vocab + 1), -torch.inf)
        return logits.scatter_(-1, words.clamp(max=vocab), values)[..., :vocab]


@dataclass(frozen=True)
class TopOfLogits:
    """That sampling reads the `top_k` largest logits alone, after division by `temperature`."""

    top_k: int
    temperature: float = 1.0

    def is_complete(self, candidates: Tensor, vocab: int) -> bool:
        """Do candidates [B, 1, N, m, 2] hold all that sampling keeps? It keeps every logit that equals the k-th, too.

        A rank that sends a candidate as large as the k-th may have more of them; one that sends -inf has sent all.
        """
        values = candidates[..., 0].float() / self.temperature  # as transformers computes it
        kth = values.flatten(2, 3).topk(min(self.top_k, vocab), dim=-1).values[..., -1:]
        least = values.amin(dim=-1)
        return bool(((least < kth) | (least == -torch.inf)).all())


def top_of(processors: Any) -> TopOfLogits | None:
    """What the first of transformers' processors leave; what follows them reads -inf for every other word."""
    left, temperature = list(processors), 1.0
    if left and type(left[0]) is TemperatureLogitsWarper:
        temperature = float(left.pop(0).temperature)
    if not left or type(left[0]) is not TopKLogitsWarper or left[0].filter_value != -torch.inf:
        return None
    return TopOfLogits(int(left[0].top_k), temperature)


def _exchanged(compiled: CompiledModule, top_k: int) -> int | None:
    """Candidates that each rank sends, some more than are wanted for ties; None where all its logits are fewer bytes."""
    head = next((s for s in reversed(compiled.plan.outer.param_shards) if len(s.shape) == 2), None)
    itemsize = getattr(torch, compiled.plan.dtype).itemsize
    count = top_k + _SPARE
    return None if head is None or count * _CANDIDATE_BYTES >= head.shape[0] * itemsize else count


class TokenPrinter(BaseStreamer):
    """Prints each new token id as it comes."""

    def __init__(self) -> None:
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt comes first and is not printed."""
        if not self._prompt:
            print(*value.flatten().tolist(), end=" ", flush=True)
        self._prompt = False

    def end(self) -> None:
        print(flush=True)


def padded_prompts(text: str) -> tuple[Tensor, Tensor]:
    """Prompts such as "1,2,3; 4 5" -> left-padded ids [B, S] and their mask.

    Raises:
        RuntimeFault: an empty prompt, an empty id or something that is not a token id.
    """
    for number, part in enumerate(text.split(";")):
        if part.strip() and not all(piece.strip() for piece in part.split(",")):
            raise RuntimeFault(f"prompt ids {text!r}: prompt {number} has an empty id")
    try:
        rows = [[int(t) for t in part.replace(",", " ").split()] for part in text.split(";")]
    except ValueError as error:
        raise RuntimeFault(f"prompt ids {text!r}: expected integers separated by commas or spaces: {error}") from error
    if beyond := [t for row in rows for t in row if not 0 <= t < 2**63]:
        raise RuntimeFault(f"prompt ids {text!r}: {beyond[0]} is no token id")
    if not all(rows):
        raise RuntimeFault(f"prompt ids {text!r}: prompt {[len(r) for r in rows].index(0)} is empty")
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
