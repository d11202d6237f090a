"""Train a small DeepSeek-V3 that finds facts in long documents: recall, needles, passages to copy, at 128K as at 128 tokens.

python examples/train_recall.py [--out out/recall] [--steps 600] [--seed 0]        (make model)

Writes an ordinary checkpoint folder (config, safetensors in bfloat16, tokenizer) that `helix-compile eval` scores, and loss.svg.
The model is transformers' DeepseekV3ForCausalLM: MLA with a query latent, one dense layer, one of experts, 360 thousand parameters.

What it must learn is one thing: find where the current word stood before, and say what followed it there. In attention that takes two
layers. The first copies to each token the word before it: a job of the rope part alone, which sees a distance whatever the words are.
The second looks for the token whose word before is the current one: a job of the nope part alone, which sees words whatever the
distance is. So nothing about it is short; it holds at a length if every softmax stays on one token of so many.

What worked:
- Long contexts at the price of short ones. Of n tokens with one right among them, a softmax needs a gap of ln n and some more.
  ln m added to the scores of a wrong token in training is that token m times over: 128 tokens with m up to 1800 compete like
  230,000. Random jumps between facts show every phase of rope up to 131072 and more without a token between.
- Starting from a sketch of the two layers (sketch() below): from random weights Muon and AdamW had not begun to find facts after 120
  steps, nor with shorter texts first; from the sketch a quarter is right at once, by lucky words, and training does the rest: embeddings that
  keep 512 words apart in 32 dimensions, gaps, what the experts add. It is trained to do it well, not to discover it.
- 8 frequencies of rope (16 of 48 dimensions of a score), base 10000, equally strong: then the nearest of 131,071 wrong distances is
  half a frequency's gap away. With 4 of them distances alias within 128K (100,532 looks like 1), and no gap helps.
- level() after training: the rope part of the first layer is set to that again. What training makes of it is good at the distances that it
  saw and strong in some frequencies; at 64K that was 78 % of recall (of 50; 98 % at 16K): 17,663 and 61,576 tokens back looked like one, and a larger gap did
  not help, for these were the larger scores. Words' keys must be equally large, too: 16 % between them is more than the gap.
- Words that are used once in a document, drawn anew each time: no answer can be learned by heart.
- The router's bias is moved as DeepSeek's is, by load, not by gradient.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from helix_compile.eval.words import FILLERS, WORDS

SPECIAL = ["<pad>", "<unk>"]
FIRST_FILLER, FIRST_WORD = len(SPECIAL), len(SPECIAL) + len(FILLERS)
TOKENS, BATCH = 128, 8  # of a training document; documents of a step
LONGEST = 131072  # jumps between facts are up to a quarter of this
COPIES = 7.5  # ln of how often a wrong token counts, at most
WIDTH, WORD_DIMS = 104, 32  # of the hidden state: current word, word before, answer, 32 each; the rest is free
EXPERT_WIDTH = 64  # torch's grouped_mm wants rows of 16 bytes, eight bfloat16s: of an eighth of an expert too
HEADS, NOPE, ROPE, VALUE, Q_LATENT, KV_LATENT = 4, 32, 16, 16, 64, 64


def build_model(seed: int) -> DeepseekV3ForCausalLM:
    """The model with its sketch."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=FIRST_WORD + len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=Q_LATENT,
        kv_lora_rank=KV_LATENT,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=NOPE,
        v_head_dim=VALUE,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        max_position_embeddings=2 * LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=1 / math.sqrt(WIDTH),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = DeepseekV3ForCausalLM(config)
    sketch(model)
    return model


