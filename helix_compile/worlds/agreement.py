"""Do all ranks mean the same? Before the first step, and in every step; through the store, not through a collective.

Ranks that disagree may not be able to run a collective together, and the bytes that c10d moves stay those of the plan.
Before the first step each rank says what it has, rank 0 compares, and everyone hears the verdict. In a step each rank
posts a digest of its inputs and reads those of all: of this step before it is run, or of the step before, which all have
posted long ago, so that nobody waits.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.ir.graph import InputTable
from helix_compile.worlds.guard import RankGuard

_EQUAL = "equal"
# Posts that are kept of each rank. A rank that posts step k has read those of k - 2, so its peers have posted k - 2 and
# read k - 4 before: what it writes over is read by nobody any more.
_KEPT = 4


class StartAgreement:
    """What the ranks are about to run, said in full once. One round is a set, a wait and a get for a rank."""

    def __init__(self, guard: RankGuard):
        self.guard = guard
        self._round = 0

    def differing(self, claims: Mapping[str, str], node: str) -> str:
        """Who differs from the others in what, the same text on every rank; "" if all ranks claim the same.

        Args:
            claims: what -> short text.
            node: where the ranks are, for a peer that does not come.

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


class Post(NamedTuple):
    """What a rank says of a step.

    Attributes:
        waits: it reads what the others say before it runs the step.
        digest: of its inputs.
    """

    step: int
    waits: bool
    digest: str

    @classmethod
    def of(cls, text: bytes) -> Post:
        """As it stands in the store."""
        step, waits, digest = text.decode().split()
        return cls(int(step), waits == "1", digest)

    def __str__(self) -> str:
        return f"{self.step} {int(self.waits)} {self.digest}"


class StepAgreement:
    """The inputs of each step, compared by every rank for itself.

    Args:
        check: "every": a step is run when all ranks are known to have the same. "deferred": a step's inputs are compared
            when the next one begins, except in the first step and in one whose shapes are not those of the step before:
            ranks whose shapes differ could not finish their collectives. "off": never.
    """

    def __init__(self, guard: RankGuard, check: str):
        self.guard = guard
        self.check = check if guard.world_size > 1 else "off"
        self._shapes: list[tuple[str, tuple[int, ...]]] | None = None  # on which the ranks agreed last
        self._open = 0  # the step whose inputs are still to be compared
        self._begun: set[int] = set()  # slots of which every rank's first post was seen
        self._texts = InputTexts()

    def begin(self, inputs: Mapping[str, Tensor], node: str) -> str:
        """Post this step's inputs and compare what is due.

        Returns:
            Who differs in what where nothing was run yet, and every rank is told the same; "" if the step may be run.

        Raises:
            RuntimeFault: ranks differed in the step before, or this one alone compares before its step and the others run
                theirs already; a peer raised, died or is stuck.
        """
        if self.check == "off":
            return ""
        step, shapes = self.guard.step, [(name, tuple(tensor.shape)) for name, tensor in inputs.items()]
        waits = self.check == "every" or shapes != self._shapes
        self._post(step, waits, self._texts.of(inputs))
        self.settle(node)
        if not waits:
            self._open = step
            return ""
        self._shapes = None
        said, posts = self._differing(step, node)
        if said and not all(post.waits for post in posts):
            raise RuntimeFault(
                f"{said}; the ranks whose shapes are those of the step before have begun it: start them again"
            )
        if not said:
            self._shapes = shapes
        return said

    def settle(self, node: str) -> None:
        """Compare what is still open; nobody waits long, for each peer has begun that step.

        Raises:
            RuntimeFault: ranks differed in it, and it was run.
        """
        if self._open and (said := self._differing(self._open, node)[0]):
            raise RuntimeFault(
                f"{said}; it was run (check='deferred' compares a step's inputs when the next one begins), so what the ranks "
                "computed and cached since is not the model's: start them again; check='every' compares before a step is run"
            )
        self._open = 0

    def _post(self, step: int, waits: bool, texts: dict[str, str]) -> None:
        """The texts are there to be read where digests differ."""
        said = json.dumps(texts)
        digest = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
        rank, store = self.guard.rank, self.guard.store
        store.set(f"said/{step % _KEPT}/{rank}", said)
        store.set(f"post/{step % _KEPT}/{rank}", str(Post(step, waits, digest)))

    def _differing(self, step: int, node: str) -> tuple[str, list[Post]]:
        posts = self._posts(step, node)
        if len({post.digest for post in posts}) == 1:
            return "", posts
        keys = [f"said/{step % _KEPT}/{r}" for r in range(self.guard.world_size)]
        return difference([json.loads(text) for text in self.guard.store.multi_get(keys)], step), posts

    def _posts(self, step: int, node: str) -> list[Post]:
        """Every rank's post of a step, as soon as all are there."""
        slot, store = step % _KEPT, self.guard.store
        keys = [f"post/{slot}/{r}" for r in range(self.guard.world_size)]
        posts: list[Post] = []

        def all_came() -> bool:
            if slot not in self._begun:
                if not store.check(keys):
                    return False
                self._begun.add(slot)
            posts[:] = [Post.of(text) for text in store.multi_get(keys)]
            return all(post.step == step for post in posts)

        def late() -> list[int]:
            if not posts:
                return [r for r, key in enumerate(keys) if not store.check([key])]
            return [r for r, post in enumerate(posts) if post.step != step]

        self.guard.wait_until(all_came, late, node)
        return posts


class AgreedInputs:
    """Which inputs of a graph every rank gives alike: ids, positions (so lengths and mask too), pages. Read once a graph."""

    def __init__(self) -> None:
        self._table = InputTable()
        self._places: list[tuple[str, int]] = []

    def of(self, graph: fx.Graph, inputs: Sequence[object]) -> dict[str, Tensor]:
        """Name -> the value that is given."""
        if self._table.read(graph):
            refs = enumerate(self._table.refs)
            self._places = [(r.name, i) for i, r in refs if r.kind == "input" and not r.name.endswith("_rank")]
        given = ((name, inputs[i]) for name, i in self._places)
        return {name: value for name, value in given if isinstance(value, Tensor)}


class InputTexts:
    """Shape and digest of tensors as short text; one that is the same as in the step before is not read again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, int, str]] = {}

    def of(self, inputs: Mapping[str, Tensor]) -> dict[str, str]:
        """Name -> text."""
        return {name: self._text(name, tensor) for name, tensor in inputs.items()}

    def _text(self, name: str, tensor: Tensor) -> str:
        version = -1 if tensor.is_inference() else tensor._version
        known = self._known.get(name)
        if known is not None and known[0] is tensor and known[1] == version >= 0:
            return known[2]
        stored = tensor.detach().cpu().contiguous().numpy().tobytes()
        text = f"{list(tensor.shape)} (digest {hashlib.blake2b(stored, digest_size=4).hexdigest()})"
        self._known[name] = (tensor, version, text)
        return text


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
