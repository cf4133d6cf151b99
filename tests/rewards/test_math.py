from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards.math import math_reward
from rewards.sample import Sample


def score(completion: str, answer: object) -> float:
    problem = {"answer": answer}
    return math_reward(Sample(prompt="", completion=completion, problem=problem, num_tokens=1, truncated=False))


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "She has <<3+4=7>>7.\n#### 7"),
        ("The answer is \\boxed{1,234}.", "#### 1234"),
        ("It is 42.", "42"),
        ("It is 42.", 42),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("x = 3; #### 1/2", "\\frac12"),
        ("#### \\frac{1}{2}", "#### 0.5"),
        ("#### $18", "#### 18"),
        ("#### 18 dollars", "#### 18"),
        ("#### -5.0", "#### -5"),
        ("#### 3 was wrong, so #### 5", "5"),
    ],
)
def test_equal_answers(completion: str, answer: object) -> None:
    assert score(completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("8", "#### 7"),
        ("", "#### 7"),
        ("####", "#### 7"),
        ("#### 7 and no, #### 8", "#### 7"),
        ("no number at all", "#### 7"),
        ("12", "\\frac12"),
    ],
)
def test_other_answers(completion: str, answer: object) -> None:
    assert score(completion, answer) == 0.0


def test_problem_without_an_answer() -> None:
    with pytest.raises(ValueError, match="needs a field 'answer'; the problem has: question"):
        math_reward(Sample(prompt="", completion="7", problem={"question": ""}, num_tokens=1, truncated=False))
    with pytest.raises(ValueError, match="has no answer to compare with"):
        score("7", "#### ")


def test_works_outside_the_main_thread() -> None:
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(score, "#### 7", "#### 7").result() == 1.0
