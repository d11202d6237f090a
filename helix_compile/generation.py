"""generate(): transformers' own loop over a HelixModule, through a private adapter.

The adapter is a GenerationMixin whose forward is one step. Greedy search, sampling, num_return_sequences, stopping
criteria and streamers are transformers' code, unchanged. What would silently be wrong is refused with a reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutput

from helix_compile.errors import RuntimeFault

if TYPE_CHECKING:
    from helix_compile.module import HelixModule

_GUIDANCE = "classifier-free guidance steps the model a second time with a cache of its own"
REFUSED_ARGUMENTS = {
    "past_key_values": "the sharded cache belongs to the compiled module",
    "inputs_embeds": "the compiled graph starts at input_ids",
    "assistant_model": "assisted decoding needs truncate(), which is not in this version",
    "custom_generate": "a custom loop may keep a cache of its own",
    "position_ids": "positions are counted by the module: the number of tokens of a row so far",
    "negative_prompt_ids": _GUIDANCE,
    "synced_gpus": "ranks of one virtual world take the same steps by construction",
}
_ASSISTED = "it takes tokens back, which needs truncate(); that is not in this version"
REFUSED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": (
        (None, 1),
        "beam search reorders sequences between steps; the sharded cache can't follow",
    ),
    "num_beam_groups": ((None, 1), "beam search reorders sequences between steps"),
    "guidance_scale": ((None, 1), _GUIDANCE),
    "penalty_alpha": ((None,), "contrastive search branches the cache"),
    "dola_layers": ((None,), "it reads the hidden states of inner layers"),
    "prompt_lookup_num_tokens": ((None,), f"prompt lookup: {_ASSISTED}"),
    "assistant_early_exit": ((None,), f"early exit: {_ASSISTED}"),
    "use_mtp": ((None, False), f"multi-token prediction: {_ASSISTED}"),
    "cache_implementation": ((None,), "the cache is the module's own sharded one"),
    "use_cache": ((None, True), "without its cache the module has no context"),
    "prefill_chunk_size": ((None,), "long prompts are cut into chunks inside a step already"),
    "output_attentions": ((None, False), "attention weights are never whole on one rank"),
    "output_hidden_states": ((None, False), "the compiled step returns logits only"),
}


def generate(
    compiled: HelixModule, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> Any:
    """Generate by transformers' own loop on an empty cache.

    Args:
        compiled: the module; its cache is reset first.
        input_ids: prompt [B, S], left-padded where lengths differ.
        attention_mask: [B, S]; ones where None.
        options: anything that transformers' generate() takes.

    Raises:
        RuntimeFault: an option that can't be right on a sharded cache, with the reason.
    """
    settings = _settings(compiled, options)
    _refuse(settings, options)
    _check_prompts(compiled, input_ids, attention_mask)
    sequences = input_ids.shape[0] * (settings.num_return_sequences or 1)
    capacity = compiled.plan.options.max_batch_size
    if sequences > capacity:
        raise RuntimeFault(
            f"generate: {input_ids.shape[0]} prompts x num_return_sequences={settings.num_return_sequences or 1} = "
            f"{sequences} sequences > max_batch_size={capacity}"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    compiled.reset()
    adapter: Any = _Adapter(compiled)
    with torch.no_grad():
        return adapter.generate(
            input_ids.to(compiled.device),
            attention_mask=attention_mask.to(compiled.device),
            **options,
        )


def _check_prompts(compiled: HelixModule, ids: Tensor, mask: Tensor | None) -> None:
    if compiled.device.type == "meta":
        raise RuntimeFault(
            "generate: the model is on the meta device: it can be inspected, not run"
        )
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise RuntimeFault(f"generate: input_ids must be a tensor [B, S], got {got}")
    if mask is None:
        return
    if mask.shape != ids.shape:
        raise RuntimeFault(
            f"generate: attention_mask must be [B, S] = {list(ids.shape)}, got {list(mask.shape)}"
        )
    open_ended = (mask[:, -1:] == 0).any(dim=1).nonzero().flatten().tolist()
    if open_ended:
        raise RuntimeFault(
            f"generate: rows {open_ended} end in padding, but the next token follows the last column; pad on the left"
        )


def _settings(compiled: HelixModule, options: dict[str, Any]) -> GenerationConfig:
    """The generation config that transformers will arrive at, as far as refusals need it."""
    given = options.get("generation_config") or compiled.facts.generation_config
    settings = copy.deepcopy(given) if given is not None else GenerationConfig()
    for name, value in options.items():
        if name in REFUSED_SETTINGS or hasattr(settings, name):
            setattr(settings, name, value)
    return settings


def _refuse(settings: GenerationConfig, options: dict[str, Any]) -> None:
    for name, reason in REFUSED_ARGUMENTS.items():
        if options.get(name) is not None:
            raise RuntimeFault(f"generate: {name} is refused: {reason}")
    for name, (allowed, reason) in REFUSED_SETTINGS.items():
        value = getattr(settings, name, None)
        if value not in allowed:
            raise RuntimeFault(f"generate: {name}={value!r} is refused: {reason}")


class _Adapter(nn.Module, GenerationMixin):
    """What GenerationMixin asks of a model, on top of a HelixModule's step."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _compiled: HelixModule
    _is_stateful = True  # transformers then never rewinds or branches the cache

    def __init__(self, compiled: HelixModule):
        super().__init__()
        object.__setattr__(self, "_compiled", compiled)
        self.config = compiled.facts.config
        self.generation_config = copy.deepcopy(
            compiled.facts.generation_config
        ) or GenerationConfig.from_model_config(self.config)
        self._steps = 0

    @property
    def device(self) -> torch.device:
        return self._compiled.device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self._compiled.plan.dtype)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the module brings its own cache

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        yield  # nothing to switch: experts are one op

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole prompt first, then the newest token; the mask comes in total length, or None for all ones."""
        new = input_ids.shape[1] if self._steps == 0 else 1
        mask = None if attention_mask is None else attention_mask[:, -new:]
        return {"input_ids": input_ids[:, -new:], "attention_mask": mask}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        self._steps += 1
        return CausalLMOutput(logits=self._compiled(input_ids, attention_mask))


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
        RuntimeFault: an empty prompt or something that is not a token id.
    """
    try:
        rows = [[int(t) for t in part.replace(",", " ").split()] for part in text.split(";")]
    except ValueError as error:
        raise RuntimeFault(
            f"prompt ids {text!r}: expected integers separated by commas or spaces: {error}"
        ) from error
    if not all(rows):
        raise RuntimeFault(
            f"prompt ids {text!r}: prompt {[len(r) for r in rows].index(0)} is empty"
        )
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
