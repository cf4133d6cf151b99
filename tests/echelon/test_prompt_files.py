from pathlib import Path

import msgspec
import pytest

from databus.messages import Position
from echelon.config import DataConfig, RunConfig
from echelon.prompt_files import PromptFile, ScheduledPrompts, encode_prompt, write_prompts
from echelon.roles.broker import make_scheduler

NUM_PROMPTS = 23


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    write_prompts(file, (encode_prompt(f"prompt {i}", [i, i + 1], {"answer": i}) for i in range(NUM_PROMPTS)))
    return file


def epoch(prompts: PromptFile, number: int) -> list[str]:
    return [prompts.get(number * NUM_PROMPTS + place).prompt for place in range(NUM_PROMPTS)]


def test_a_prompt_comes_back_as_it_was_written(file: Path) -> None:
    stored = PromptFile(file, seed=0, shuffle=False).get(4)
    assert (stored.prompt, stored.prompt_ids) == ("prompt 4", (4, 5))
    assert msgspec.json.decode(stored.problem) == {"answer": 4}


def test_every_prompt_once_an_epoch(file: Path) -> None:
    prompts = PromptFile(file, seed=0, shuffle=True)
    everyone = sorted(f"prompt {i}" for i in range(NUM_PROMPTS))
    for number in range(4):
        assert sorted(epoch(prompts, number)) == everyone


def test_order_follows_from_seed_and_epoch_alone(file: Path) -> None:
    prompts, again = PromptFile(file, seed=5, shuffle=True), PromptFile(file, seed=5, shuffle=True)
    later = epoch(again, 3)  # asked for first
    assert epoch(prompts, 0) != epoch(prompts, 1)
    assert epoch(prompts, 3) == later
    assert epoch(PromptFile(file, seed=6, shuffle=True), 0) != epoch(prompts, 0)


def test_order_is_the_same_for_ever(file: Path) -> None:
    # A resumed run relies on it: these were drawn by Python 3.11.
    places = [PromptFile(file, seed=0, shuffle=True).get(cursor).prompt_ids[0] for cursor in range(6)]
    assert places == [14, 18, 8, 16, 13, 9]


def test_without_shuffling_the_file_decides(file: Path) -> None:
    prompts = PromptFile(file, seed=0, shuffle=False)
    assert epoch(prompts, 2) == [f"prompt {i}" for i in range(NUM_PROMPTS)]


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prepare has not run"):
        PromptFile(tmp_path / "none", 0, True)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="holds no prompts"):
        PromptFile(tmp_path / "empty", 0, True)


def test_a_scheduler_chooses_the_lines(file: Path) -> None:
    prompts = ScheduledPrompts(PromptFile(file, 0, True), lambda cursor: 2 * cursor)
    assert [prompts.get(cursor).prompt for cursor in range(3)] == ["prompt 0", "prompt 2", "prompt 4"]


def test_prompt_lengths(file: Path) -> None:
    assert PromptFile(file, 0, True).prompt_tokens() == [2] * NUM_PROMPTS


def config(**changes: bool) -> RunConfig:
    return RunConfig(model="m", data=DataConfig(train="t", **changes), batch_groups=4)


def test_scheduled_prompts_come_once_an_epoch_and_go_on_after_a_checkpoint(file: Path) -> None:
    prompts = PromptFile(file, 0, True)
    scheduler = make_scheduler(config(), prompts, None)
    drawn = [scheduler.problem_of(cursor) for cursor in range(NUM_PROMPTS + 6)]
    assert sorted(drawn[:NUM_PROMPTS]) == list(range(NUM_PROMPTS))
    position = Position(step=0, next_cursor=NUM_PROMPTS + 6, pending=(), counts={}, scheduling=scheduler.save())
    stored = msgspec.json.decode(msgspec.json.encode(position), type=Position)  # as a checkpoint holds it
    resumed = make_scheduler(config(), prompts, stored)
    rest = range(NUM_PROMPTS + 6, 4 * NUM_PROMPTS)
    assert [resumed.problem_of(cursor) for cursor in rest] == [scheduler.problem_of(cursor) for cursor in rest]
    assert [resumed.problem_of(cursor) for cursor in range(NUM_PROMPTS + 6)] == drawn


def test_a_checkpoint_of_before_scheduling_can_be_resumed(file: Path) -> None:
    old = msgspec.json.decode(b'{"type":"Position","step":2,"next_cursor":8,"pending":[],"counts":{}}', type=Position)
    assert make_scheduler(config(), PromptFile(file, 0, True), old).problem_of(8) in range(NUM_PROMPTS)


def test_without_shuffling_the_scheduler_keeps_the_files_order(file: Path) -> None:
    scheduler = make_scheduler(config(shuffle=False), PromptFile(file, 0, False), None)
    assert [scheduler.problem_of(cursor) for cursor in range(30)] == [cursor % NUM_PROMPTS for cursor in range(30)]
