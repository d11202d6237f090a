"""A folder that other runtimes read: a model a rank with its weights beside it, and manifest.json, which says what they are.

rank0.onnx, rank0.onnx.data, rank1.onnx, ...    see docs/exports.md
manifest.json                                   last: its presence says "complete"
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from helix_compile.errors import ExportError
from helix_compile.export.exportable import check_exportable, without_kernels
from helix_compile.export.manifest import EXPORT_ID, MANIFEST, VERSION, described_file, facts_of_plan, format_manifest
from helix_compile.export.onnx_files import ExternalData, with_weights
from helix_compile.export.onnx_graph import RANK_INPUTS, RankModel, fix_sizes, nodes_in_order, rank_model
from helix_compile.export.onnx_nccl import DOMAINS, NCCL, collective_of, is_collective, map_to_nccl
from helix_compile.export.onnx_plan import LogicalModel, logical_model
from helix_compile.export.onnx_scope import COLLECTIVES, HELIX, IR_VERSION, OPSET
from helix_compile.files import StagedFiles
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.runtime.compiled import CompiledModule
from helix_compile.runtime.rank import Rank, follow_edits

PLAN = "plan"  # its files' name, as rank0 is a rank's


def export_onnx(
    compiled: CompiledModule,
    folder: Path,
    layers: Collection[int] | None = None,
    logical: CompiledModule | None = None,
    collectives: str = "helix",
    batch: int | None = None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Write the ONNX models of all ranks into `folder`, all or nothing; what is there stays. Returns the manifest.

    Args:
        compiled: with all ranks in this process.
        folder: is made, if it is not there.
        layers: of these layers alone; None: all.
        logical: the same model at cp=1, for plan.onnx.
        collectives: whose nodes they are, a name of DOMAINS in onnx_nccl.py.
        batch, tokens: B and T; None: free.

    Raises:
        ExportError: what has no ONNX, sizes that no step of the module has, files that would be replaced, ranks that live elsewhere.
        HelixError: the disk refuses.
    """
    check_exportable(compiled)
    layout, sizes = compiled.plan.layout, _sizes(compiled, batch, tokens)
    if compiled.device.type == "meta":
        raise ExportError("export: a module on the meta device has no weights to write; compile it with weights")
    follow_edits(compiled.plan, compiled.graph, compiled.ranks, compiled.facts)
    stems = [*(f"rank{r}" for r in range(layout.world_size)), *([PLAN] if logical is not None else [])]
    names = [*(name for stem in stems for name in _files(stem)), MANIFEST]
    if taken := [name for name in names if (folder / name).exists()]:
        raise ExportError(f"export: {folder} holds {', '.join(taken)}, which would be replaced; choose another folder")
    graph = without_kernels(compiled)
    pages = pages_per_sequence(compiled.plan.options, layout.kvp)
    vocab = compiled.facts.vocab_size
    common = rank_model(graph, compiled.plan, compiled.ranks[0].cache, pages, vocab, layers)
    if collectives == "ort-nccl":
        map_to_nccl(common.model, layout, compiled.plan.dtype)
    plan = None
    if logical is not None:
        plan = logical_model(compiled, logical, graph, without_kernels(logical), layers)
    identity = hashlib.sha256(common.model.SerializeToString(deterministic=True) + compiled.plan.to_json().encode())
    for model in (common.model, *([plan.common.model] if plan else [])):
        fix_sizes(model, sizes)
        helper.set_model_props(model, {EXPORT_ID: identity.hexdigest()})
    manifest = _manifest(compiled, common, layers, identity.hexdigest(), collectives)
    with StagedFiles(folder, "export") as files:
        for rank in compiled.ranks:
            coordinates = {name: layout.index(axis, rank.rank) for name, axis in RANK_INPUTS.items()}
            digests = _write_model(files, f"rank{rank.rank}", common, coordinates, rank, manifest["files"])
            for name, digest in digests.items():
                manifest["weights"].setdefault(name, []).append(digest)
        if plan is not None and logical is not None:
            alone = dict.fromkeys(RANK_INPUTS, 0)
            digests = _write_model(files, PLAN, plan.common, alone, logical.ranks[0], manifest["files"])
            manifest["plan_model"] = _described_plan(plan, digests)
        files.write_text(MANIFEST, format_manifest(manifest))
        files.move()
    return manifest


