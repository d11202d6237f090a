"""Read an ONNX export back: files against the manifest, and what the models compute against the plan in it.

Digests say that a file changed; what stands behind them says it of a folder whose digests were made anew, or whose writer erred:
logits alone show neither a cache that is not written (until the second step) nor ranks that agree on a wrong ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, ShardingSpecProto, TensorProto, helper, numpy_helper

from helix_compile.export.manifest import (
    EXPORT_ID,
    MANIFEST,
    OTHER_VALUES,
    Fault,
    check_files,
    digest_of_tensor,
    plan_of,
)
from helix_compile.export.onnx_folder import described
from helix_compile.export.onnx_graph import RANK_INPUTS, nodes_in_order
from helix_compile.export.onnx_nccl import DOMAINS, axis_of, collective_of, is_collective
from helix_compile.export.onnx_ops import ONNX_NAMES, helix_functions
from helix_compile.export.onnx_scope import BODIES, HELIX, ONNX_DTYPES
from helix_compile.export.onnx_shardings import check_shardings, parts_of, specs_of
from helix_compile.plan.helix_plan import HelixPlan


def check_onnx(folder: Path, manifest: dict[str, Any]) -> list[Fault]:
    """Every fault of a folder, in the order in which they are looked for."""
    faults = check_files(folder, manifest)
    models: dict[int, ModelProto] = {}
    plan = plan_of(manifest)
    for rank in range(manifest["ranks"]):
        model, wrong = _read_model(folder / f"rank{rank}.onnx", manifest)
        faults += wrong
        if model is not None:
            models[rank] = model
            faults += _check_model(rank, model, manifest, plan)
            faults += _check_weights(folder, rank, model, manifest)
    faults += _check_ranks_agree(models)
    return faults + (_check_plan(folder, manifest) if "plan_model" in manifest else [])


def _read_model(path: Path, manifest: dict[str, Any]) -> tuple[ModelProto | None, list[Fault]]:
    """A model that is one as far as onnx.checker can say, and whose calls all have a function; or what is wrong."""
    if not path.is_file():
        return None, []  # said already
    try:
        model = onnx.load(path, load_external_data=False)
        bare = ModelProto()
        bare.CopyFrom(model)
        for tensor in bare.graph.initializer:  # the checker would look for the files
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        del bare.graph.initializer[:]
        onnx.checker.check_model(bare)
    except (DecodeError, onnx.checker.ValidationError) as error:
        return None, [Fault("unreadable", path.name, f"no ONNX model: {str(error).strip().splitlines()[0]}")]
    opsets = {imported.domain: imported.version for imported in model.opset_import}
    if (got := (model.ir_version, opsets.get(""))) != (manifest["ir_version"], manifest["opset"]):
        return None, [Fault("unreadable", path.name, f"(IR, opset) are {got}, not those of the manifest")]
    defined = {(function.domain, function.name) for function in model.functions}
    called = {(n.domain, n.op_type) for holder in (model.graph, *model.functions) for n in holder.node}
    if lost := sorted(op for domain, op in called - defined if domain in (HELIX, BODIES)):
        return None, [Fault("other_function", path.name, f"{', '.join(lost)} called, and not defined")]
    return model, []


def _check_plan(folder: Path, manifest: dict[str, Any]) -> list[Fault]:
    """plan.onnx: its specs can be, and applied to its weights they give those of the ranks."""
    stated = manifest["plan_model"]
    path = folder / stated["file"]
    model, faults = _read_model(path, manifest)
    if model is None:
        return faults
    faults = [Fault("sharding", f"{path.name}, {where}", what) for where, what in check_shardings(model)]
    faults += _check_stated(path.name, model, stated, manifest)
    faults += _check_degrees(path.name, model, {"cp": 1})
    faults += _check_caches(path.name, model)
    faults += _check_functions(path.name, model)
    if faults:
        return faults
    specs = {spec.tensor_name: spec for _, _, spec in specs_of(model)}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = f"{path.name}, {tensor.name}"
        if (digest := _digest(folder, tensor)) != stated["weights"].get(tensor.name):
            faults.append(Fault("weights", where, OTHER_VALUES if digest else "its external data is not there"))
        elif tensor.name in specs:
            faults += _check_parts(folder, tensor, specs[tensor.name], manifest["weights"][tensor.name], where)
    return faults


def _check_parts(
    folder: Path, tensor: TensorProto, spec: ShardingSpecProto, digests: list[str], where: str
) -> list[Fault]:
    """What a spec gives each rank of a weight, against what the rank was given."""
    whole = np.frombuffer(_read(folder, tensor) or b"", np.uint8).reshape(*tensor.dims, -1)
    wrong = [
        rank
        for rank, part in parts_of(spec, list(tensor.dims))
        if _digest_of(tensor, whole[part].shape[:-1], np.ascontiguousarray(whole[part]).data) != digests[rank]
    ]
    return [Fault("sharding", where, f"what its spec gives ranks {wrong} is not what they hold")] if wrong else []


def _check_model(rank: int, model: ModelProto, manifest: dict[str, Any], plan: HelixPlan) -> list[Fault]:
    """One model against manifest and plan."""
    name = f"rank{rank}.onnx"
    expected = {"cp": plan.layout.kvp, "tokens_per_block": plan.options.tokens_per_block}
    return [
        *_check_stated(name, model, manifest, manifest),
        *_check_coordinates(name, rank, model, plan),
        *_check_degrees(name, model, expected),
        *_check_collectives(name, model, manifest, plan),
        *_check_caches(name, model),
        *_check_functions(name, model),
    ]


def _check_stated(name: str, model: ModelProto, stated: dict[str, Any], manifest: dict[str, Any]) -> list[Fault]:
    """Which export it is a part of, and the inputs and outputs that `stated` says."""
    faults = []
    if {p.key: p.value for p in model.metadata_props}.get(EXPORT_ID) != manifest[EXPORT_ID]:
        faults.append(Fault("other_export", name, "it is part of another export than the manifest"))
    for kind, infos in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        if [described(i) for i in infos] != stated[kind]:
            got = ", ".join(f"{i['name']} {i['dtype']} {i['shape']}" for i in map(described, infos))
            faults.append(Fault(f"other_{kind}", name, f"got {got}"))
    return faults


def _check_functions(name: str, model: ModelProto) -> list[Fault]:
    """Functions of helix:: are the spec's."""
    known = helix_functions()
    return [
        Fault("other_function", f"{name}, {HELIX}::{function.name}", "not that of helix_ops.onnx.txt")
        for function in model.functions
        if function.domain == HELIX and function != known.get(function.name)
    ]


