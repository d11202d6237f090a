"""One family, or a row of docs/families.md: against the unmodified model: ragged left-padded prompt, six steps of T in {1, 3}, greedy tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from helix_compile import HelixError, helix_compile
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.families import FAMILIES, tiny_family

PROMPT = [5, 2, 9]
STEPS = (1, 3, 1, 1, 3, 1)


@dataclass(frozen=True)
class FamilyRun:
    """Largest deviation of a logit over the largest logit, and whether every greedy token was the same."""

    worst: float
    same_tokens: bool


def compiled_family(model: Any, cp: int, **options: Any) -> Any:
    return helix_compile(model, cp=cp, tokens_per_block=2, max_batch_size=3, max_seq_len=64, **options)


def run_family(model: Any, compiled: Any) -> FamilyRun:
    """Steps of one token feed the greedy one, so a wrong token is not forgotten."""
    reference, mask = Reference(model), left_padded(PROMPT)
    torch.manual_seed(1)
    ids, worst, same = random_ids(model, *mask.shape), 0.0, True
    for tokens in (*STEPS, 0):
        with WidenedIslands():
            got, expected = compiled(ids, mask), reference.step(ids, mask)
        worst = max(worst, deviation(got, expected, mask))
        last = expected[:, -1].argmax(-1)
        same = same and torch.equal(got[:, -1].argmax(-1), last)
        mask = torch.ones(len(PROMPT), tokens, dtype=torch.int64)
        ids = last[:, None] if tokens == 1 else random_ids(model, len(PROMPT), tokens)
    return FamilyRun(worst, same)


@dataclass(frozen=True)
class Row:
    """One line of docs/families.md."""

    name: str
    sites: str
    leaves: str
    deviations: tuple[str, ...]
    refused: str

    def __str__(self) -> str:
        cells = (self.name, self.sites, self.leaves, *self.deviations, self.refused)
        return "| " + " | ".join(cells) + " |"


def measured_row(name: str, variant: str = "", degrees: tuple[int, ...] = (2, 4)) -> Row:
    """Compile a family at each cp and run it; what is refused says why in one line."""
    title = f"{name}, {variant}" if variant else name
    model, deviations, facts = tiny_family(name, variant), [], None
    for cp in degrees:
        try:
            compiled = compiled_family(model, cp, **FAMILIES[name].options)
        except HelixError as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if facts is None:
                return Row(title, "-", "-", ("-",) * len(degrees), reason)
            deviations.append("refused: heads")
            continue
        run = run_family(model, compiled)
        deviations.append(f"{run.worst:.1e}" if run.same_tokens else "other tokens")
        facts = compiled.inspect().facts
    assert facts is not None
    return Row(title, _sites(facts), _leaves(facts), tuple(deviations), "")


def _sites(facts: dict[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for body in facts["layers"]:
        counts.update({role: n * body["count"] for role, n in body["roles"].items()})
    return ", ".join(f"{n} {role.replace('_', ' ')}" for role, n in counts.items())


def _leaves(facts: dict[str, Any]) -> str:
    return ", ".join(leaf["module"] for leaf in facts["leaves"]) or "-"
