"""Does the verifier catch every fault of the catalogue, and would a served system's acceptance rule have caught it?

The rule is that of TensorRT-LLM's Helix module test: an element may be off by 0.1 + 0.05 * |reference|, and 2 % of the
elements may be off by more. It is applied in its own conditions: one layer, one new token, random keys, equal shards. Importing this module registers every mutant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from helix_compile.capture.model import capture
from helix_compile.compile import helix_compile
from helix_compile.models.presets import TINY, build_model
from helix_compile.module import HelixModule
from helix_compile.passes.match.layers import match_layers
from helix_compile.runtime.rank import originals
from helix_compile.verifier.layer_check import LayerCase
from helix_compile.verifier.mutants import (  # noqa: F401  importing registers them
    fp8_mutants,
    graph_mutants,
    kernel_mutants,
    overlap_mutants,
    padding_mutants,
    param_mutants,
    selection_mutants,
    shared_mutants,
    sparse_mutants,
    vocabulary_mutants,
    window_mutants,
)
from helix_compile.verifier.mutants.mutant import (
    CATALOGUE,
    FP8_CATALOGUE,
    GQA_CATALOGUE,
    SHARED_CATALOGUE,
    SPARSE_CATALOGUE,
    WINDOW_CATALOGUE,
    Mutant,
)
from helix_compile.verifier.numeric.handed import drawn_keys
from helix_compile.verifier.numeric.layer_run import CapturedReference, LayerInputs, run_layer
from helix_compile.verifier.numeric.reference import apply_edits, edited, wide_copy
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.numeric.sharpen import background, sharpening
from helix_compile.verifier.numeric.site_terms import empty_past, entries_of, given_length, past_of, terms_of
from helix_compile.verifier.report import FAMILIES
from helix_compile.verifier.verify import verify

ATOL, RTOL, MAY_FAIL = 0.1, 0.05, 0.02
CONTEXT = 512  # tokens of the rule's case; every shard has the same number


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant.

    Attributes:
        static, numeric: codes of the findings.
        off: share of elements that the acceptance rule has outside its tolerance; None: it did not run at all.
    """

    name: str
    family: int
    kind: str
    static: tuple[str, ...]
    numeric: tuple[str, ...]
    off: float | None

    @property
    def caught(self) -> bool:
        """True if verify() found anything."""
        return bool(self.static or self.numeric)

    @property
    def passes_rule(self) -> bool:
        """True if the acceptance rule would let it through."""
        return self.off is not None and self.off <= MAY_FAIL


