"""Which problems a round has: all of them, or those worth the time."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from databus.codec import Array
from rollout.config import CurriculumConfig, DropSolved, LearningProgress, NoCurriculum, PassRateBand
from rollout.scheduling.difficulty import DifficultyModel
from rollout.scheduling.learning_progress import LearningProgressSampler

logger = logging.getLogger(__name__)


class Curriculum(Protocol):
    def pool(self, round_number: int, rng: np.random.Generator) -> Array:
        """int [n], n >= 1: the problems of a round, in any order, some perhaps more than once."""
        ...

    def observe(self, problem: int, pass_rate: float) -> None:
        """A group of `problem` came in; pass_rate: share of its completions that passed."""
        ...

    def save(self) -> bytes: ...

    def load(self, state: bytes) -> None: ...


class Everything:
    """All problems in every round."""

    def __init__(self, model: DifficultyModel) -> None:
        self._all = np.arange(len(model), dtype=np.int32)

    def pool(self, round_number: int, rng: np.random.Generator) -> Array:
        return self._all

    def observe(self, problem: int, pass_rate: float) -> None: ...

    def save(self) -> bytes:
        return b""

    def load(self, state: bytes) -> None: ...


class Band:
    """Problems whose pass rate is within bounds, too little known, or not tried for long."""

    def __init__(
        self, model: DifficultyModel, low: float, high: float, min_completions: int, retry_rounds: int
    ) -> None:
        self._model = model
        self._low, self._high = low, high
        self._min_completions = min_completions
        self._retry_rounds = retry_rounds
        self._all = np.arange(len(model), dtype=np.int32)
        self._tried = np.full(len(model), -1, np.int32)  # the last round that had the problem
        self._warned = False

    def pool(self, round_number: int, rng: np.random.Generator) -> Array:
        rates = self._model.pass_rate(self._all)
        inside = (rates >= self._low) & (rates <= self._high)
        unsure = self._model.evidence(self._all) < self._min_completions
        due = round_number - self._tried > self._retry_rounds
        chosen = self._all[inside | unsure | due]
        if not len(chosen):
            if not self._warned:
                logger.warning("the curriculum leaves no problem: taking all of them")
            self._warned, chosen = True, self._all
        self._tried[chosen] = round_number
        return chosen

    def observe(self, problem: int, pass_rate: float) -> None: ...

    def save(self) -> bytes:
        return self._tried.astype("<i4").tobytes()

    def load(self, state: bytes) -> None:
        self._tried = np.frombuffer(state, "<i4").astype(np.int32)


def make_curriculum(config: CurriculumConfig, model: DifficultyModel) -> Curriculum:
    return CURRICULA[type(config)](config, model)


def _drop_solved(config: DropSolved, model: DifficultyModel) -> Curriculum:
    return Band(model, 0.0, config.threshold, config.min_completions, config.retry_epochs)


def _band(config: PassRateBand, model: DifficultyModel) -> Curriculum:
    return Band(model, config.low, config.high, config.min_completions, config.retry_epochs)


CURRICULA: dict[type, Callable[[Any, DifficultyModel], Curriculum]] = {
    NoCurriculum: lambda config, model: Everything(model),
    DropSolved: _drop_solved,
    PassRateBand: _band,
    LearningProgress: LearningProgressSampler,
}
