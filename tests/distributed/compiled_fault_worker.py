"""One rank of a saved model whose step is compiled; a fault happens on rank 2, in the third step, inside the second layer.

torchrun --nproc-per-node 4 compiled_fault_worker.py FOLDER KIND

A function that an edit calls strikes between two compiled segments; "shape": the rank gives a parameter that its code was not made for.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from helix_compile import HelixModule
from helix_compile.ir.collectives import WAIT
from helix_compile.ir.graph import calls
from helix_compile.ir.stage import bodies_of
from tests.distributed.fault_worker import FAULTY, STEP, all_have_come, hit


def main(folder: str, kind: str) -> None:
    """Five steps of one token."""
    compiled = HelixModule.load(folder)
    rank = compiled.ranks[0]
    step = 0

    def strike(value: Tensor) -> Tensor:
        if step == STEP and kind != "shape":
            all_have_come(rank.rank)
            if rank.rank == FAULTY:
                hit(kind)
        return value

    body = [*bodies_of(compiled.graph).values()][-1]
    merged = calls(body.graph, WAIT)[0]
    with body.graph.inserting_after(merged):
        struck = body.graph.call_function(strike, (merged,))
    merged.replace_all_uses_with(struck, delete_user_cb=lambda user: user is not struck)
    body.recompile()
    for step in range(1, 6):
        if step == STEP and kind == "shape" and rank.rank == FAULTY:
            name = next(name for name in rank.params if name.endswith("1.input_layernorm.weight"))
            rank.params[name] = rank.params[name][:-1].clone()
        compiled(torch.full((2, 1), step))
    print(f"rank {rank.rank} done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
