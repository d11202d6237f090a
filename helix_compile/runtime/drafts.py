"""Drafts in generate(): prompt lookup and a small model propose tokens, one step of T > 1 tokens checks them.

The loop is transformers' own (`_assisted_decoding`). It takes rejected drafts back through the cache object; here that
object stands for the module's sharded cache, and `crop` is truncate().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from helix_compile.errors import RuntimeFault
from helix_compile.runtime.compiled import CompiledModule

Drafts = Callable[..., tuple[Tensor, Tensor | None]]


class CroppedCache:
    """What transformers' assisted decoding asks of a cache, on a module's own."""

    # transformers 5.24 asks: may the loop be compiled with it, can tokens be taken back
    is_compileable, is_croppable = False, True

    def __init__(self, compiled: CompiledModule):
        self._compiled = compiled

    def activate_past_recording(self) -> None:
        """Nothing to switch: the paged cache keeps every token."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence; padding takes no place here."""
        return max(self._compiled.lengths.tolist(), default=0)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens of each sequence back; transformers counts them as a negative int.

        Raises:
            RuntimeFault: a positive count, or more tokens than there are.
        """
        if tokens_to_remove > 0:
            raise RuntimeFault(
                f"crop({tokens_to_remove}): expected a negative int, the tokens to take back; "
                "compiled.truncate() takes the lengths that remain"
            )
        self._compiled.truncate(self._compiled.lengths + tokens_to_remove)


def check_drafts(compiled: CompiledModule, settings: GenerationConfig, options: dict[str, Any], prompts: int) -> None:
    """Raise RuntimeFault unless the drafts that are asked for can be made and checked.

    Args:
        compiled: the module that checks them.
        settings: the generation config that transformers will arrive at.
        options: what generate() was given.
        prompts: sequences of the batch.
    """
    assistant, lookup = options.get("assistant_model"), settings.prompt_lookup_num_tokens
    if assistant is None and lookup is None:
        return
    if assistant is not None and lookup is not None:
        raise RuntimeFault(
            "generate: assistant_model and prompt_lookup_num_tokens are both given; drafts come from one of them"
        )
    sequences = prompts * (settings.num_return_sequences or 1)
    if sequences != 1:
        raise RuntimeFault(
            f"generate: transformers checks drafts for one sequence at a time, got {prompts} prompts x "
            f"num_return_sequences={settings.num_return_sequences or 1}; generate them one by one, or without drafts"
        )
    if assistant is not None:
        _check_assistant(compiled, assistant)
    elif isinstance(lookup, bool) or not isinstance(lookup, int) or lookup < 1:
        raise RuntimeFault(f"generate: prompt_lookup_num_tokens must be an int >= 1, got {lookup!r}")


def _check_assistant(compiled: CompiledModule, assistant: Any) -> None:
    if not isinstance(assistant, PreTrainedModel) or not assistant.can_generate():
        raise RuntimeFault(
            f"generate: assistant_model must be a transformers model that can generate, got {type(assistant).__name__}"
        )
    words = assistant.config.get_text_config().vocab_size
    if words != compiled.facts.vocab_size:
        raise RuntimeFault(
            f"generate: assistant_model has a vocabulary of {words} tokens, expected the module's "
            f"{compiled.facts.vocab_size}: drafts are compared as token ids"
        )


def within_room(drafts: Drafts, padding: int, capacity: int) -> Drafts:
    """`drafts` cut so that a step that checks them fits: prompt lookup may propose more than may still follow.

    Args:
        drafts: a candidate generator's get_candidates: ids [1, n] -> ids with drafts behind them, and their logits.
        padding: columns of the prompt that are not tokens.
        capacity: tokens that the cache holds.
    """

    def cut(input_ids: Tensor, **given: Any) -> tuple[Tensor, Tensor | None]:
        candidates, logits = drafts(input_ids, **given)
        present = input_ids.shape[1]
        spare = max(0, capacity - (present - padding))
        return candidates[:, : present + spare], None if logits is None else logits[:, :spare]

    return cut