@torch.no_grad()
def sketch(model: Any, noise: float = 0.15, gap: float = 6.0, match: float = 1.2) -> None:
    """Lay two layers over random weights: the word before by rope, then the word that followed it, by content.

    Args:
        noise: what is left of the random weights.
        gap: nats of a score's rope part per frequency, at distance one.
        match: scale of queries and keys of the second layer.
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(noise)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    n, one = WORD_DIMS, torch.eye(WORD_DIMS)
    size, constant = 0.3, 0.6  # of a word's dimensions, and of one that is the same for all
    words = torch.randn(embedding.shape[0], n) * size
    embedding[:, :n] += words
    embedding[:, -1] = constant
    head[:, 2 * n : 3 * n] += words
    rms = math.sqrt((n * size**2 + constant**2) / WIDTH)

    first, second = (layer.self_attn for layer in model.model.layers)
    key, query = _rope_of_the_word_before(model)
    size_of_both = math.sqrt(gap * math.sqrt(NOPE + ROPE))
    first.kv_a_proj_with_mqa.weight[KV_LATENT:, -1] += key * size_of_both * rms / constant
    first.q_a_proj.weight[0, -1] += 1.0
    _heads(first.q_b_proj, NOPE + ROPE)[:, NOPE:, 0] += query * size_of_both / math.sqrt(Q_LATENT)
    first.kv_a_proj_with_mqa.weight[:n, :n] += one
    _copy(first, source=0, target=n, gain=size / math.sqrt(KV_LATENT / n) / 2)

    second.q_a_proj.weight[:n, :n] += one
    _heads(second.q_b_proj, NOPE + ROPE)[:, :NOPE, :n] += match * one
    second.kv_a_proj_with_mqa.weight[:n, n : 2 * n] += one
    second.kv_a_proj_with_mqa.weight[n : 2 * n, :n] += one
    _heads(second.kv_b_proj, NOPE + VALUE)[:, :NOPE, :n] += match * one
    _copy(second, source=n, target=2 * n, gain=size)


def _heads(linear: nn.Linear, width: int) -> Tensor:
    return linear.weight.view(HEADS, width, -1)


def _copy(attention: Any, source: int, target: int, gain: float) -> None:
    """Heads copy latents [source, source + WORD_DIMS) to the hidden state's from `target`, half of them each, twice over."""
    values, out = _heads(attention.kv_b_proj, NOPE + VALUE), attention.o_proj.weight.view(WIDTH, HEADS, VALUE)
    half = torch.eye(VALUE)
    for head in range(HEADS):
        start = head * VALUE % WORD_DIMS
        values[head, NOPE:, source + start : source + start + VALUE] += half
        out[target + start : target + start + VALUE, head] += gain * half


