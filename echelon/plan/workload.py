"""What problems ask for: how long completions become and what they earn, as a run has seen it or as it was stated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from databus.codec import Array
from echelon.plan.costs import Costs

MIN_LENGTH = 1


@dataclass(frozen=True)
class Drawn:
    """A group that is to be. lengths: tokens of each completion. rewards: float32 [G]."""

    lengths: list[int]
    rewards: Array


class Workload(Protocol):
    """prompt_tokens: of each problem of the data set."""

    prompt_tokens: Sequence[int]

    def draw(self, problem: int, group_size: int, max_tokens: int) -> Drawn: ...


class StatedLengths:
    """Log-normal lengths around each problem's own, and rewards of 0 or 1."""

    def __init__(self, costs: Costs, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._spread = costs.length_spread / np.sqrt(2)
        around = np.log(costs.length_mean) - self._spread**2  # the mean of the whole is the one that was stated
        self._log_lengths = around + self._spread * self._rng.standard_normal(costs.problems)
        self._pass_rate = costs.pass_rate
        self.prompt_tokens: Sequence[int] = [costs.prompt_tokens] * costs.problems

    def draw(self, problem: int, group_size: int, max_tokens: int) -> Drawn:
        logs = self._log_lengths[problem] + self._spread * self._rng.standard_normal(group_size)
        lengths = np.clip(np.exp(logs), MIN_LENGTH, max_tokens).astype(int).tolist()
        return Drawn(lengths, (self._rng.random(group_size) < self._pass_rate).astype(np.float32))


@dataclass(frozen=True)
class RecordedGroup:
    """A group that a run has completed. lengths: int [G]. rewards: float32 [G]."""

    prompt_tokens: int
    lengths: Array
    rewards: Array


class RecordedLengths:
    """Groups as a run has completed them: a problem's own where it had some, else those of a prompt of like length."""

    def __init__(self, groups: Sequence[tuple[int, RecordedGroup]], prompt_tokens: Sequence[int], seed: int) -> None:
        """Args: groups: (problem, group), at least one. prompt_tokens: of each problem."""
        self._rng = np.random.default_rng(seed)
        self.prompt_tokens = prompt_tokens
        self._own: dict[int, list[RecordedGroup]] = {}
        for problem, group in groups:
            self._own.setdefault(problem, []).append(group)
        self._by_prompt = sorted((group for _, group in groups), key=lambda group: group.prompt_tokens)
        self._prompts = np.array([group.prompt_tokens for group in self._by_prompt])

    def draw(self, problem: int, group_size: int, max_tokens: int) -> Drawn:
        group = self._like(problem)
        # All of the group where it has the size: its completions are alike, and the longest is what it waits for.
        whole = len(group.lengths) == group_size
        chosen = np.arange(group_size) if whole else self._rng.integers(len(group.lengths), size=group_size)
        lengths = np.clip(group.lengths[chosen], MIN_LENGTH, max_tokens).tolist()
        return Drawn(lengths, group.rewards[chosen])

    def _like(self, problem: int) -> RecordedGroup:
        own = self._own.get(problem)
        if own is not None:
            return own[int(self._rng.integers(len(own)))]
        wanted = self.prompt_tokens[problem]
        low, high = np.searchsorted(self._prompts, [wanted, wanted + 1])
        if low == high:  # nothing so long: the nearest
            nearest = self._prompts[np.argmin(np.abs(self._prompts - wanted))]
            low, high = np.searchsorted(self._prompts, [nearest, nearest + 1])
        return self._by_prompt[int(self._rng.integers(low, high))]
