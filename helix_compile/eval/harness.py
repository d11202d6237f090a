"""lm-evaluation-harness over a compiled module: `--model helix`.

python -m helix_compile.eval.harness run --model helix --model_args path=FOLDER,cp=4 --tasks ...

This is the harness's own command line, which looks for no plugins (0.4.13): this module registers `helix` with it first. In Python
importing this module is enough: lm_eval.simple_evaluate(model="helix", model_args={"path": FOLDER, "cp": 4}, tasks=[...]).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from helix_compile.capture.source import load_folder
from helix_compile.compile import helix_compile
from helix_compile.config.options import HelixOptions
from helix_compile.errors import HelixError
from helix_compile.eval.decoders import Decoder, HelixDecoder, ModelDecoder
from helix_compile.eval.folder import dtype_asked, load_tokenizer

_MAX_GEN_TOKENS = 256  # the harness's own default where a task says nothing


class DecoderLM(TemplateLM):
    """A decoder as a model of the harness; one sequence at a time, greedily.

    Args:
        decoder: holds max_length tokens.
        tokenizer: of transformers.
        max_length: tokens of a prompt and its continuation; longer prompts lose their beginning, as the harness has it.
        name: for the harness's caches.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any, max_length: int, name: str):
        super().__init__()
        self.decoder, self.tokenizer, self.max_length, self._name = decoder, tokenizer, max_length, name

    @property
    def eot_token_id(self) -> int:
        """What a text begins with where it begins with nothing; the tokenizer's end, start or first token."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def prefix_token_id(self) -> int:
        """The start token, where there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names the folder in caches of requests."""
        return self._name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless said otherwise."""
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special).input_ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for key, context, continuation in tqdm(requests, desc="loglikelihood", disable=disable_tqdm):
            answer = self._loglikelihood(context, continuation)
            found.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """(sum of the continuation's log-probabilities, is each its token's most likely), from the last max_length tokens."""
        ids = (context + continuation)[-(self.max_length + 1) :][:-1]
        keep = len(continuation)
        if keep > len(ids):
            raise HelixError(f"a continuation of {keep} tokens: max_seq_len {self.max_length} does not hold it")
        # the prompt is prefilled; what is scored is stepped, so that both kinds of a step count
        first = len(ids) - keep + 1
        self.decoder.begin(ids[: first - 1])
        logits = self.decoder.step(ids[first - 1 :], keep=keep).double()
        wanted = torch.tensor(continuation)
        chosen = logits.log_softmax(-1).gather(-1, wanted[:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of max_length tokens."""
        found = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = sum(self._loglikelihood(*make_disjoint_window(window))[0] for window in windows)
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop text, the end token or max_gen_toks.

        Raises:
            HelixError: a task that samples.
        """
        found = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, asked = request.args
            text = self._generate(context, dict(asked))
            found.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _generate(self, context: str, asked: dict[str, Any]) -> str:
        if asked.get("do_sample") and asked.get("temperature", 1.0) != 0:
            raise HelixError("a task that samples (do_sample): --model helix decodes greedily; set do_sample: false")
        until = asked.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        count = int(asked.get("max_gen_toks", _MAX_GEN_TOKENS))
        if count >= self.max_length:
            raise HelixError(f"max_gen_toks {count}: max_seq_len {self.max_length} does not hold a prompt beside them")
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - count) :]
        self.decoder.begin(ids[:-1])
        new, last, text = list[int](), ids[-1], ""
        while len(new) < count:
            last = int(self.decoder.step([last])[-1].argmax())
            if last == self.tokenizer.eos_token_id:
                break
            new.append(last)
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            if at := [text.index(stop) for stop in stops if stop and stop in text]:
                return str(text[: min(at)])
        return str(text)


@register_model("helix")
class HelixLM(DecoderLM):
    """A checkpoint folder, compiled: what `--model helix --model_args path=FOLDER,cp=4` makes.

    Args:
        path: the folder, with a tokenizer.
        model: "helix"; "original": the unmodified model through the same code, to compare with.
        dtype: default: the folder's.
        max_seq_len: see DecoderLM.
        device, batch_size, max_batch_size: what the harness says; of batches only 1.
        options: fields of HelixOptions, such as cp=4.

    Raises:
        HelixError: what does not fit.
    """

    def __init__(
        self,
        path: str | Path,
        model: str = "helix",
        dtype: str | None = None,
        max_seq_len: int = 4096,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        if str(batch_size) not in ("1", "auto") or max_batch_size not in (None, 1):
            raise HelixError(f"batch_size {batch_size}: --model helix takes one sequence at a time; leave it, or say 1")
        if unknown := sorted(set(options) - {field.name for field in fields(HelixOptions)}):
            raise HelixError(
                f"--model_args: no option {', '.join(unknown)}; there are those of helix_compile(), and path, model, dtype"
            )
        if model not in ("helix", "original"):
            raise HelixError(f"--model_args: model={model}, expected helix | original")
        if model == "original" and options:
            raise HelixError(f"--model_args: {', '.join(sorted(options))} can have no effect on model=original")
        folder, chosen = Path(path), dtype_asked(dtype)
        tokenizer = load_tokenizer(folder)
        decoder: Decoder
        if model == "helix":
            asked = HelixOptions(**options, max_batch_size=1, max_seq_len=max_seq_len)
            # of a folder each rank reads its slices
            decoder = HelixDecoder(helix_compile(folder, options=asked, dtype=chosen, device=device))
        else:
            decoder = ModelDecoder(load_folder(folder, chosen)[0].to(device or "cpu"))
        super().__init__(decoder, tokenizer, max_seq_len, str(path))


def main() -> None:
    """The harness's command line, with `helix` among its models; under torchrun the first process prints and writes."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = on_device(sys.argv, "cuda" if torch.cuda.is_available() else "cpu")
    if os.environ.get("RANK", "0") == "0":
        cli_evaluate()
        return
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        sys.argv = written_to(sys.argv, folder)
        cli_evaluate()


def on_device(arguments: list[str], device: str) -> list[str]:
    """The same command line with a --device where it says none: the harness's own, cuda:0, is there or not, and one process's at most."""
    at = 2 if arguments[1:2] == ["run"] else 1
    if not arguments[at : at + 1] or not arguments[at].startswith("-") or arguments[at] in ("-h", "--help"):
        return arguments
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--config", "-C", type=Path)
    path = named.parse_known_args(arguments[at:])[0].config
    if path is not None and path.is_file() and "device" in (yaml.safe_load(path.read_text()) or {}):
        return arguments
    # in front: of two the harness takes the last
    return [*arguments[:at], "--device", device, *arguments[at:]]


def written_to(arguments: list[str], folder: str) -> list[str]:
    """The same command line with its --output_path, where it has one, elsewhere."""
    names = ("--output_path", "-o")
    moved = [f"{name}={folder}" if arg.startswith(f"{name}=") else arg for arg in arguments for name in names[:1]]
    return [folder if before in names else arg for before, arg in zip(["", *moved], moved, strict=False)]


if __name__ == "__main__":
    main()