def draw_documents(draw: random.Random, generator: torch.Generator, copies: float) -> tuple[Tensor, ...]:
    """A batch: facts between fillers, then every fact's words once more in another order, each word to be foretold by the one before.

    Args:
        copies: ln of how often a wrong token counts, at most.

    Returns:
        ids, labels (-100: none) and positions [B, T], and the mask that is added to scores [B, 1, T, T].
    """
    B, T = BATCH, TOKENS
    ids = torch.randint(FIRST_FILLER, FIRST_WORD, (B, T), generator=generator)
    labels, jumps = torch.full((B, T), -100), torch.zeros(B, T, dtype=torch.int64)
    right = torch.zeros(B, T, T, dtype=torch.bool)
    for row in range(B):
        words = [FIRST_WORD + i for i in draw.sample(range(len(WORDS)), len(WORDS))]
        facts, at, asked, pause = list[tuple[int, list[int]]](), 0, 0, draw.randrange(7)
        while True:
            size = draw.choice((2, 3)) if draw.random() < 0.75 else draw.randrange(4, 10)
            skip = draw.randrange(pause + 1)
            if at + skip + 2 * size + asked > T:
                break
            at += skip
            facts.append((at, [words.pop() for _ in range(size)]))
            at, asked = at + size, asked + size
        again = list[tuple[int, list[int]]]()
        at = T - asked
        for start, fact in draw.sample(facts, len(facts)):
            again.append((at, fact))
            labels[row, at : at + len(fact) - 1] = torch.tensor(fact[1:])
            for i in range(len(fact) - 1):
                right[row, at + i, start + i + 1] = True
            at += len(fact)
        for start, fact in (*facts, *again):
            ids[row, start : start + len(fact)] = torch.tensor(fact)
            if copies and draw.random() < 0.2:  # a position far on, as after a long filler
                jumps[row, start] = int(math.exp(draw.random() * math.log(LONGEST / 4)))
    positions = torch.arange(T) + jumps.cumsum(dim=1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    many = copies * torch.rand(B, 1, 1, generator=generator).sqrt()
    # the token itself and the one before it are looked at by the first layer, the right one by the second
    mask = torch.where(right | (distance <= 1), 0.0, many).masked_fill(distance < 0, -torch.inf)
    return ids, labels, positions, mask[:, None]


def train(model: Any, steps: int, seed: int) -> list[float]:
    """Muon for matrices, AdamW for the rest; the loss of each step."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    around = ("embed_tokens", "lm_head", "gate.weight")
    matrices = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and not name.endswith(around) and not any(a in name for a in around)
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    gate, load = model.model.layers[1].mlp.gate, torch.zeros(model.config.n_routed_experts)

    def count_load(module: nn.Module, inputs: Any, outputs: Any) -> None:
        load.copy_(outputs[2].flatten().bincount(minlength=len(load)))

    hook = gate.register_forward_hook(count_load)
    losses = []
    with Progress() as progress:
        bar = progress.add_task("training", total=steps)
        for step in range(steps):
            warm, cool = min(1.0, (step + 1) / 20), min(1.0, (steps - step) / (0.4 * steps))
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * warm * max(cool, 0.03)
            # short ones first, then longer and longer: full length after half of the steps
            copies = COPIES * min(1.0, max(0.0, step / steps - 0.15) / 0.35)
            ids, labels, positions, mask = draw_documents(draw, generator, copies)
            hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)[0]
            asked = labels >= 0
            logits = model.lm_head(hidden[asked])
            loss = F.cross_entropy(logits, labels[asked])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                gate.e_score_correction_bias += 2e-3 * torch.sign(load.mean() - load)
            losses.append(float(loss.detach()))
            right = float((logits.argmax(-1) == labels[asked]).float().mean())
            progress.update(
                bar,
                advance=1,
                description=f"loss {losses[-1]:.3f}, right {right:.1%}, up to {math.exp(copies):.0f} copies",
            )
    hook.remove()
    return losses


@torch.no_grad()
def level(model: Any, gap: float = 25.0) -> float:
    """Set the rope part of the first layer anew: keys the same for all words, and every frequency as strong as the others.

    Args:
        gap: nats of a score per frequency, at distance one.

    Returns:
        The largest relative deviation of a word's key from the others'; a query's only makes all its scores larger or smaller.
    """
    embedding, layer = model.model.embed_tokens.weight, model.model.layers[0]
    # the constant of each word so that it is the same after the norm, which divides by the word's size
    others = embedding[:, :-1].square().sum(dim=1)
    share = float((embedding[:, -1] / embedding.square().mean(dim=1).sqrt()).mean())
    embedding[:, -1] = share * (others / (WIDTH - share**2)).sqrt()
    attention = layer.self_attn
    hidden = layer.input_layernorm(model.model.embed_tokens.weight)[FIRST_FILLER:]
    latents = attention.q_a_layernorm(attention.q_a_proj(hidden))
    key, query = _rope_of_the_word_before(model)
    strength = math.sqrt(gap * math.sqrt(NOPE + ROPE))
    deviation = 0.0
    for values, rows, pattern in (
        (hidden, attention.kv_a_proj_with_mqa.weight[KV_LATENT:][None], key),
        (latents, _heads(attention.q_b_proj, NOPE + ROPE)[:, NOPE:], query),
    ):
        # what of a word's values is the same for all words
        constant = torch.linalg.lstsq(values.double(), torch.ones(len(values), 1, dtype=torch.double)).solution[:, 0]
        rows.copy_((strength * pattern[:, None] * constant).expand_as(rows))
        if pattern is key:
            deviation = float((values.double() @ constant - 1).abs().max())
    return deviation


def _rope_of_the_word_before(model: Any) -> tuple[Tensor, Tensor]:
    """A key, and the same turned back by one: their score peaks at distance one, whatever the position."""
    angles = -(model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, ROPE, 2) / ROPE))
    return torch.tensor([1.0, 0.0]).repeat(ROPE // 2), torch.stack([angles.cos(), angles.sin()], dim=-1).flatten()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *FILLERS, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def loss_curve(losses: list[float]) -> str:
    """SVG: the loss of each step, on a log scale."""
    width, height, left, top = 640, 280, 56, 24
    low, high = math.floor(math.log10(max(min(losses), 1e-6))), math.ceil(math.log10(max(losses)))

    def place(step: float, loss: float) -> str:
        share = (math.log10(max(loss, 1e-6)) - low) / max(high - low, 1)
        return f"{left + step / len(losses) * (width - left - 16):.1f},{height - 32 - share * (height - 32 - top):.1f}"

    lines = [
        f'<polyline class="grid" points="{place(0, 10.0**power)} {place(len(losses), 10.0**power)}"/>'
        f'<text x="{left - 8}" y="{float(place(0, 10.0**power).split(",")[1]) + 4}" text-anchor="end">{10.0**power:g}</text>'
        for power in range(low, high + 1)
    ]
    style = (
        "text{font:11px ui-sans-serif,system-ui,sans-serif;fill:#5b626c}.paper{fill:#fff}.grid{stroke:#e3e6ea}"
        ".loss{fill:none;stroke:#3a7ca8;stroke-width:1.5}"
        "@media (prefers-color-scheme:dark){.paper{fill:#16191d}text{fill:#a2a9b3}.grid{stroke:#2b3037}}"
    )
    curve = " ".join(place(step, loss) for step, loss in enumerate(losses))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"><style>{style}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>{"".join(lines)}<polyline class="loss" points="{curve}"/>'
        f'<text x="{left}" y="{height - 10}">loss of {len(losses)} steps</text></svg>\n'
    )


def main(out: Path, steps: int, seed: int) -> float:
    """Train, save; the mean loss of the last ten steps."""
    model = build_model(seed)
    losses = train(model, steps, seed)
    level(model)
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).eval().save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    (out / "loss.svg").write_text(loss_curve(losses))
    last = sum(losses[-10:]) / len(losses[-10:])
    print(
        f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, loss {last:.4f} at the end; helix-compile eval {out} --cp 4"
    )
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/recall"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.out, arguments.steps, arguments.seed)
