"""A cache layer of a kind that a model brings along: refused by its name and what is asked of it, not by an accident."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV4ForCausalLM, GptOssConfig

from helix_compile.capture.layers import ConcatenatingCache
from helix_compile.errors import MatchError


def test_compressed_keys_are_refused_by_name() -> None:
    cache = ConcatenatingCache(DeepseekV4ForCausalLM.config_class(), None, torch.zeros(1, 1, 5, 1))
    with pytest.raises(MatchError, match=r"layer 0: its cache is a DeepseekV4\w+Cache, which keeps more than K and V"):
        cache.layers[0].store_compression_weights("compressor", None, None)


def test_a_window_is_a_layer_of_all_tokens() -> None:
    cache = ConcatenatingCache(GptOssConfig(num_hidden_layers=2), None, torch.zeros(1, 1, 5, 1))
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5]
    assert not hasattr(cache.layers[0], "cumulative_length")
