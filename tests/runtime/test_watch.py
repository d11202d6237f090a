"""A model that is edited after it was compiled: a step computes what the model computes now, or says what changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helix_compile import RuntimeFault, helix_compile, verify
from helix_compile.runtime.watch import ModelWatch
from tests.support.driver import prompt_deviation as deviation
from tests.support.driver import random_ids
from tests.support.families import fresh_family

LIMIT = 1e-10


def padded() -> Any:
    """FFN width 58 over four ranks is padded, W_UK is gathered: both are copies on the ranks."""
    return fresh_family("youtu", num_hidden_layers=1)


def projections(model: Any) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n.endswith("proj.weight")]


def in_place(model: Any) -> None:
    with torch.no_grad():
        for p in projections(model):
            p.mul_(1.5)


def through_data(model: Any) -> None:
    """What merging a LoRA does; torch's version counter does not see it."""
    for p in projections(model):
        p.data += 0.1 * torch.randn_like(p)


def one_element(model: Any) -> None:
    projections(model)[-1].data[3, 5] += 1.0


def set_data_back(model: Any) -> None:
    for p in projections(model):
        p.data = p.data.mul_(0.5)


def state_dict(model: Any) -> None:
    model.load_state_dict({k: v * 0.5 if k.endswith("proj.weight") else v for k, v in model.state_dict().items()})


def by_numpy(model: Any) -> None:
    for p in projections(model):
        p.detach().numpy()[...] *= 0.7


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "edit",
    [
        in_place,
        through_data,
        *(pytest.param(e, marks=SLOW) for e in (one_element, set_data_back, state_dict, by_numpy)),
    ],
)
def test_an_edit_in_place_is_followed(edit: Callable[[Any], None]) -> None:
    model = padded()
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_seq_len=64)
    before = deviation(model, compiled)
    edit(model)
    assert before <= LIMIT and deviation(model, compiled) <= LIMIT
    assert verify(compiled, model).ok


def half(model: Any) -> None:
    model.half()


def assigned(model: Any) -> None:
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)


def new_parameter(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(projections(model)[-1].detach() * 2)


def new_module(model: Any) -> None:
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = nn.Linear(
        old.in_features, old.out_features, bias=False, dtype=old.weight.dtype
    )


def new_storage(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight.data = projections(model)[-1].detach().clone() * 2


def turned(model: Any) -> None:
    """The same memory read by columns: neither object, place nor version tell."""
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.as_strided(weight.shape, (1, weight.shape[0]))


@pytest.mark.parametrize(
    "edit", [half, new_module, *(pytest.param(e, marks=SLOW) for e in (assigned, new_parameter, new_storage, turned))]
)
def test_what_was_replaced_is_named(edit: Callable[[Any], None]) -> None:
    model = padded()
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_seq_len=64)
    ids = random_ids(model, 2, 9)
    compiled(ids)
    edit(model)
    with pytest.raises(RuntimeFault, match=r"the model changed since compile: .*(down_proj|embed_tokens).* replaced"):
        compiled(ids[:, :1])
    assert compiled.lengths.tolist() == [9, 9]


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.clone(),
        lambda w: w.t(),
        lambda w: w[:4],
        lambda w: w.view(torch.float16),
        lambda w: w.flatten(),
        lambda w: w[1:].as_strided((5, 5), (3, 1)),
    ],
    ids=["other memory", "turned", "shortened", "other numbers of the same bits", "other dims", "from another place"],
)
def test_what_data_was_set_to_is_seen(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The object, its version and, but for the first and the last, its address stay."""
    model = nn.Linear(5, 5, bias=False, dtype=torch.bfloat16)
    watch = ModelWatch.of(model, {})
    model.weight.data = model.weight.data
    assert watch.edited() == []
    model.weight.data = view(model.weight.data)
    with pytest.raises(RuntimeFault, match=r"weight was replaced \(another dtype, device or layout"):
        watch.edited()


def test_a_copy_in_another_dtype_can_not_follow() -> None:
    model = padded()
    compiled = helix_compile(model, cp=4, dtype=torch.float32, max_seq_len=64)
    in_place(model)
    with pytest.raises(RuntimeFault, match="edited in place, and the ranks hold copies"):
        compiled(random_ids(model, 1, 3))


def test_what_the_user_gave_a_rank_stays() -> None:
    model = padded()
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_seq_len=64)
    name = next(n for n in compiled.ranks[0].params if n.endswith("gate_proj.weight"))
    mine: Tensor = torch.zeros_like(compiled.ranks[0].params[name])
    compiled.ranks[0].params[name] = mine
    in_place(model)
    compiled(random_ids(model, 1, 3))
    assert compiled.ranks[0].params[name] is mine and not mine.any()


def test_a_copy_that_was_edited_itself_is_not_overwritten() -> None:
    model = padded()
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_seq_len=64)
    name = next(n for n in compiled.ranks[3].params if n.endswith("gate_proj.weight"))
    with torch.no_grad():
        compiled.ranks[3].params[name].add_(1.0)
    compiled(random_ids(model, 1, 3))
    in_place(model)
    with pytest.raises(RuntimeFault, match=r"gate_proj.*a copy that was edited itself"):
        compiled(random_ids(model, 1, 1))


def test_verify_says_first_that_the_model_runs_other_code() -> None:
    model = padded()
    compiled = helix_compile(model, cp=2, max_seq_len=64)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * 3)
    with pytest.raises(RuntimeFault, match=r"changed since compile: model\.layers\.0\.mlp was given other hooks"):
        verify(compiled, model)
    handle.remove()
    model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(RuntimeFault, match=r"changed since compile: model\.layers\.0\.mlp was given"):
        verify(compiled, model)


def observing_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * 3)


def pre_hook(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, given: (given[0] * 2,))


def own_forward(model: Any) -> None:
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize("edit", [observing_hook, pre_hook, own_forward])
def test_another_way_to_call_a_module_is_named(edit: Callable[[Any], None]) -> None:
    model = padded()
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_seq_len=64)
    edit(model)
    with pytest.raises(RuntimeFault, match=r"the model changed since compile: .* given other hooks, functions"):
        compiled(random_ids(model, 1, 3))


def through_data_in_another_dtype(model: Any) -> None:
    projections(model)[-1].data += 1.0


def item_of_a_list(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.held[0].add_(1.0)


class Scaled(nn.Module):
    """An FFN with a factor in a list."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.held = inner, [torch.full((1,), 1.5, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.held[0].to(x.dtype)


def with_a_list() -> Any:
    model = padded()
    model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp).eval()
    return model


