"""Sharding specs of ONNX (IR 11): written from layouts, applied to tensors, and checked, which onnx.checker does not do.

A spec says of one tensor which dims are cut in how many parts, and which device has each part, the first dim's parts outermost.
Where several devices hold one part a negative number stands for them, and index_to_device_group_map says which they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import onnx
from onnx import ModelProto, NodeProto, ShardingSpecProto, ValueInfoProto

from helix_compile.layout.degrees import HelixLayout

CONFIGURATION = "helix"


def spec_of(tensor: str, cuts: list[tuple[int, str]], layout: HelixLayout) -> ShardingSpecProto:
    """Of a tensor that is cut along (dim, axis of the mesh), each dim at most once."""
    spec = ShardingSpecProto(tensor_name=tensor)
    for dim, axis in cuts:
        sharded = spec.sharded_dim.add(axis=dim)
        sharded.simple_sharding.add(num_shards=layout.size(axis))
    for number, place in enumerate(product(*(range(layout.size(axis)) for _, axis in cuts)), start=1):
        at = {axis: index for (_, axis), index in zip(cuts, place, strict=True)}
        holders = [r for r in range(layout.world_size) if all(layout.index(a, r) == i for a, i in at.items())]
        if len(holders) == 1:
            spec.device.append(holders[0])
        else:
            spec.device.append(-number)
            spec.index_to_device_group_map.add(key=-number, value=holders)
    return spec


def parts_of(spec: ShardingSpecProto, sizes: list[int]) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """(device, its part) of a tensor of these sizes; a device that holds several parts comes several times."""
    groups = {entry.key: list(entry.value) for entry in spec.index_to_device_group_map}
    counts = [dim.simple_sharding[0].num_shards for dim in spec.sharded_dim]
    for device, place in zip(spec.device, product(*map(range, counts)), strict=True):
        part = [slice(0, size) for size in sizes]
        for dim, count, index in zip(spec.sharded_dim, counts, place, strict=True):
            width = sizes[dim.axis] // count
            part[dim.axis] = slice(index * width, (index + 1) * width)
        for holder in groups.get(device, [device]):
            yield holder, tuple(part)


def specs_of(model: ModelProto) -> Iterator[tuple[NodeProto, str, ShardingSpecProto]]:
    """(node, configuration that it names, spec) of every spec of a model."""
    for node in model.graph.node:
        for configuration in node.device_configurations:
            for spec in configuration.sharding_spec:
                yield node, configuration.configuration_id, spec


def check_shardings(model: ModelProto) -> list[tuple[str, str]]:
    """(where, what) of every spec that says what can't be; onnx.checker lets all of it pass."""
    found: list[tuple[str, str]] = []
    devices = {c.name: c.num_devices for c in model.configuration}
    sizes, said = _sizes(model), dict[str, tuple[str, bytes]]()
    for node, configuration, spec in specs_of(model):
        where = f"node {node.name}, {spec.tensor_name}"
        if configuration not in devices:
            found.append((where, f"configuration {configuration!r} is not in the model, which has {sorted(devices)}"))
        if spec.tensor_name not in (*node.input, *node.output):
            found.append((where, "the node neither takes nor makes this tensor"))
        found += [(where, what) for what in _wrong_dims(spec, sizes.get(spec.tensor_name))]
        found += [(where, what) for what in _wrong_devices(spec, devices.get(configuration, 0))]
        text = spec.SerializeToString(deterministic=True)
        first, before = said.setdefault(spec.tensor_name, (node.name, text))
        if before != text:
            found.append((where, f"node {first} says otherwise of the same tensor"))
    return found


def _wrong_dims(spec: ShardingSpecProto, sizes: list[int | str] | None) -> Iterator[str]:
    axes = [dim.axis for dim in spec.sharded_dim]
    if len(set(axes)) != len(axes):
        yield f"an axis is cut twice: {axes}"
    for dim in spec.sharded_dim:
        counts = [simple.num_shards for simple in dim.simple_sharding]
        if len(counts) != 1 or counts[0] < 1:
            yield f"axis {dim.axis} has parts {counts}"
        elif sizes is not None and not 0 <= dim.axis < len(sizes):
            yield f"axis {dim.axis} of a tensor of {len(sizes)} dims"
        elif sizes is not None and isinstance(size := sizes[dim.axis], int) and size % counts[0]:
            yield f"axis {dim.axis} of size {size} in {counts[0]} equal parts"


def _wrong_devices(spec: ShardingSpecProto, devices: int) -> Iterator[str]:
    parts = prod(sum(simple.num_shards for simple in dim.simple_sharding) for dim in spec.sharded_dim)
    if len(spec.device) != parts:
        yield f"{parts} parts on {len(spec.device)} devices"
    groups = {entry.key: list(entry.value) for entry in spec.index_to_device_group_map}
    for device in spec.device:
        if device < 0 and not groups.get(device):
            yield f"device {device} stands for a group that is not there"
    holders = [h for device in spec.device for h in (groups.get(device, []) if device < 0 else [device])]
    if beyond := sorted({h for h in holders if not 0 <= h < devices}):
        yield f"devices {beyond} of {devices}"
    elif missing := sorted(set(range(devices)) - set(holders)):
        yield f"devices {missing} have no part"


def _sizes(model: ModelProto) -> dict[str, list[int | str]]:
    """Sizes of every tensor that they are known of."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found: dict[str, list[int | str]] = {t.name: list(t.dims) for t in model.graph.initializer}
    infos: list[ValueInfoProto] = [*inferred.input, *inferred.output, *inferred.value_info]
    for info in infos:
        if info.type.tensor_type.HasField("shape"):
            found[info.name] = [d.dim_value or d.dim_param for d in info.type.tensor_type.shape.dim]
    return found
