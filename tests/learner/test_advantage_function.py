from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_script import make_groups

from databus.groups import Group
from learner.advantage_function import call_advantage_function, credit_tokens
from learner.advantages import estimate_advantages

GUIDE = Path(__file__).parents[2] / "docs/guide/losses.md"


def from_guide(name: str) -> Callable[[Group], Any]:
    """An example of the guide, as it stands there."""
    blocks = [block.partition("```")[0] for block in GUIDE.read_text().split("```python\n")[1:]]
    (source,) = [block for block in blocks if f"def {name}(" in block]
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace[name]


def test_leave_one_out_weighted_by_pass_rate() -> None:
    group = make_groups(0)[0]
    assert sorted(group.rewards.tolist()) == [0, 0, 1, 1]
    (advantages,) = estimate_advantages([group], "mine.py:f", from_guide("hard_problems_first"))
    # Others' means: 2/3 for a wrong one, 1/3 for a right one; half are solved.
    assert advantages.tolist() == pytest.approx([1 / 3 if reward else -1 / 3 for reward in group.rewards])


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            lambda group: group.rewards[:2],
            r"returned shape \(2,\), expected \(4,\), one a completion, or \(\d+,\), one a",
        ),
        (lambda group: 1.0, r"returned shape \(\), expected"),
        (lambda group: group.rewards / 0, "returned a number that is not finite"),
        (lambda group: group.nothing, "it raised AttributeError"),
        (lambda group: ["a"] * 4, "it raised ValueError"),
    ],
)
def test_what_a_function_gets_wrong_is_said_in_one_line(function: Callable[[Group], Any], says: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=f"^learner.advantage.estimator=f.py:f: {says}"):
        call_advantage_function(function, make_groups(0)[0], "f.py:f")


def test_credit_goes_to_what_came_before() -> None:
    # Two completions of 3 and 2 tokens. Part 0 (rewards 1, 0: ±0.5) is settled after 1 and 2 tokens; part 1 (0, 4: ±2)
    # at the end.
    group = make_groups(0)[0]
    pair = Group(**(group.columns() | {"lengths": np.array([3, 2], np.int32), "token_ids": np.zeros(5, np.int32)}))
    parts, ends = np.array([[1.0, 0.0], [0.0, 4.0]]), np.array([[1, 3], [2, 2]])
    assert credit_tokens(pair, parts, ends).tolist() == [-1.5, -2, -2, 1.5, 1.5]


def test_credit_for_a_first_step() -> None:
    # Tokens 15 end the first step, after 2 tokens and never. Rewards of parts: first step 1, 0 (±0.5); answer 0, 1.
    columns = {
        "lengths": np.array([3, 2], np.int32),
        "token_ids": np.array([9, 15, 9, 9, 9], np.int32),
        "reward_parts": np.array([[1, 0], [0, 1]], np.float32),
    }
    pair = Group(**(make_groups(0)[0].columns() | columns))
    assert from_guide("first_step_apart")(pair).tolist() == [0, 0, -0.5, 0, 0]


def test_credit_of_whole_completions_is_dr_grpo() -> None:
    group = make_groups(0)[0]
    credit = credit_tokens(group, group.rewards[:, None], group.lengths[:, None])
    (expected,) = estimate_advantages([group], "dr_grpo")
    assert np.allclose(credit, np.repeat(expected, group.lengths))
