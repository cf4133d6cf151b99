"""The built-in `reasoning_gym` reward: a generated problem's own verifier."""

import re
from collections.abc import Callable
from typing import Any

from rewards.config import RewardConfig
from rewards.sample import Sample

_answer = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_gym_reward(config: RewardConfig) -> Callable[[Sample], float]:
    """The verifier of the data set that `metadata.source_dataset` names, for what stands in the last <answer> tag.

    Without a tag it is the whole completion. Verifiers give part of the reward for an answer that is nearly right.

    Raises: ValueError, where it is called with a problem that no generator has made.
    """
    from reasoning_gym.factory import get_score_answer_fn

    verifiers: dict[str, Any] = {}

    def score(sample: Sample) -> float:
        name = source_of(sample.problem)
        if name not in verifiers:
            verifiers[name] = get_score_answer_fn(name)
        found = _answer.findall(sample.completion)
        return float(verifiers[name]((found[-1] if found else sample.completion).strip(), sample.problem))

    return score


def source_of(problem: dict[str, Any]) -> str:
    metadata = problem.get("metadata")
    name = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    if not name or "answer" not in problem:
        raise ValueError(
            "the reasoning_gym reward needs the fields 'answer' and 'metadata' with 'source_dataset'; the problem has: "
            f"{', '.join(problem) or 'none'}"
        )
    return str(name)