@pytest.mark.fresh_capture
@pytest.mark.parametrize("edit", [through_data_in_another_dtype, item_of_a_list])
def test_a_converted_copy_is_told_of_every_edit(edit: Callable[[Any], None]) -> None:
    model = with_a_list()
    compiled = helix_compile(model, cp=2, dtype=torch.float32, max_seq_len=64, max_batch_size=2)
    compiled(torch.ones(1, 2, dtype=torch.int64))
    edit(model)
    with pytest.raises(RuntimeFault, match="edited in place, and the ranks hold copies"):
        compiled(torch.ones(1, 1, dtype=torch.int64))


def replaced_in_a_list(model: Any) -> None:
    model.model.layers[0].mlp.held[0] = torch.ones(1, dtype=torch.float64)


def one_more_module(model: Any) -> None:
    model.model.layers[0].mlp.adapter = nn.Identity()


@pytest.mark.fresh_capture
@pytest.mark.parametrize(
    ("edit", "said"),
    [(replaced_in_a_list, r"mlp\.held was replaced"), (one_more_module, "given or lost a module, parameter or buffer")],
)
def test_what_is_put_into_a_module_is_named(edit: Callable[[Any], None], said: str) -> None:
    model = with_a_list()
    compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=2)
    edit(model)
    with pytest.raises(RuntimeFault, match=said):
        compiled(torch.ones(1, 1, dtype=torch.int64))


def test_a_hook_for_every_module_is_seen_at_a_step() -> None:
    compiled = helix_compile(padded(), cp=2, max_seq_len=64, max_batch_size=2)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(RuntimeFault, match="for every module were registered since compile"):
            compiled(torch.ones(1, 1, dtype=torch.int64))
    finally:
        handle.remove()


def test_save_and_verify_follow_an_edit(tmp_path: Any) -> None:
    model = padded()
    compiled = helix_compile(model, cp=4, max_seq_len=64, max_batch_size=2)
    in_place(model)
    compiled.save(tmp_path / "saved")
    loaded = type(compiled).load(tmp_path / "saved")
    assert deviation(model, loaded) <= LIMIT
    in_place(model)
    assert verify(compiled, model).ok
