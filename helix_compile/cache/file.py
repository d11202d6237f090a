"""A cache in a safetensors file: written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from helix_compile.cache.rows import of_scale, scale_of
from helix_compile.cache.shards import CacheEntries
from helix_compile.errors import RuntimeFault

FORMAT = "helix_compile.cache.1"


def write_cache(path: str | Path, entries: CacheEntries) -> None:
    """Write latents.N, k_ropes.N and lengths; an error leaves no file and an older one as it was.

    Raises:
        RuntimeFault: entries that are no cache, a path that is not a file of its own, or a disk that refuses.
    """
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        raise RuntimeFault(
            f"{path}: is a link, a folder or a device; expected a new path or a regular file, which is replaced"
        )
    entries = CacheEntries(*entries)
    tensors: dict[str, Tensor] = {"lengths": torch.as_tensor(entries.lengths, dtype=torch.int64)}
    seen: set[int] = set()
    for name, parts in (("latents", entries.latents), ("k_ropes", entries.k_ropes)):
        for site, part in enumerate(parts):
            part = part.contiguous()
            storage = part.untyped_storage().data_ptr()
            tensors[f"{name}.{site}"] = part.clone() if storage in seen else part  # safetensors refuses shared memory
            seen.add(storage)
    unfinished = Path(f"{path}.unfinished-{os.getpid()}")
    try:
        metadata = {"format": FORMAT, "sites": str(len(entries.latents))}
        if any(scales := [scale_of(part) for part in entries.latents]):
            metadata["cache_scales"] = json.dumps(scales)
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise RuntimeFault(f"{path}: can't write the cache: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_cache(path: str | Path, device: str | torch.device = "cpu") -> CacheEntries:
    """Read what write_cache() wrote.

    Raises:
        RuntimeFault: no such file, one that is cut off or corrupt, or not a cache.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            facts, names = file.metadata() or {}, set(file.keys())
            sites = _sites(path, facts, names)
            parts = [[file.get_tensor(f"{name}.{site}") for site in range(sites)] for name in ("latents", "k_ropes")]
            scales = _scales(path, facts, sites)
            marked = [[of_scale(*of) for of in zip(part, scales, strict=True)] for part in parts]
            return CacheEntries(marked[0], marked[1], file.get_tensor("lengths").cpu())
    except (OSError, SafetensorError) as error:
        raise RuntimeFault(
            f"{path}: can't read this cache: {error}; is it written to its end, by write_cache()?"
        ) from error


def _scales(path: str | Path, facts: dict[str, str], sites: int) -> list[float | None]:
    """What FP8 values of each attention are multiplied by, where the file says it."""
    text = facts.get("cache_scales", "[]")
    try:
        scales = json.loads(text) or [None] * sites
    except ValueError:
        scales = None
    if not isinstance(scales, list) or len(scales) != sites or not all(type(s) in (float, type(None)) for s in scales):
        raise RuntimeFault(
            f"{path}: cache_scales {text!r}, expected a list of {sites} numbers: not a file of write_cache()"
        )
    return scales


def _sites(path: str | Path, facts: dict[str, str], names: set[str]) -> int:
    """Cached attentions of the file, whose names must be exactly theirs."""
    if facts.get("format") != FORMAT or not facts.get("sites", "").isdecimal():
        raise RuntimeFault(f"{path}: format {facts.get('format')!r}, expected {FORMAT!r}: not a file of write_cache()")
    sites = int(facts["sites"])
    expected = {"lengths"}
    # names are compared before they are counted out: the figure may be anything
    if len(names) == 2 * sites + 1:
        expected |= {f"{name}.{site}" for name in ("latents", "k_ropes") for site in range(sites)}
    if names != expected:
        raise RuntimeFault(
            f"{path}: says {sites} attentions and holds {len(names)} tensors; expected latents.N and k_ropes.N for each, "
            "and lengths"
        )
    return sites