def _check_coordinates(name: str, rank: int, model: ModelProto, plan: HelixPlan) -> list[Fault]:
    faults = []
    for initializer in model.graph.initializer:
        if initializer.name in RANK_INPUTS:
            expected = plan.layout.index(RANK_INPUTS[initializer.name], rank)
            got = numpy_helper.to_array(initializer).tolist()
            if got != expected:
                what = f"{got}, rank {rank} of this layout is at {expected}"
                faults.append(Fault("rank_coordinate", f"{name}, {initializer.name}", what))
    return faults


def _check_degrees(name: str, model: ModelProto, expected: dict[str, int]) -> list[Fault]:
    """What the round robin of tokens hangs on, at each node that says it."""
    faults = []
    for node in nodes_in_order(model):
        if node.domain != HELIX:
            continue
        for attribute in node.attribute:
            if attribute.name in expected and attribute.i != expected[attribute.name]:
                where = f"{name}, node {node.name} ({node.op_type})"
                what = f"{attribute.name} = {attribute.i}, the plan has {expected[attribute.name]}"
                faults.append(Fault("ledger", where, what))
    return faults


def _check_collectives(name: str, model: ModelProto, manifest: dict[str, Any], plan: HelixPlan) -> list[Fault]:
    """Those of the manifest in their order, and as many of each kind as the plan has."""
    faults = []
    domain = DOMAINS.get(by := manifest.get("collectives_by", "helix"))
    if domain is None:
        return [Fault("collectives", MANIFEST, f"they are said to be {by!r}; known are {', '.join(DOMAINS)}")]
    nodes = [node for node in nodes_in_order(model) if is_collective(node, domain)]
    got = [collective_of(node, plan.layout.world_size) for node in nodes]
    if got != manifest["collectives"]:
        at = next(
            (i for i, (a, b) in enumerate(zip(got, manifest["collectives"], strict=False)) if a != b),
            min(len(got), len(manifest["collectives"])),
        )
        stated = manifest["collectives"][at] if at < len(manifest["collectives"]) else "none"
        found = got[at] if at < len(got) else "none"
        what = (
            f"{len(got)} of {len(manifest['collectives'])}; the first that differs is #{at}: {found}, expected {stated}"
        )
        faults.append(Fault("collectives", name, what))
    layers = set(manifest["layers"])
    planned = Counter[tuple[str, str]]()
    for body in plan.bodies:
        for collective in body.collectives:
            planned[ONNX_NAMES[collective.op], axis_of(collective.axis, domain)] += collective.parts * len(
                layers & set(body.layers)
            )
    for collective in plan.outer.collectives:
        planned[ONNX_NAMES[collective.op], axis_of(collective.axis, domain)] += 1
    # a value that is two in ONNX travels twice: kinds are compared, and counts from below
    counted = Counter((op, axis) for op, axis, *_ in got)
    for kind, count in (+planned).items():
        if counted[kind] < count:
            what = f"{counted[kind]} {kind[0]} over {kind[1]}, the plan has {count}"
            faults.append(Fault("collectives", name, what))
    for kind in counted.keys() - (+planned).keys():
        faults.append(Fault("collectives", name, f"{kind[0]} over {kind[1]}, of which the plan knows nothing"))
    return faults


