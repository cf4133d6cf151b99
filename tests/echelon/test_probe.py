from pathlib import Path

import pytest

from echelon.probe import probe_texts
from echelon.prompt_files import encode_prompt, write_prompts
from rollout.config import GateConfig, RolloutConfig

TEMPLATE = list(range(100, 140))


def prompt_file(folder: Path, *prompts: list[int]) -> Path:
    write_prompts(folder / "train.jsonl", [encode_prompt("p", ids, {}) for ids in prompts])
    return folder / "train.jsonl"


def test_long_prompts_give_their_ends(tmp_path: Path) -> None:
    file = prompt_file(tmp_path, *([*TEMPLATE, *range(first, first + 60)] for first in (200, 300, 400, 500, 600)))
    texts = probe_texts(file, RolloutConfig())
    assert texts == tuple((*TEMPLATE[-4:], *range(first, first + 60)) for first in (200, 300, 400, 500))


def test_short_prompts_are_joined_and_few_come_again(tmp_path: Path) -> None:
    file = prompt_file(tmp_path, [1, 2, 3], [4, 5])
    texts = probe_texts(file, RolloutConfig())
    assert [len(text) for text in texts] == [64] * 4
    assert texts[0][:7] == (1, 2, 3, 4, 5, 1, 2)


@pytest.mark.parametrize(("context", "length"), [(10, 9), (3, 2)])
def test_texts_leave_room_in_the_context(tmp_path: Path, context: int, length: int) -> None:
    texts = probe_texts(prompt_file(tmp_path, [1, 2, 3]), RolloutConfig(context_tokens=context))
    assert [len(text) for text in texts] == [length] * 4


def test_without_a_gate_there_are_none(tmp_path: Path) -> None:
    file = prompt_file(tmp_path, [1, 2, 3])
    assert probe_texts(file, RolloutConfig(gate=GateConfig(max_kl=0))) == ()
    assert probe_texts(file, RolloutConfig(context_tokens=2)) == ()
