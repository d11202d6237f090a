"""Do all ranks mean the same? Each says what it has, rank 0 compares, everyone hears the verdict.

It goes through the store, not through a collective: ranks that disagree may not be able to run one together. One
round is a set, a wait and a get for a rank, and one multi_get for rank 0, whatever the number of ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from helix_compile.rank_guard import RankGuard

_EQUAL = "equal"


class RankAgreement:
    """Rounds of comparison over a guard's store; every rank takes part in each."""

    def __init__(self, guard: RankGuard):
        self.guard = guard
        self._round = 0

    def differing(self, claims: Mapping[str, str], node: str) -> str:
        """Who differs from the others in what, the same text on every rank; "" if all ranks claim the same.

        Args:
            claims: what -> short text.
            node: where the step is, for a peer that does not come.

        Raises:
            RuntimeFault: a peer raised, died or is stuck.
        """
        guard, store, rank = self.guard, self.guard.store, self.guard.rank
        if guard.world_size == 1:
            return ""
        verdict = f"verdict/{self._round}/0"
        keys = [f"claims/{self._round}/{r}" for r in range(guard.world_size)]
        store.set(keys[rank], json.dumps(dict(claims)))
        if rank == 0:
            guard.wait(keys, node)
            said = difference([json.loads(text) for text in store.multi_get(keys)], guard.step)
            store.set(verdict, said or _EQUAL)
            if self._round:
                store.delete_key(f"verdict/{self._round - 1}/0")  # all ranks are past it
        else:
            guard.wait([verdict], node, owed=keys)
            said = store.get(verdict).decode()
        store.delete_key(keys[rank])  # rank 0 has read it
        self._round += 1
        return "" if said == _EQUAL else said


def difference(claims: list[dict[str, str]], step: int) -> str:
    """Which rank differs in what from most; "" if none does."""
    found = []
    for name in dict.fromkeys(name for claim in claims for name in claim):
        values = [claim.get(name, "nothing") for claim in claims]
        usual = Counter(values).most_common(1)[0][0]
        witness = values.index(usual)
        found += [
            f"rank {r} has {name} {value}, rank {witness} has {usual}"
            for r, value in enumerate(values)
            if value != usual
        ]
    when = f"in step {step}" if step else "before the first step"
    return f"ranks disagree {when}: {'; '.join(found)}" if found else ""
