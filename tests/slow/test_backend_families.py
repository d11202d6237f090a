"""Every family by the other front door: torch.compile gives what helix_compile gives, bit by bit, and the model's tokens."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._dynamo.exc import UserError
from transformers import DynamicCache

from helix_compile import helix_compile
from tests.support.driver import deviation, left_padded, random_ids
from tests.support.families import FAMILIES, fresh_family, tiny_family

pytestmark = pytest.mark.slow
OPTIONS = {"cp": 2, "tokens_per_block": 2, "max_seq_len": 64, "max_batch_size": 3}
# norms, router and linear attention compute in float32 on both sides (Dynamo can't run under a mode that widens them);
# helix_compile itself is held to 1e-10 with those widened, by tests/whole/test_every_family.py
ISLANDS = 5e-6


LOOPS = ("longcat_flash",)  # over the experts that were hit, in Python


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.refused and n not in LOOPS])
def test_torch_compile_is_helix_compile(name: str) -> None:
    torch._dynamo.reset()
    model, mask = tiny_family(name), left_padded([5, 2, 9])
    if (
        model.config._attn_implementation == "eager"
    ):  # its softmax is in float32, where float64's mask is -inf: NaN at padding
        model = copy.deepcopy(model).float()
    compiled = torch.compile(model, backend="helix", fullgraph=True, options={**OPTIONS, **FAMILIES[name].options})
    other = helix_compile(model, **OPTIONS, **FAMILIES[name].options)
    mine, reference = DynamicCache(config=model.config), DynamicCache(config=model.config)
    torch.manual_seed(1)
    ids, whole = random_ids(model, *mask.shape), mask
    with torch.no_grad():
        for tokens in (1, 3, 1, 1, 3, 1):
            places = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            call = {"input_ids": ids, "attention_mask": whole, "position_ids": places}
            got = compiled(**call, past_key_values=mine).logits
            expected = model(**call, past_key_values=reference).logits
            real = mask.bool()
            assert torch.equal(got[real], other(ids, mask)[real])
            assert deviation(got, expected, mask) <= ISLANDS
            last = expected[:, -1].argmax(-1)
            assert torch.equal(got[:, -1].argmax(-1), last)
            mask = torch.ones(3, tokens, dtype=torch.int64)
            ids = last[:, None] if tokens == 1 else random_ids(model, 3, tokens)
            whole = torch.cat([whole, mask], dim=1)


@pytest.mark.parametrize("name", LOOPS)
def test_what_dynamo_itself_can_not_trace(name: str) -> None:
    """fullgraph=True of any backend: helix_compile() makes a leaf of such experts."""
    torch._dynamo.reset()
    model = tiny_family(name)
    compiled = torch.compile(model, backend="helix", fullgraph=True, options=dict(OPTIONS))
    with torch.no_grad(), pytest.raises(UserError, match="data-dependent"):
        compiled(input_ids=random_ids(model, 3, 5))


def in_float64_throughout(name: str) -> ModuleType:
    """Source of a family in transformers with its float32 islands widened: what Dynamo traces, no mode is needed around it."""
    own = import_module(f"transformers.models.{name}.modeling_{name}")
    path = Path(str(own.__file__))
    text = path.read_text(encoding="utf-8")
    wide = text.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    assert wide != text
    module = ModuleType(own.__name__)
    module.__package__, module.__file__ = own.__package__, own.__file__
    sys.modules[own.__name__] = module  # decorators look their class's module up
    exec(compile(wide, str(path), "exec"), vars(module))
    return module


@pytest.mark.parametrize(("name", "cp"), [("deepseek_v32", 4), ("glm_moe_dsa", 3)])
def test_sparse_attention_by_torch_compile_without_islands(name: str, cp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts below, at and above k = 7, to the bound of float64, against the model in Python."""
    torch._dynamo.reset()
    source = f"transformers.models.{name}.modeling_{name}"
    monkeypatch.setitem(sys.modules, source, import_module(source))  # put back afterwards
    in_float64_throughout(name)
    model, mask = fresh_family(name, index_topk=7), left_padded([7, 2, 19])
    compiled = torch.compile(model, backend="helix", fullgraph=True, options={**OPTIONS, "cp": cp})
    mine, reference = DynamicCache(config=model.config), DynamicCache(config=model.config)
    torch.manual_seed(1)
    ids, whole = random_ids(model, *mask.shape), mask
    with torch.no_grad():
        for tokens in (1, 3, 1):
            places = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            call = {"input_ids": ids, "attention_mask": whole, "position_ids": places}
            got = compiled(**call, past_key_values=mine).logits
            assert deviation(got, model(**call, past_key_values=reference).logits, mask) <= 1e-10
            mask = torch.ones(3, tokens, dtype=torch.int64)
            ids = random_ids(model, 3, tokens)
            whole = torch.cat([whole, mask], dim=1)
