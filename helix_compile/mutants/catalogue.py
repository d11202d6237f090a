"""Every mutant, by family. Importing this module registers them."""

from __future__ import annotations

from helix_compile.mutants import gqa_mutants, graph_mutants, kernel_mutants, param_mutants
from helix_compile.mutants.mutant import CATALOGUE, GQA_CATALOGUE, Mutant

__all__ = [
    "CATALOGUE",
    "GQA_CATALOGUE",
    "Mutant",
    "gqa_mutants",
    "graph_mutants",
    "kernel_mutants",
    "param_mutants",
]
