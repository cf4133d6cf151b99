"""What is known of each problem's difficulty: its pass rate and the lengths of its completions.

Arrays by problem index, so that ten thousand problems cost a few hundred kilobytes and one vector operation.
"""

import numpy as np
from msgspec import Struct

from databus.codec import Array
from rollout.scheduling.length_prior import LengthPrior, PriorState

UPPER_QUANTILE = 0.9
PRIOR_COMPLETIONS = 2.0
"""Weight of the data set's pass rate in a problem's posterior, and of the prior in its length, in completions."""
MEMORY_GROUPS = 512.0
ARRAYS = ("log_ratio", "log_upper", "log_max", "weight", "passed", "failed")


class DifficultyState(Struct, kw_only=True):
    """arrays: float32 [len(ARRAYS), N], little-endian. passed, failed: of the data set."""

    num_problems: int
    arrays: bytes
    prior: PriorState
    passed: float
    failed: float


class DifficultyModel:
    """Per problem a Beta posterior of the pass rate, and running estimates of completion length.

    Evidence fades: each new group of a problem multiplies what is known of it by `forgetting`. Lengths are kept as
    ratios to the data set's own expectation, so that a policy which learns to write shorter answers shortens the
    prediction of problems that have not come up since as well.
    """

    def __init__(self, prompt_tokens: Array, forgetting: float) -> None:
        """Args: prompt_tokens: int [N], prompt length of each problem. forgetting: in (0, 1], 1 forgets nothing."""
        self._log_prompt = np.log(np.maximum(1, prompt_tokens).astype(np.float64))
        self._forgetting = forgetting
        self._values = np.zeros((len(ARRAYS), len(prompt_tokens)), np.float32)
        self._prior = LengthPrior(MEMORY_GROUPS)
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
        log_prompt = float(self._log_prompt[problem])
        self._prior.observe(log_prompt, log_mean, log_upper, log_max)
        ratio = log_mean - float(self._prior.log_mean(self._log_prompt[problem : problem + 1])[0])
        values = self._values[:, problem]
        kept = self._forgetting * values[3]
        values[:3] = (kept * values[:3] + len(tokens) * np.array([ratio, log_upper, log_max])) / (kept + len(tokens))
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
        ratio = self._values[0, problems] * self._trust(problems)
        return np.exp(self._prior.log_mean(self._log_prompt[problems]) + ratio)

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
        return (passed + PRIOR_COMPLETIONS * common) / (passed + failed + PRIOR_COMPLETIONS)

    def evidence(self, problems: Array) -> Array:
        """float64 [n]: completions that a problem's pass rate rests on, what has faded left out."""
        return (self._values[4, problems] + self._values[5, problems]).astype(np.float64)

    def save(self) -> DifficultyState:
        return DifficultyState(
            num_problems=len(self),
            arrays=self._values.astype("<f4").tobytes(),
            prior=self._prior.state,
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
        self._passed, self._failed = state.passed, state.failed

    def _trust(self, problems: Array) -> Array:
        weight = self._values[3, problems]
        return weight / (weight + PRIOR_COMPLETIONS)

    def _spread(self, row: int, common: float, problems: Array) -> Array:
        trust = self._trust(problems)
        return trust * self._values[row, problems] + (1 - trust) * common
