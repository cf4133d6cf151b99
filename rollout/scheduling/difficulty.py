"""What is known of each problem's difficulty: its pass rate and the lengths of its completions.

Arrays by problem index, so that ten thousand problems cost a few hundred kilobytes and one vector operation.
"""

import numpy as np
from msgspec import Struct

from databus.codec import Array
from rollout.scheduling.length_prior import LengthPrior, PriorState

UPPER_QUANTILE = 0.9
PASS_PRIOR, LENGTH_PRIOR = 2.0, 0.5
"""Weight of what the data set says beside what the problem itself says, in completions. Pass rates are noisier."""
MEMORY_GROUPS = 512.0
ANCHOR_GROUPS = 64
"""From so many groups on the data set's expectation is steady enough to measure other lengths by."""
ARRAYS = ("log_mean", "log_upper", "log_max", "weight", "passed", "failed")


class DifficultyState(Struct, kw_only=True):
    """arrays: float32 [len(ARRAYS), N], little-endian. num_groups: observed. passed, failed: of the data set."""

    num_problems: int
    arrays: bytes
    prior: PriorState
    num_groups: int
    passed: float
    failed: float


class DifficultyModel:
    """Per problem a Beta posterior of the pass rate, and running estimates of completion length.

    Evidence fades: each new group of a problem multiplies what is known of it by `forgetting`. Once the data set's
    own expectation is steady, lengths are kept as ratios to it, so that a policy which learns to write shorter answers
    shortens the prediction of problems that have not come up since as well.
    """

    def __init__(self, prompt_tokens: Array, forgetting: float) -> None:
        """Args: prompt_tokens: int [N], prompt length of each problem. forgetting: in (0, 1], 1 forgets nothing."""
        self._log_prompt = np.log(np.maximum(1, prompt_tokens).astype(np.float64))
        self._forgetting = forgetting
        self._values = np.zeros((len(ARRAYS), len(prompt_tokens)), np.float32)
        self._prior = LengthPrior(MEMORY_GROUPS)
        self._num_groups = 0
        self._passed = self._failed = 0.0

    def __len__(self) -> int:
        return len(self._log_prompt)

    @property
    def seen(self) -> bool:
        """Has any group been observed?"""
        return self._prior.seen

    @property
    def log_prompt(self) -> Array:
        """float64 [N]: log of each prompt's length."""
        return self._log_prompt

    def observe(self, problem: int, lengths: Array, passed: Array) -> None:
        """Take one group. Args: lengths: int [G] tokens a completion. passed: bool [G]."""
        tokens = np.maximum(1, lengths).astype(np.float64)
        log_mean = float(np.log(tokens.mean()))
        log_upper = float(np.log(np.quantile(tokens, UPPER_QUANTILE))) - log_mean
        log_max = float(np.log(tokens.max())) - log_mean
        self._prior.observe(float(self._log_prompt[problem]), log_mean, log_upper, log_max)
        self._num_groups += 1
        if self._num_groups == ANCHOR_GROUPS:
            self._anchor()
        relative = log_mean - float(self._reference(np.array([problem]))[0])
        values = self._values[:, problem]
        kept = self._forgetting * values[3]
        values[:3] = (kept * values[:3] + len(tokens) * np.array([relative, log_upper, log_max])) / (kept + len(tokens))
        values[3] = kept + len(tokens)
        successes = int(np.count_nonzero(passed))
        values[4:] = self._forgetting * values[4:] + np.array([successes, len(tokens) - successes])
        keep = 1 - 1 / MEMORY_GROUPS
        self._passed = keep * self._passed + successes
        self._failed = keep * self._failed + len(tokens) - successes

    def mean_tokens(self, problems: Array) -> Array:
        """float64 [n]: expected length of a completion; 0 while nothing at all has been seen."""
        if not self.seen:
            return np.zeros(len(problems))
        own = self._values[0, problems] + self._reference(problems)
        trust = self._trust(problems)
        return np.exp(trust * own + (1 - trust) * self._prior.log_mean(self._log_prompt[problems]))

    def upper_tokens(self, problems: Array) -> Array:
        """float64 [n]: the upper quantile (0.9) of a completion's length."""
        return self.mean_tokens(problems) * np.exp(self._spread(1, self._prior.spread()[0], problems))

    def longest_tokens(self, problems: Array) -> Array:
        """float64 [n]: expected length of the longest completion of a group, which the group waits for."""
        return self.mean_tokens(problems) * np.exp(self._spread(2, self._prior.spread()[1], problems))

    def pass_rate(self, problems: Array) -> Array:
        """float64 [n]: posterior mean of the Beta distribution whose prior is the data set's pass rate."""
        common = (self._passed + 1) / (self._passed + self._failed + 2)
        passed, failed = self._values[4, problems], self._values[5, problems]
        return (passed + PASS_PRIOR * common) / (passed + failed + PASS_PRIOR)

    def evidence(self, problems: Array) -> Array:
        """float64 [n]: completions that a problem's pass rate rests on, what has faded left out."""
        return (self._values[4, problems] + self._values[5, problems]).astype(np.float64)

    def save(self) -> DifficultyState:
        return DifficultyState(
            num_problems=len(self),
            arrays=self._values.astype("<f4").tobytes(),
            prior=self._prior.state,
            num_groups=self._num_groups,
            passed=self._passed,
            failed=self._failed,
        )

    def load(self, state: DifficultyState) -> None:
        """Raises: ValueError where the state is of another data set."""
        if state.num_problems != len(self):
            raise ValueError(
                f"the checkpoint knows the difficulty of {state.num_problems} problems, data.train has {len(self)}: "
                "resume with the same problems"
            )
        self._values = np.frombuffer(state.arrays, "<f4").reshape(len(ARRAYS), len(self)).astype(np.float32)
        self._prior = LengthPrior(MEMORY_GROUPS, state.prior)
        self._num_groups = state.num_groups
        self._passed, self._failed = state.passed, state.failed

    def _reference(self, problems: Array) -> Array:
        """float64 [n]: what `log_mean` of these problems is kept relative to."""
        if self._num_groups < ANCHOR_GROUPS:
            return np.zeros(len(problems))
        return self._prior.log_mean(self._log_prompt[problems])

    def _anchor(self) -> None:
        """From absolute lengths to ratios."""
        seen = self._values[3] > 0
        self._values[0, seen] -= self._prior.log_mean(self._log_prompt[seen]).astype(np.float32)

    def _trust(self, problems: Array) -> Array:
        weight = self._values[3, problems]
        return weight / (weight + LENGTH_PRIOR)

    def _spread(self, row: int, common: float, problems: Array) -> Array:
        trust = self._trust(problems)
        return trust * self._values[row, problems] + (1 - trust) * common
