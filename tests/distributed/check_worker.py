"""Two ranks that take five steps with each kind of check; in one step rank 1 is given other ids. What each saw, as JSON.

torchrun --nproc-per-node 2 check_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import fx

from helix_compile.errors import RuntimeFault
from helix_compile.layout.degrees import HelixLayout, HelixMesh
from helix_compile.worlds.world import open_world

c10d = torch.ops._c10d_functional
STEPS = 5


def main(folder: Path) -> None:
    """A world for each check and each step in which rank 1 differs; 0: in none."""
    seen, rank = {}, -1
    for check in ("deferred", "every", "off"):
        for odd in (0, 1, 3, STEPS):
            world = open_world(
                HelixMesh(HelixLayout(kvp=2, tpa=1, ep=1, tpf=2)), "distributed", torch.device("cpu"), check
            )
            world.start({})
            (rank,) = world.ranks
            said, done = [], 0
            for step in range(1, STEPS + 1):
                ids = torch.full((2, 1), 7 if rank == 1 and step == odd else step)
                try:
                    world.run(summed(), [[ids]])
                    done = step
                except RuntimeFault as error:
                    said.append([step, str(error)])
            try:
                world.settle()
            except RuntimeFault as error:
                said.append([0, str(error)])
            seen[f"{check}-{odd}"] = {"said": said, "done": done}
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def summed() -> fx.GraphModule:
    """A new one for each step, as an edit would make it: the sum of the ids over all ranks."""
    graph = fx.Graph()
    ids = graph.placeholder("input_ids")
    ids.meta["input"] = ["input", "input_ids"]
    total = graph.call_function(c10d.all_reduce.default, (ids, "sum", "world"))
    graph.output(graph.call_function(c10d.wait_tensor.default, (total,)))
    return fx.GraphModule(torch.nn.Module(), graph)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
