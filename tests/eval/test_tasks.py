"""Documents and their questions: every answer stands once in what is given, where it is said to stand, and nothing is too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helix_compile.errors import HelixError
from helix_compile.eval.tasks import TASKS, make_documents
from helix_compile.eval.words import FILLERS, WORDS

RECALL = Path(__file__).resolve().parents[1] / "data" / "recall"


class Letters:
    """A tokenizer of characters, with a start token: every word is several tokens."""

    unk_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [1] * add_special_tokens + [ord(letter) for letter in text]
        return type("Encoding", (), {"input_ids": ids})

    def __len__(self) -> int:
        return 256


def test_words_are_told_apart() -> None:
    assert len({*WORDS, *FILLERS}) == len(WORDS) + len(FILLERS) == 512 + 64


@pytest.mark.parametrize("kind", ["words", "letters"])
@pytest.mark.parametrize("task", TASKS)
def test_every_answer_stands_where_it_is_said_to_stand(task: str, kind: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(RECALL) if kind == "words" else Letters()
    for context in (777, 4096):
        documents = make_documents(task, tokenizer, context, 23)
        assert sum(len(d.questions) for d in documents) == 23
        for document in documents:
            text = [*document.ids]
            assert text[:1] == [1] or kind == "words"
            reserved = max(len(q.told) + len(q.cue) + len(q.answer) for q in document.questions)
            assert len(text) + reserved <= context <= len(text) + 2 * reserved + 8
            for question in document.questions:
                fact = [*question.cue, *question.answer]
                whole = [*text, *question.told]
                places = [i for i in range(len(whole)) if whole[i : i + len(fact)] == fact]
                assert len(places) == 1
                cues = [i for i in range(len(whole)) if whole[i : i + len(question.cue)] == [*question.cue]]
                assert cues == places  # asked for by what stands nowhere else
                where = None if places[0] >= len(text) else places[0] / len(text)
                assert where == question.depth
    asked = {q.depth is None for d in documents for q in d.questions}
    assert asked == ({True, False} if task == "recall" else {False})


def test_documents_are_drawn_by_their_seed_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    assert make_documents("recall", tokenizer, 512, 9) == make_documents("recall", tokenizer, 512, 9)
    assert make_documents("recall", tokenizer, 512, 9) != make_documents("recall", tokenizer, 512, 9, seed=1)


def test_depths_are_spread_evenly() -> None:
    (document,) = make_documents("needle", AutoTokenizer.from_pretrained(RECALL), 4096, 40)
    tenths = [int(q.depth * 10) for q in document.questions if q.depth is not None]
    assert [tenths.count(t) for t in range(10)] == pytest.approx([4] * 10, abs=1)


def test_what_can_not_be_asked_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    with pytest.raises(HelixError, match="no task 'remember'; there are recall, needle, copy"):
        make_documents("remember", tokenizer, 512, 1)
    with pytest.raises(HelixError, match="context 63: copy needs 64 tokens"):
        make_documents("copy", tokenizer, 63, 1)
    bare = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    bare.pre_tokenizer = Whitespace()
    with pytest.raises(HelixError, match="does not know the word 'baba'"):
        make_documents("copy", PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>"), 512, 1)