def awkward_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A DeepSeek-V3 with 24 heads and FFN widths that do not divide: shards need padding at three ranks."""
    from transformers import DeepseekV3Config

    sizes = {
        **TINY,
        "hidden_size": 72,
        "intermediate_size": 112,
        "moe_intermediate_size": 40,
        "num_attention_heads": 24,
        "num_key_value_heads": 24,
        "q_lora_rank": 28,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 10,
        "v_head_dim": 14,
    }
    return build_model(DeepseekV3Config(**sizes), dtype=dtype)


def awkward_gqa(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Qwen3-MoE with 12 query heads in 4 groups, norms of query and key, one dense layer, widths that do not divide."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=58,
        moe_intermediate_size=22,
        num_hidden_layers=3,
        mlp_only_layers=[0],
        num_experts=8,
        num_experts_per_tok=3,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=14,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = build_model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):  # new ones are all alike
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * 0.3)
    return model


def awkward_windows(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A GPT-OSS with 12 query heads in 4 groups, a window of 21 in one of two layers, sinks that differ from head to head."""
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=24,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=21,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=14,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = "eager"
    model: Any = build_model(config, dtype=dtype)
    model.set_experts_implementation("batched_mm")  # grouped_mm takes no 16-bit rows of 36
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def awkward_sparse(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A GLM-5 whose middle layer attends to the keys that the first one chose; k = 7 divides by nothing. 8 index heads: of
    fewer, more than one key in a hundred ties.
    """
    from transformers import GlmMoeDsaConfig

    config = GlmMoeDsaConfig(
        vocab_size=97,
        hidden_size=72,
        intermediate_size=58,
        num_hidden_layers=3,
        indexer_types=["full", "shared", "full"],
        mlp_layer_types=["dense"] * 3,
        num_attention_heads=12,
        num_key_value_heads=12,
        q_lora_rank=28,
        kv_lora_rank=20,
        qk_rope_head_dim=6,
        qk_nope_head_dim=10,
        v_head_dim=14,
        index_topk=7,
        index_head_dim=16,
        index_n_heads=8,
        max_position_embeddings=2048,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return build_model(config, dtype=dtype)


def awkward_shared(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Gemma 4 whose third layer reads the second one's K and V; the first caches such as wide, and is no one's to read."""
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=58,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_kv_shared_layers=1,
        sliding_window=21,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=97,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return build_model(config, dtype=dtype)


def self_test(
    model: nn.Module, mutants: list[Mutant] | None = None, progress: Callable[[str], None] | None = None
) -> list[Verdict]:
    """Compile `model` once for each mutant, break it, verify it.

    Args:
        model: a DeepSeek-V3 in transformers' names with dense and MoE layers, 24 heads, 8 experts: awkward_model();
            or FP8_CATALOGUE; for GQA_CATALOGUE awkward_gqa(), for WINDOW_CATALOGUE awkward_windows(), for SPARSE_CATALOGUE awkward_sparse(),
            for SHARED_CATALOGUE awkward_shared().
        mutants: by default the whole CATALOGUE.
        progress: called with the name of each mutant when its turn comes.
    """
    judge = AcceptanceRule(model)
    verdicts = []
    for mutant in CATALOGUE if mutants is None else mutants:
        if progress is not None:
            progress(mutant.name)
        compiled = helix_compile(model, world="virtual", **mutant.options)
        mutant.apply(compiled)
        report = verify(compiled, model)
        codes = {
            check: tuple(sorted({f.code for f in report.findings if f.check == check}))
            for check in ("static", "numeric")
        }
        verdicts.append(
            Verdict(
                mutant.name, mutant.family, mutant.kind, codes["static"], codes["numeric"], judge.share_off(compiled)
            )
        )
    return verdicts


def self_test_of_all_kinds(progress: Callable[[str], None] | None = None) -> list[Verdict]:
    """The catalogue on a model with MLA, then the faults that only other kinds of attention can have, on models with these."""
    found = self_test(awkward_model(), CATALOGUE + FP8_CATALOGUE, progress)
    found += self_test(awkward_gqa(), GQA_CATALOGUE, progress)
    found += self_test(awkward_windows(), WINDOW_CATALOGUE, progress)
    found += self_test(awkward_sparse(), SPARSE_CATALOGUE, progress)
    return found + self_test(awkward_shared(), SHARED_CATALOGUE, progress)


class AcceptanceRule:
    """The acceptance rule on the first layer of each body."""

    def __init__(self, model: nn.Module):
        captured = capture(model)
        matches = match_layers(captured, 1024, keep_experts=True)
        twin = wide_copy(model)
        weights = dict(originals(twin))
        self.reference = CapturedReference(captured, matches, weights)
        self.edits = sharpening(self.reference, 0)
        apply_edits(weights, self.edits)
        self.cases = dict(self._cases(model.dtype))  # type: ignore[arg-type] # transformers' property

    def _cases(self, dtype: torch.dtype) -> Iterator[tuple[int, tuple[LayerInputs, Tensor]]]:
        for body, match in self.reference.matches.items():
            layer = self.reference.captured.layers_of(body)[0].index
            generator = torch.Generator().manual_seed(0)
            attention = match.attentions[0]
            hidden = torch.randn(1, 1, attention.hidden_size, generator=generator).to(dtype)
            wide = hidden.double()
            mask = torch.ones(1, CONTEXT + 1, dtype=torch.int64)
            positions = torch.tensor([[CONTEXT]])
            cached = given_length(attention, CONTEXT, 1)
            zero = tuple(x.double() for x in empty_past(attention, 1, cached))
            handed = drawn_keys(match, [CONTEXT], 1, generator)
            probe = LayerInputs(wide, mask, positions, (zero,), handed)
            prefix = self.reference.captured.layers_of(body)[0].prefix
            values = self.reference.layer(layer, probe)
            query = terms_of(attention).query_parts(values, self.reference.tensors, prefix)
            entries = [x.to(dtype) for x in background(attention, query, cached, generator)]
            if attention.cache.index:
                entries.append(torch.randn(1, cached, attention.cache.index, generator=generator).to(dtype))
            past = past_of(attention, *entries)
            exact = LayerInputs(wide, mask, positions, (tuple(x.double() for x in past),), handed)
            expected = self.reference.layer(layer, exact)["output"]
            yield layer, (LayerInputs(hidden, mask, positions, (past,), handed), expected)

    def share_off(self, compiled: HelixModule) -> float | None:
        """Largest share of elements outside the tolerance, over the layers; None if a layer does not run."""
        case, worst = LayerCase((CONTEXT,), 1), 0.0
        params = [edited(r.params, self.edits) for r in compiled.ranks]
        for layer, (given, expected) in self.cases.items():
            try:
                scratch = Scratch(compiled, compiled.graph, params, 1, CONTEXT + case.T)
                site = self.reference.sites(layer)[0]
                scratch.fill(site, 0, torch.cat(entries_of(given.pasts[0]), dim=-1)[0])
                scratch.lengths = [CONTEXT]
                outputs = run_layer(scratch, layer, given, torch.ones(1, 1, dtype=torch.int64)).outputs
            except Exception:  # a mutant may do anything; a test that can't run is one that fails
                return None
            for output in outputs:
                off = (output.double() - expected).abs() > ATOL + RTOL * expected.abs()
                off |= ~torch.isfinite(output)
                worst = max(worst, float(off.double().mean()))
        return worst


def format_table(verdicts: list[Verdict]) -> str:
    """Mutant x (static, numeric, would the acceptance rule let it pass), and the sums."""
    console = Console(file=StringIO(), width=140, highlight=False, no_color=True)
    table = Table(box=box.ASCII2, show_edge=False, pad_edge=False)
    for column in ("mutant", "family", "on", "static", "numeric", "atol 0.1 rtol 0.05, 2 %"):
        table.add_column(column, overflow="fold")
    for v in verdicts:
        rule = "does not run" if v.off is None else f"{v.off:.1%} off: {'PASSES' if v.passes_rule else 'caught'}"
        static = " ".join(v.static) or ("-" if v.caught else "SURVIVES")
        table.add_row(v.name, FAMILIES[v.family], v.kind, static, " ".join(v.numeric) or "-", rule)
    console.print(table)
    caught = sum(v.caught for v in verdicts)
    passing = sum(v.passes_rule for v in verdicts)
    console.print(
        f"{caught} of {len(verdicts)} mutants caught; {passing} would pass atol {ATOL}, rtol {RTOL} with 2 % off",
        markup=False,
    )
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined] # StringIO


def to_json(verdicts: list[Verdict]) -> str:
    """The table as JSON."""
    rows: list[dict[str, Any]] = [
        {**asdict(v), "family": FAMILIES[v.family], "caught": v.caught, "passes_rule": v.passes_rule} for v in verdicts
    ]
    return json.dumps({"ok": all(v.caught for v in verdicts), "mutants": rows}, indent=1)