def _check_caches(name: str, model: ModelProto) -> list[Fault]:
    """cache_i_out is what cache_append made of cache_i. The graph has no circles: onnx.checker has seen it."""
    faults = []
    functions = {f.name: f for f in model.functions if f.domain == BODIES}
    made = {output: node for node in model.graph.node for output in node.output}
    caches = [i.name for i in model.graph.input if i.name.startswith("cache_")]
    outputs = {o.name for o in model.graph.output}
    for cache in caches:
        end = f"{cache}_out"
        where = f"{name}, {end}"
        if end not in outputs:
            faults.append(Fault("cache_unwritten", where, "there is no such output"))
            continue
        source, appended = end, 0
        while source in made:
            node = made[source]
            if node.domain == BODIES:
                function = functions[node.op_type]
                before, count = _appended(function, function.output[list(node.output).index(source)])
                appended += count
                source = node.input[list(function.input).index(before)] if before in function.input else ""
            elif node.op_type == "Identity" or _is_append(node, source):
                appended += node.op_type != "Identity"
                source = node.input[0]
            else:
                source = ""
        if source != cache or appended == 0:
            what = f"it leads back to {source or 'something else'}, with {appended} appends on the way"
            faults.append(Fault("cache_unwritten", where, what))
    return faults


def _is_append(node: NodeProto, output: str) -> bool:
    return node.domain == HELIX and node.op_type == "cache_append" and output == node.output[0]


def _appended(function: Any, output: str) -> tuple[str, int]:
    """From an output of a body back to what it was before its appends, and how many these are."""
    made: dict[str, NodeProto] = {out: node for node in function.node for out in node.output}
    appended = 0
    while output in made:
        node = made[output]
        if _is_append(node, output):
            appended += 1
        elif node.op_type != "Identity":
            break
        output = node.input[0]
    return output, appended


def _check_weights(folder: Path, rank: int, model: ModelProto, manifest: dict[str, Any]) -> list[Fault]:
    """Each tensor's bytes against the digest that it had when it was cut."""
    faults, name = [], f"rank{rank}.onnx"
    found = {t.name: t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    for weight, digests in manifest["weights"].items():
        if weight not in found:
            faults.append(Fault("weights", f"{name}, {weight}", "the model has no such weight"))
            continue
        digest = _digest(folder, found.pop(weight))
        if digest is None:
            faults.append(Fault("weights", f"{name}, {weight}", "its external data is not there"))
        elif digest != digests[rank]:
            others = [r for r, of_rank in enumerate(digests) if of_rank == digest]
            what = f"it is rank {others[0]}'s" if others else OTHER_VALUES
            faults.append(Fault("weights", f"{name}, {weight}", what))
    faults += [Fault("weights", f"{name}, {weight}", "the manifest has no such weight") for weight in found]
    return faults


def _digest(folder: Path, tensor: TensorProto) -> str | None:
    """See digest_of_tensor(); None where its bytes are not there, or lie outside the folder."""
    data = _read(folder, tensor)
    return None if data is None else _digest_of(tensor, tensor.dims, data)


def _digest_of(tensor: TensorProto, sizes: Sequence[int], data: Any) -> str:
    dtype = next((str(d)[6:] for d, number in ONNX_DTYPES.items() if number == tensor.data_type), "another")
    return digest_of_tensor(dtype, sizes, data)


def _read(folder: Path, tensor: TensorProto) -> bytes | None:
    places = {entry.key: entry.value for entry in tensor.external_data}
    location, offset, length = (places.get(key, "") for key in ("location", "offset", "length"))
    path = folder / location
    if Path(location).name != location or not path.is_file() or not (offset.isdecimal() and length.isdecimal()):
        return None
    with open(path, "rb") as file:
        file.seek(int(offset))
        data = file.read(int(length))
    return data if len(data) == int(length) else None


def _check_ranks_agree(models: dict[int, ModelProto]) -> list[Fault]:
    """All models are one, but for initializers."""
    texts = {}
    for rank, model in models.items():
        bare = ModelProto()
        bare.CopyFrom(model)
        del bare.graph.initializer[:]
        texts[rank] = bare.SerializeToString(deterministic=True)
    counts = Counter(texts.values())
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    odd = [rank for rank, text in texts.items() if text != usual]
    return [Fault("ranks_differ", f"rank{rank}.onnx", "its graph is not that of the other ranks") for rank in odd]
