"""One family, or a row of docs/families.md: against the unmodified model: ragged left-padded prompt, six steps of T in {1, 3}, greedy tokens."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from helix_compile import HelixError, RuntimeFault, helix_compile
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.decoders import MAKINGS, Making, tiny_decoder
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


def run_family(model: Any, compiled: Any, lengths: list[int] = PROMPT) -> FamilyRun:
    """Steps of one token feed the greedy one, so a wrong token is not forgotten."""
    reference, mask = Reference(model), left_padded(lengths)
    torch.manual_seed(1)
    ids, worst, same = random_ids(model, *mask.shape), 0.0, True
    for tokens in (*STEPS, 0):
        with WidenedIslands():
            got, expected = compiled(ids, mask), reference.step(ids, mask)
        worst = max(worst, deviation(got, expected, mask))
        last = expected[:, -1].argmax(-1)
        same = same and torch.equal(got[:, -1].argmax(-1), last)
        mask = torch.ones(len(lengths), tokens, dtype=torch.int64)
        ids = last[:, None] if tokens == 1 else random_ids(model, len(lengths), tokens)
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
            if facts is None:
                return Row(title, "-", "-", ("-",) * len(degrees), reason(error))
            deviations.append("refused: heads")
            continue
        deviations.append(_measured(model, compiled))
        facts = compiled.inspect().facts
    assert facts is not None
    return Row(title, _sites(facts), _leaves(facts), tuple(deviations), "")


def decoder_row(name: str) -> Row:
    """The same of a class that the search of decoders.py found, at cp = 2; what matches in part is measured as far as it does."""
    making, refused = MAKINGS.get(name, Making()), ""
    if making.not_made:
        return Row(name, "-", "-", ("-",), f"not tried: {making.not_made}")
    model = tiny_decoder(name)
    for options in ({}, {"unmatched": "keep"}):
        try:
            compiled = compiled_family(model, 2, **options)
        except HelixError as error:
            refused = refused or reason(error)
            continue
        facts, how = compiled.inspect().facts, ", the rest kept" if options else ""
        how += "" if making.padded else ", no padding"
        try:
            measured = _measured(model, compiled, PROMPT if making.padded else [max(PROMPT)] * len(PROMPT))
        except RuntimeFault as error:  # a module that is kept can't run in the place of a layer
            return Row(name, "-", "-", ("-",), f"{refused}; kept: {reason(error)}")
        return Row(name, _sites(facts) + how, _leaves(facts), (measured,), refused)
    return Row(name, "-", "-", ("-",), refused)


def reason(error: HelixError) -> str:
    """What an error says first, and of what came closest to a match its reason, without advice."""
    first, *rest = str(error).splitlines()
    closest = next((line.strip() for line in rest if line.startswith("  closest: ")), "")
    text = re.split(r"[ (;]*nearest that works", f"{type(error).__name__}: {first} {closest}")[0].strip()
    return (text + ")" * (text.count("(") - text.count(")"))).replace("|", "/")


def _measured(model: Any, compiled: Any, lengths: list[int] = PROMPT) -> str:
    run = run_family(model, compiled, lengths)
    return f"{run.worst:.1e}" if run.same_tokens else "other tokens"


def _sites(facts: dict[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for body in facts["layers"]:
        counts.update({role: n * body["count"] for role, n in body["roles"].items()})
    return ", ".join(f"{n} {role.replace('_', ' ')}" for role, n in counts.items())


def _leaves(facts: dict[str, Any]) -> str:
    return ", ".join(leaf["module"] for leaf in facts["leaves"]) or "-"
