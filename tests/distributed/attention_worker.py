"""One rank of tests/slow/test_attentions_by_ranks.py, started by torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from helix_compile import helix_compile
from tests.distributed.steps import ATTENTIONS, STEP_TOKENS, attention_model, run_steps
from tests.support import captures


def main(folder: Path, lower: str) -> None:
    """Logits of every attention, and bytes that left this rank: counted, planned."""
    seen, sent = {}, {}
    for name, (_, _, options) in ATTENTIONS.items():
        compiled = helix_compile(attention_model(name), lower=lower, **options)
        seen[name] = run_steps(compiled).contiguous()
        planned = sum(map(compiled.plan.egress_bytes_per_rank, STEP_TOKENS))
        sent[name] = [float(compiled.world.sent_bytes[0]), float(planned)]
        rank = compiled.ranks[0].rank
    save_file(seen, folder / f"seen_{rank}.safetensors")
    (folder / f"sent_{rank}.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    torch.set_num_threads(1)
    captures.share()
    main(Path(sys.argv[1]), sys.argv[2])
