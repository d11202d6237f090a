"""From a checkpoint folder to scores: loads the model, compiles it or finds who serves it, asks both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from helix_compile.capture.source import load_folder
from helix_compile.compile import helix_compile
from helix_compile.config.options import HelixOptions
from helix_compile.eval.answers import Answerer, LocalAnswerer
from helix_compile.eval.decoders import Decoder, HelixDecoder, ModelDecoder
from helix_compile.eval.evaluation import ORIGINAL, Evaluation, Progress, evaluate
from helix_compile.eval.folder import load_tokenizer
from helix_compile.eval.tasks import Document, make_documents

if TYPE_CHECKING:
    from helix_compile.eval.endpoint import Endpoint

HELIX = "helix"


@dataclass(frozen=True)
class Asked:
    """What is asked, beside the model.

    Attributes:
        tasks: names in tasks.TASKS.
        contexts: tokens.
        limit: questions of a task at a context.
        seed: of the documents.
        prefill: see HelixDecoder.
        harness_tasks: names of lm-evaluation-harness's, whose prompts are prefilled by who answers.
        include: folder with task files for these.
    """

    tasks: Sequence[str]
    contexts: Sequence[int]
    limit: int = 50
    seed: int = 0
    prefill: str = "helix"
    harness_tasks: Sequence[str] = ()
    include: Path | None = None


def documents_of(asked: Asked, tokenizer: Any) -> list[list[Document]]:
    """The documents of each task at each context, shortest first."""
    return [
        make_documents(task, tokenizer, context, asked.limit, asked.seed)
        for context in sorted(asked.contexts)
        for task in asked.tasks
    ]


def evaluate_folder(
    folder: Path,
    options: HelixOptions,
    asked: Asked,
    *,
    world: Any = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the unmodified model of a checkpoint folder, and the compiled one.

    Args:
        options: how it is compiled; of room it gets one sequence of the longest context, for the harness of max_seq_len at least.
        dtype: default: the folder's.
        progress: called after each question.

    Raises:
        HelixError: a folder, tokenizer, task or option that does not fit.
    """
    tokenizer = load_tokenizer(folder)
    documents = documents_of(asked, tokenizer)  # first: they may be refused, and a model takes long to load
    begun = time.perf_counter()
    model, notes = load_folder(folder, dtype)
    if device is not None:
        model = model.to(device)
    needed = [*(asked.contexts if asked.tasks else ()), *((options.max_seq_len,) if asked.harness_tasks else ())]
    options = replace(options, max_batch_size=1, max_seq_len=max(needed))
    compiled = helix_compile(model, options=options, world=world)
    original = ModelDecoder(model)
    sender = None if asked.prefill == "helix" else original
    ends = end_tokens(model)
    answerers: dict[str, Answerer] = {
        ORIGINAL: LocalAnswerer(original, ends),
        HELIX: LocalAnswerer(HelixDecoder(compiled, asked.prefill, sender), ends),
    }
    ready = time.perf_counter() - begun
    evaluation = evaluate(answerers, documents, progress)
    if asked.harness_tasks:
        from helix_compile.eval.harness import DecoderLM  # an extra, and slow to import
        from helix_compile.eval.harness_rows import harness_rows

        decoders: dict[str, Decoder] = {ORIGINAL: original, HELIX: HelixDecoder(compiled)}
        models = {who: DecoderLM(d, tokenizer, options.max_seq_len, str(folder)) for who, d in decoders.items()}
        evaluation.rows += harness_rows(models, asked.harness_tasks, asked.limit, asked.include, asked.seed)
    layout, evaluation.is_leader = compiled.plan.layout, compiled.world.is_leader
    evaluation.facts = {
        "model": str(folder),
        "architecture": compiled.plan.model,
        "dtype": compiled.plan.dtype,
        "cp": layout.kvp,
        "tpa": layout.tpa,
        "ep": layout.ep,
        "prefill": asked.prefill,
        "seed": asked.seed,
        "device": str(compiled.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds_to_compile": round(ready, 2),
        "notes": list(notes),
    }
    return evaluation


def evaluate_endpoint(
    folder: Path,
    endpoint: Endpoint,
    asked: Asked,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the unmodified model of a checkpoint folder, and a server that serves it: the rows of "helix" are the server's.

    Args:
        endpoint: the server.
        asked: its tasks and contexts; who prefills is the server's own affair, and the harness asks servers itself.
        dtype, device: of the unmodified model.
        progress: called after each question.

    Raises:
        HelixError: a folder, tokenizer or task that does not fit; a server that does not answer as it should.
    """
    from helix_compile.eval.endpoint import EndpointAnswerer  # an extra

    tokenizer = load_tokenizer(folder)
    documents = documents_of(asked, tokenizer)
    model, notes = load_folder(folder, dtype)
    if device is not None:
        model = model.to(device)
    ends = end_tokens(model)
    answerers: dict[str, Answerer] = {
        ORIGINAL: LocalAnswerer(ModelDecoder(model), ends),
        HELIX: EndpointAnswerer(endpoint, tokenizer, ends),
    }
    evaluation = evaluate(answerers, documents, progress)
    evaluation.facts = {
        "model": str(folder),
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "answered_by": {ORIGINAL: "the unmodified model, here", HELIX: f"{endpoint.url}, model {endpoint.model}"},
        "in_flight": endpoint.in_flight,
        "seed": asked.seed,
        "device": str(device or "cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "notes": list(notes),
    }
    return evaluation


def end_tokens(model: Any) -> list[int]:
    """What ends an answer, as generate() has it."""
    said = model.generation_config.eos_token_id
    return said if isinstance(said, list) else [] if said is None else [said]
