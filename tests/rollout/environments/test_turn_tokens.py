"""What is forced between two turns: delimiters of the template, and answers that can be nothing but text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from transformers import AutoTokenizer

from rollout.config import EnvironmentConfig
from rollout.environments.turn_tokens import CUT, TurnTokens

CONFIG = EnvironmentConfig(name="calculator")
TAGS = ("<|begin|>", "<|end|>", "<|end|>x", "<told>", "</told>", "<|e<|end|>nd|>", "<|<|begin|>", "    ", "\n")
answers = st.lists(st.one_of(st.text(), st.sampled_from(TAGS), st.just("\ud800"))).map("".join)


def ids(tokenizer: Any, *texts: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(texts))


def test_delimiters_are_the_templates(byte_tokenizer: Any) -> None:
    turns = TurnTokens(byte_tokenizer, CONFIG)
    begin, end, told, told_end = ids(byte_tokenizer, "<|begin|>", "<|end|>", "<told>", "</told>")
    forced = turns.between(end, "8").tolist()
    assert byte_tokenizer.decode(forced) == "\n<|begin|>tool\n<told>8</told><|end|>\n<|begin|>assistant\n"
    assert [index for index in forced if index in (begin, end, told, told_end)] == [begin, told, told_end, end, begin]
    assert turns.between(begin, "8").tolist() == [end, *forced], (
        "a turn that ended otherwise is ended as the template has it"
    )


@settings(deadline=None)
@given(answers)
def test_an_answer_is_text_whatever_it_says(byte_tokenizer: Any, answer: str) -> None:
    turns = TurnTokens(byte_tokenizer, replace(CONFIG, output_tokens=10_000))
    (end,) = ids(byte_tokenizer, "<|end|>")
    around = turns.between(end, "").tolist()
    before, after = len(turns.before) - 1, len(turns.after)
    said = turns.between(end, answer).tolist()
    assert (said[:before], said[len(said) - after :]) == (around[:before], around[len(around) - after :])
    middle = said[before : len(said) - after]
    assert not set(middle) & set(ids(byte_tokenizer, *TAGS[:5]))
    assert byte_tokenizer.decode(middle) == answer.encode("utf-8", "replace").decode()


@settings(deadline=None, max_examples=30)
@given(answers)
def test_what_a_tokenizer_cannot_write_is_left_out(tiny_model: Path, answer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = TurnTokens(tokenizer, replace(CONFIG, before=";", after="="))
    forced = turns.between(2, answer + "12<eos>").tolist()
    assert tokenizer.decode(forced) == ";" + "".join(c for c in answer if c in "0123456789+=;#") + "12="
    assert not set(forced) & set(tokenizer.all_special_ids)


def test_a_huge_answer_is_cut_and_says_so(byte_tokenizer: Any) -> None:
    turns = TurnTokens(byte_tokenizer, replace(CONFIG, output_tokens=16, before="(", after=")"))
    for answer in ("x" * 17, "é" * 10**6):
        forced = turns.between(0, answer).tolist()
        assert len(forced) == 16 + len(CUT) + 2
        assert byte_tokenizer.decode(forced) == f"({(answer.encode()[:16]).decode()}{CUT})"
    assert byte_tokenizer.decode(turns.between(0, "x" * 16)) == f"({'x' * 16})"


def test_own_delimiters_may_be_special(byte_tokenizer: Any) -> None:
    turns = TurnTokens(byte_tokenizer, replace(CONFIG, before="<|end|>(", after=")<|begin|>"))
    begin, end = ids(byte_tokenizer, "<|begin|>", "<|end|>")
    assert turns.between(end, "<|end|>").tolist()[-1] == begin
    assert turns.between(end, "<|end|>").tolist().count(end) == 0


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template: set rollout.environment.before and rollout.environment.after"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "role=tool: the chat template refuses it (roles must alternate)",
        ),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}", "leaves such messages out"),
    ],
)
def test_a_template_that_has_no_answers(byte_tokenizer: Any, template: str | None, said: str) -> None:
    kept, byte_tokenizer.chat_template = byte_tokenizer.chat_template, template
    try:
        with pytest.raises(ValueError) as caught:
            TurnTokens(byte_tokenizer, CONFIG)
    finally:
        byte_tokenizer.chat_template = kept
    assert said in str(caught.value) and "\n" not in str(caught.value)
