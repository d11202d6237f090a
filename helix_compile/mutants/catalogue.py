"""Every mutant, by family. Importing this module registers them."""

from __future__ import annotations

from helix_compile.mutants import graph_mutants, kernel_mutants, param_mutants
from helix_compile.mutants.mutant import CATALOGUE, Mutant

__all__ = ["CATALOGUE", "Mutant", "graph_mutants", "kernel_mutants", "param_mutants"]
