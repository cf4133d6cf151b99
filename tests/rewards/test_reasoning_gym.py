import json

import pytest

from rewards.config import RewardConfig
from rewards.reasoning_gym import reasoning_gym_reward
from rewards.sample import Sample

TASKS = ("chain_sum", "leg_counting", "spell_backward", "basic_arithmetic", "countdown", "simple_equations")


def score(completion: str, problem: dict[str, object]) -> float:
    sample = Sample(prompt="", completion=completion, problem=problem, num_tokens=1, truncated=False)
    return reasoning_gym_reward(RewardConfig())(sample)


@pytest.mark.parametrize("task", TASKS)
def test_its_own_answers_are_right_after_a_way_through_json(task: str) -> None:
    import reasoning_gym

    for row in reasoning_gym.create_dataset(task, size=3, seed=1):
        problem = json.loads(json.dumps(row))
        assert score(f"Well... <answer>0</answer> no, <answer> {row['answer']} </answer>", problem) == 1.0
        assert score(str(row["answer"]), problem) == 1.0
        assert score("<answer>no idea</answer>", problem) < 0.5


def test_a_problem_of_another_kind() -> None:
    with pytest.raises(
        ValueError, match="needs the fields 'answer' and 'metadata' with 'source_dataset'; the problem has: q"
    ):
        score("1", {"q": 1})
