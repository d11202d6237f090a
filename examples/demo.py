"""`make demo`: rewrite Hugging Face's DeepSeek-V3 for four ranks, look at one layer, and check the tokens.

Everything runs in this process on the CPU: the model is transformers' own DeepseekV3ForCausalLM (tiny preset, random
weights), the four ranks are virtual. Exits with 1 if a token differs.
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.generation.streamers import BaseStreamer

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config
from helix_compile.verifier.numeric.reference import WidenedIslands

CP, PROMPTS, NEW_TOKENS = 4, (9, 40, 23), 32
FP64_LIMIT = 1e-10


class StepBar(BaseStreamer):
    """Shows generated tokens on stderr."""

    def __init__(self, total: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self.task = self.progress.add_task(f"generating on {CP} virtual ranks", total=total)
        self.progress.start()
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The first call brings the prompt."""
        if not self.prompt:
            self.progress.advance(self.task)
        self.prompt = False

    def end(self) -> None:
        """Leave the finished bar on the screen."""
        self.progress.stop()


def left_padded_prompts(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of three lengths, [3, S] ids and mask."""
    width = max(PROMPTS)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in PROMPTS])
    return torch.randint(0, vocab_size, mask.shape) * mask, mask


def fp64_deviation(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest deviation of an unmasked prompt logit over the largest logit, all in float64."""
    original: Any = copy.deepcopy(model).double()
    original.set_experts_implementation("batched_mm")
    compiled = helix_compile(original, cp=CP, max_seq_len=256)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), WidenedIslands():
        logits = compiled(ids, mask)
        expected = original(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    kept = mask.bool()
    assert torch.isfinite(logits[kept]).all()
    return float((logits - expected)[kept].abs().max() / expected[kept].abs().max())


def show(compiled: HelixModule) -> None:
    """The plan, and the attention block of the MoE layers before and after."""
    inspection = compiled.inspect()
    before, after = inspection.attention_before_after("body_1")
    print(inspection, end="\n\n")
    print("attention of layers 2-3 before:", *before, "", sep="\n")
    print("attention of layers 2-3 after:", *after, "", sep="\n")


def main() -> int:
    """Run the demo; the exit status."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model: Any = build_model(preset_config("tiny"))
    print(f"rewriting transformers' {type(model).__name__} for cp={CP} ...", file=sys.stderr)
    compiled = helix_compile(model, cp=CP, max_seq_len=256)
    show(compiled)
    ids, mask = left_padded_prompts(256)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    tokens = compiled.generate(ids, mask, streamer=StepBar(NEW_TOKENS), **options)
    expected = model.generate(ids, attention_mask=mask, **options)
    deviation = fp64_deviation(model, ids, mask)
    equal = torch.equal(tokens, expected) and deviation <= FP64_LIMIT
    sizes = [int(n) for n in compiled.lengths]
    lengths = ", ".join(map(str, PROMPTS))
    print(f"left-padded prompts of {lengths} tokens, {NEW_TOKENS} new each; cached now: {sizes}")
    print(f"largest deviation of a logit in float64: {deviation:.1e} (limit {FP64_LIMIT:.0e})")
    print("tokens equal" if equal else "TOKENS DIFFER")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
