"""One rank of a saved module whose steps are compiled by Inductor; a fault happens on rank 2 in its third step.

torchrun --nproc-per-node 4 compiled_fault_worker.py FOLDER KIND
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helix_compile import HelixModule
from helix_compile.runtime import inductor
from tests.distributed.fault_worker import FAULTY, STEP, all_have_come, hit

STRUCK = "layer_2.segment_1"  # behind the exchange of the second layer, the last
WEIGHT = "model.layers.1.self_attn.o_proj.weight"


def main(folder: Path, kind: str) -> None:
    """Five steps of two sequences."""
    step, rank, asked = 0, -1, set[str]()
    made = inductor.code_of

    def code_of(segment: Any, bound: Any, where: str) -> Callable[..., Any]:
        asked.add(where)
        code = made(segment, bound, where)

        def struck(*tensors: Any) -> Any:
            if step == STEP:
                all_have_come(rank)
                if rank == FAULTY:
                    hit(kind.removeprefix("inside-"))
            return code(*tensors)

        return struck if where == STRUCK and kind.startswith("inside-") else code

    inductor.code_of = code_of
    loaded = HelixModule.load(folder)
    (own,) = loaded.ranks
    rank, odd = own.rank, own.rank == FAULTY
    assert STRUCK in asked
    for step in range(1, 6):
        strikes = odd and step == STEP
        if strikes and kind == "dtype":
            own.params[WEIGHT] = own.params[WEIGHT].double()
        ids = torch.full((2, 2 if strikes and kind == "shape" else 1), 9 if strikes and kind == "ids" else step)
        loaded(ids)
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
