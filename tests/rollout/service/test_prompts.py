from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rollout.service.errors import ServiceError
from rollout.service.prompts import PromptReader
from rollout.service.protocol import Prompt

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ message.content }};{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def read(tokenizer: Any, *prompts: Prompt) -> Any:
    return PromptReader(tokenizer, vocab_size=32, context_tokens=20).read(list(prompts))


def test_three_ways_to_say_the_same(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "3+5"}]
    ids = (6, 13, 8, 15, 14)
    prompts = [Prompt(text="3+5;="), Prompt(messages=messages), Prompt(token_ids=list(ids), problem={"answer": "8"})]
    found = read(tokenizer, *prompts)
    assert [each.token_ids for each in found] == [ids] * 3
    assert [each.text for each in found] == ["3+5;="] * 3
    assert [each.problem for each in found] == [{}, {}, {"answer": "8"}]


def test_the_first_that_is_wrong_is_named(tokenizer: Any) -> None:
    with pytest.raises(ServiceError, match=r"prompts\[1\]: expected one of text, messages and token_ids") as caught:
        read(tokenizer, Prompt(text="1"), Prompt(), Prompt())
    assert (caught.value.status, caught.value.fields.param) == (400, "prompts[1]")


def test_a_completion_needs_room(tokenizer: Any) -> None:
    assert len(read(tokenizer, Prompt(text="1" * 19))[0].token_ids) == 19
    with pytest.raises(ServiceError, match="no room for a completion") as caught:
        read(tokenizer, Prompt(text="1" * 20))
    assert caught.value.fields.type == "context_length_exceeded"


@pytest.mark.parametrize("messages", [[{"role": "system", "content": "1"}], [{"role": "user"}], [{}]])
def test_what_the_template_refuses_is_the_users(tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + (
        "{{ messages[0].content + '' }}"
    )
    with pytest.raises(ServiceError, match="does not take these messages") as caught:
        read(tokenizer, Prompt(messages=messages))
    assert caught.value.status == 400
