from pathlib import Path

import msgspec
import pytest

from echelon.prompt_files import PromptFile, encode_prompt, write_prompts

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
