"""What capture refuses before it starts, and how an error of torch.export or of the model is told: once, in one line."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from helix_compile.errors import CaptureError, HelixError, MatchError

_MODULE: Any = torch.nn.modules.module
_BRANCH = "the model branches on data; a graph holds one branch only"
_SIZES = {
    r"L\['(hidden|input_ids)'\]\.size\(\)\[0\]": "B",
    r"L\['(hidden|input_ids)'\]\.size\(\)\[1\]": "T",
    r"L\['pasts'\]\[\d+\]\.size\(\)\[2\]": "S",
}
_GROUPED = (
    "torch's grouped products of experts take rows of multiples of 16 bytes, and the model itself ends so on real weights: "
    "another width of the experts, or model.set_experts_implementation('batched_mm')"
)
_HINTS = {"GuardOnDataDependentSymNode": _BRANCH, "DataDependentOutputException": _BRANCH}


def check_surroundings() -> None:
    """Modes that would be captured into the graphs, or into the tensors that a module keeps.

    Raises:
        CaptureError: inference mode or autocast is on, or new tensors would be on meta.
    """
    if torch.get_default_device().type == "meta":
        raise CaptureError(
            'capture: called inside torch.device("meta"), where nothing that is looked at has a value; compile outside of it '
            "(the model itself may be on meta)"
        )
    if torch.is_inference_mode_enabled():
        raise CaptureError(
            "capture: called inside torch.inference_mode(), whose tensors can't be exported; "
            "compile outside of it (torch.no_grad() is fine)"
        )
    if device := autocast_device():
        raise CaptureError(
            f'capture: called inside torch.autocast("{device}"), whose casts would stay in the graphs; '
            "compile outside of it and pass dtype=..."
        )


def autocast_device() -> str | None:
    """Where torch.autocast is on, if it is."""
    return next((device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)), None)


def check_model(model: nn.Module) -> None:
    """A plain module, all of it in eval mode.

    Raises:
        CaptureError: wrapped by torch.compile, or a module in training mode, which is named.
        MatchError: a quantised layer with packed weights.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise CaptureError(f"capture: {name} was made by torch.compile; pass the original module (`._orig_mod`)")
    if model.training:
        raise CaptureError(f"capture: {name} is in training mode; call model.eval() first")
    if hooks := global_hooks():
        raise CaptureError(
            f"capture: {hooks} hook(s) for every module are registered (register_module_forward_hook): a layer would be "
            "given them twice; remove them, or put hooks on modules"
        )
    for part, module in model.named_modules():
        own = [f for f in ("__call__", "_call_impl") if _is_users(type(module), f)]
        if own:
            raise CaptureError(
                f"capture: {name}: `{part or 'the model'}` ({type(module).__name__}) has a {own[0]} of its own, around its forward; "
                "what it does belongs into forward, or into a hook"
            )
        # a list that was made anew (layers[:2]) says training, but computes nothing
        if module.training and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise CaptureError(f"capture: {name}: `{part}` is in training mode; call model.eval() first")
        # of torch.ao's quantised layers: it is no tensor that export could see
        if hasattr(module, "_packed_params"):
            raise MatchError(
                f"{name}: `{part}` is a quantised linear ({type(module).__name__}) whose weight is packed, not a tensor: "
                "it can't be captured or cut; pass the model as it was before quantisation"
            )


def _is_users(kind: type[nn.Module], name: str) -> bool:
    """A method that neither torch nor transformers defined (whose checkpointing layers only act in training)."""
    definer = next(c for c in kind.__mro__ if name in vars(c))
    return definer.__module__.partition(".")[0] not in ("torch", "transformers")


def global_hooks() -> int:
    """How many hooks torch calls for every module."""
    return len(_MODULE._global_forward_hooks) + len(_MODULE._global_forward_pre_hooks)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Any error while this is open is a CaptureError of one line; torch's pages stay in its __context__."""
    try:
        yield
    except HelixError:
        raise
    except Exception as error:  # the model's forward may raise anything
        kind = type(error).__name__
        first = next(iter(str(error).strip().splitlines()), "")
        hint = f" ({_HINTS[kind]})" if kind in _HINTS else ""
        hint = f" ({_GROUPED})" if "to be multiple of 16 bytes" in first else hint
        if first.startswith("Constraints violated"):
            first, hint = "it holds for some sizes only", f" ({_constraints(str(error))})"
        raise CaptureError(f"capture: {what}: {kind}: {first}{hint}") from None


def _constraints(text: str) -> str:
    """What torch.export found out about sizes, in the letters of this project."""
    found = re.findall(r"generated guard (.+)|must always be related to .+ by (.+)\.", text)
    for name, letter in _SIZES.items():
        found = [(re.sub(name, letter, a), b) for a, b in found]
    said = dict.fromkeys(re.sub(r"\btokens\b", "T", re.sub(r"\bpast\b", "S", a or b)) for a, b in found)
    return (
        f"{'; '.join(said)}: the forward branches on a size, or computes with it as a number; a graph holds one answer"
    )


_LOGGERS = ("torch._subclasses.fake_tensor", "torch.export")


@contextmanager
def raised_not_logged() -> Iterator[None]:
    """Drop records with a traceback from torch's fake tensors and torch.export, in this thread, while this is open.

    torch logs each error that it also raises, once for every caller on the way. Whoever set TORCH_LOGS, or made the loggers talk, sees it all.
    """
    thread = threading.get_ident()
    quiet = [] if os.environ.get("TORCH_LOGS") else [logging.getLogger(n) for n in _LOGGERS]
    quiet = [logger for logger in quiet if not logger.isEnabledFor(logging.INFO)]

    def kept(record: logging.LogRecord) -> bool:
        return record.exc_info is None or record.thread != thread

    for logger in quiet:
        logger.addFilter(kept)
    try:
        yield
    finally:
        for logger in quiet:
            logger.removeFilter(kept)
