"""One module, one thread at a time; modules of one model side by side; what would copy or trace a module is refused."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helix_compile import HelixError, HelixModule, RuntimeFault, helix_compile
from tests.support.driver import random_ids
from tests.support.models import fresh_model, tiny_model


def compiled_tiny() -> HelixModule:
    return helix_compile(tiny_model(), cp=2, max_seq_len=64)


def in_threads(*runs: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, all at once."""
    out: list[Any] = [None] * len(runs)

    def go(k: int) -> None:
        try:
            out[k] = runs[k]()
        except HelixError as error:
            out[k] = error

    threads = [threading.Thread(target=go, args=(k,)) for k in range(len(runs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out


def test_another_thread_is_refused_by_name_and_leaves_no_trace() -> None:
    compiled, ids = compiled_tiny(), random_ids(tiny_model(), 1, 6)
    alone = compiled(ids)
    compiled.reset()
    inside, done = threading.Event(), threading.Event()
    run = compiled.world.run

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        done.wait(60)
        return run(*args, **kwargs)

    object.__setattr__(compiled.world, "run", slow)
    results: list[Any] = []
    first = threading.Thread(target=lambda: results.append(compiled(ids)))
    first.start()
    assert inside.wait(60)
    for call in (lambda: compiled(ids), compiled.reset, lambda: compiled.truncate(0), lambda: compiled.generate(ids)):
        with pytest.raises(RuntimeFault, match="another thread is using this module"):
            call()
    done.set()
    first.join()
    assert torch.equal(results[0], alone) and compiled.lengths.tolist() == [6]


def test_modules_of_one_model_run_side_by_side() -> None:
    ids = [random_ids(tiny_model(), 1, n) for n in (6, 9)]
    modules = [compiled_tiny(), compiled_tiny()]
    alone = [m.generate(i, max_new_tokens=8, do_sample=False) for m, i in zip(modules, ids, strict=True)]
    both = in_threads(
        *(lambda m=m, i=i: m.generate(i, max_new_tokens=8, do_sample=False) for m, i in zip(modules, ids, strict=True))
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


@pytest.mark.slow
@pytest.mark.fresh_capture
def test_two_compilations_at_once() -> None:
    models = [fresh_model("short"), fresh_model("short")]
    first, second = in_threads(*(lambda m=m: helix_compile(m, cp=2, max_seq_len=64) for m in models))
    ids = random_ids(models[0], 1, 5)
    assert torch.equal(first(ids), second(ids))


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (copy.deepcopy, "deepcopy of a HelixModule is refused; helix_compile"),
        (copy.copy, "save.folder"),
        (pickle.dumps, "save.folder"),
        (lambda c: torch.save(c, io.BytesIO()), "save.folder"),
        (lambda c: torch.jit.trace(c, (torch.zeros(1, 2, dtype=torch.int64),)), "can't be traced or exported"),
        (
            lambda c: torch.export.export(c, (torch.zeros(1, 2, dtype=torch.int64),), strict=False),
            "can't be traced or exported",
        ),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "jit.trace", "export"],
)
def test_copies_and_traces_are_refused_with_what_to_use(use: Callable[[Any], Any], said: str) -> None:
    compiled = compiled_tiny()
    with pytest.raises(HelixError, match=said):
        use(compiled)
    assert compiled.lengths.tolist() == []