def _sizes(compiled: CompiledModule, batch: int | None, tokens: int | None) -> dict[str, int]:
    """Letter -> the size that it is to be, of those that are asked for."""
    options = compiled.plan.options
    most = {"B": ("batch", batch, options.max_batch_size), "T": ("tokens", tokens, options.max_seq_len)}
    for name, size, largest in most.values():
        if size is not None and not 1 <= size <= largest:
            raise ExportError(f"export: {name}={size}: a step of this module has 1 to {largest}")
    return {letter: size for letter, (_, size, _) in most.items() if size is not None}


def _files(stem: str) -> tuple[str, str]:
    return f"{stem}.onnx", f"{stem}.onnx.data"


def _write_model(
    files: StagedFiles,
    stem: str,
    common: RankModel,
    coordinates: Mapping[str, int],
    rank: Rank,
    facts: dict[str, dict[str, Any]],
) -> dict[str, str]:
    """Both files of a model; what the manifest says of them goes into `facts`. The digest of each weight."""
    model_name, data_name = _files(stem)
    protos: list[TensorProto] = []
    digests: dict[str, str] = {}

    def write_data(path: Path) -> None:
        data = ExternalData(path, data_name)
        protos.extend(data.write({name: rank.params[name] for name in common.weights}))
        digests.update(data.digests)

    def write_model(path: Path) -> None:
        onnx.save(with_weights(common, coordinates, protos), path)

    for name, write in ((data_name, write_data), (model_name, write_model)):

        def writing(path: Path, name: str = name, write: Callable[[Path], None] = write) -> None:
            write(path)
            facts[name] = described_file(path)

        files.write(name, writing)
    return digests


def _described_plan(plan: LogicalModel, digests: dict[str, str]) -> dict[str, Any]:
    """What the manifest says of plan.onnx."""
    graph = plan.common.model.graph
    return {
        "file": _files(PLAN)[0],
        "inputs": [described(info) for info in graph.input],
        "outputs": [described(info) for info in graph.output],
        "not_in_shardings": list(plan.not_said),
        "weights": digests,
    }


def _manifest(
    compiled: CompiledModule, common: RankModel, layers: Collection[int] | None, identity: str, collectives: str
) -> dict[str, Any]:
    plan, ranks = compiled.plan, compiled.plan.layout.world_size
    exchanges = [n for n in nodes_in_order(common.model) if is_collective(n, DOMAINS[collectives])]
    return {
        "format": "onnx",
        "version": VERSION,
        EXPORT_ID: identity,
        "opset": OPSET,
        "ir_version": IR_VERSION,
        **facts_of_plan(plan, layers),
        "inputs": [described(info) for info in common.model.graph.input],
        "outputs": [described(info) for info in common.model.graph.output],
        "collectives_by": collectives,
        "collectives": [collective_of(node, ranks) for node in exchanges],
        "needs": _needs(common.model, plan.dtype, collectives if exchanges else ""),
        "weights": {},
        "files": {},
    }


def described(info: ValueInfoProto) -> dict[str, Any]:
    """Name, dtype (numpy's word) and shape of an input or output; letters are free sizes."""
    tensor = info.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return {"name": info.name, "dtype": dtype, "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim]}


_COLLECTIVES_OF = {
    "": [],
    "helix": [f"{COLLECTIVES}: the collectives are the runtime's to define; stock ones have none"],
    "ort-nccl": [f"{NCCL}: collectives of an onnxruntime that was built with NCCL, one rank a card; never run here"],
}


def _needs(model: ModelProto, dtype: str, collectives: str) -> list[str]:
    """What a runtime must bring that the files do not define, and what stock runtimes are known not to run."""
    found = [*_COLLECTIVES_OF[collectives]]
    if dtype == str(torch.bfloat16)[6:]:
        found.append(
            "bfloat16: stock onnxruntime has no CPU kernels for it and onnx's Einsum none at this opset: stored, not run"
        )
    if any(f.domain == HELIX and f.name == "moe_experts" for f in model.functions):
        found.append("Loop with rows chosen by data (routed experts)")
    return found
