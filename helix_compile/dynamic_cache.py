"""Read a transformers DynamicCache of an unmodified model: of MLA latents are its keys, roped keys its values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from helix_compile.errors import RuntimeFault


def parts_of_dynamic_cache(
    cache: DynamicCache, heads: Sequence[int] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """([B, S, R] latents, [B, S, r] roped keys), one of each a layer; columns include the sender's padding.

    `heads` are the KV heads of each cached attention (none given: latents); where that is not 0, K and V of all heads
    side by side, [B, S, K Dk] and [B, S, K Dv].

    Raises:
        RuntimeFault: a layer of another kind (sliding, quantised, static), an empty one, or one that holds full heads.
    """
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    if not cache.layers:
        raise RuntimeFault("import_cache: the DynamicCache is empty; expected a prefilled one")
    for i, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise RuntimeFault(
                f"import_cache: layer {i} of the cache is a {type(layer).__name__}, expected a DynamicLayer: other kinds "
                "keep other columns than all tokens; give latents and k_ropes as tensors"
            )
        if layer.keys is None or layer.values is None:
            raise RuntimeFault(f"import_cache: layer {i} of the DynamicCache is empty; expected a prefilled one")  # fmt: skip
        for part, tensor in zip(parts, (layer.keys, layer.values), strict=True):
            K = heads[i] if i < len(heads) else 0
            if tensor.dim() != 4 or tensor.shape[1] != (K or 1):
                what = f"{K} KV heads" if K else "one latent and one roped key for all heads"
                raise RuntimeFault(
                    f"import_cache: layer {i} of the DynamicCache holds {tuple(tensor.shape)}, expected "
                    f"[B, {K or 1}, S, width]: {what}"
                )
            part.append(tensor.transpose(1, 2).flatten(2) if K else tensor.squeeze(1))
    return parts
