"""ALP-GMM: problems like those whose pass rate has changed most lately.

Absolute learning progress (ALP) of a group is how far its pass rate is from the last one of the same problem or, the
first time, of the problem nearest to it. A Gaussian mixture is fitted to (features of the problem, ALP) of the newest
groups; a Gaussian is chosen in proportion to its mean ALP, then a problem in proportion to its density there. A share
of problems is drawn uniformly.

Source: Portelas et al. 2019 (arXiv:1910.07224), algorithm 2; there tasks are points of a continuous space, and the
number of Gaussians is chosen by Akaike's criterion, here by the Bayesian one.
"""

import numpy as np
from msgspec import Struct, msgpack

from databus.codec import Array
from rollout.config import LearningProgress
from rollout.scheduling.difficulty import DifficultyModel
from rollout.scheduling.mixture import Mixture, best_mixture

NUM_FEATURES = 2
MIN_GROUPS = 32
"""Fewer say nothing of where progress is: problems are then drawn uniformly."""


class SamplerState(Struct, kw_only=True):
    """rates: float32 [N], NaN where never seen. window: float32 [n, 2 + 1], features and ALP, oldest first.

    seen: int32 [m], problems of the window's groups.
    """

    rates: bytes
    window: bytes
    seen: bytes


class LearningProgressSampler:
    """Draws the problems of a round; a round is `round_problems` long, and a problem may come more than once in it."""

    def __init__(self, config: LearningProgress, model: DifficultyModel) -> None:
        self._config = config
        self._model = model
        self._rates = np.full(len(model), np.nan, np.float32)
        self._window = np.zeros((0, NUM_FEATURES + 1), np.float32)
        self._seen = np.zeros(0, np.int32)

    def observe(self, problem: int, pass_rate: float) -> None:
        features = self._features(np.array([problem]))[0]
        before = self._rate_before(problem, features)
        self._rates[problem] = pass_rate
        # The first group of all has nothing to be compared with.
        alp = 0.0 if before is None else abs(pass_rate - before)
        newest = np.array([[*features, alp]], np.float32)
        self._window = np.concatenate((self._window, newest))[-self._config.window :]
        self._seen = np.append(self._seen, np.int32(problem))[-self._config.window :]

    def pool(self, round_number: int, rng: np.random.Generator) -> Array:
        size, num_problems = self._config.round_problems, len(self._model)
        if len(self._window) < MIN_GROUPS:
            return rng.choice(num_problems, size, replace=size > num_problems).astype(np.int32)
        explored = rng.random(size) < self._config.exploration
        weights = self._weights(rng)
        drawn = rng.choice(num_problems, size, p=weights)
        return np.where(explored, rng.integers(num_problems, size=size), drawn).astype(np.int32)

    def save(self) -> bytes:
        return msgpack.encode(
            SamplerState(
                rates=self._rates.astype("<f4").tobytes(),
                window=self._window.astype("<f4").tobytes(),
                seen=self._seen.astype("<i4").tobytes(),
            )
        )

    def load(self, state: bytes) -> None:
        loaded = msgpack.decode(state, type=SamplerState)
        self._rates = np.frombuffer(loaded.rates, "<f4").astype(np.float32)
        self._window = np.frombuffer(loaded.window, "<f4").astype(np.float32).reshape(-1, NUM_FEATURES + 1)
        self._seen = np.frombuffer(loaded.seen, "<i4").astype(np.int32)

    def _features(self, problems: Array) -> Array:
        """[n, 2]: log prompt length, and log of expected completion length."""
        tokens = np.maximum(1.0, self._model.mean_tokens(problems))
        return np.stack((self._model.log_prompt[problems], np.log(tokens)), axis=1)

    def _rate_before(self, problem: int, features: Array) -> float | None:
        if not np.isnan(self._rates[problem]):
            return float(self._rates[problem])
        if not len(self._window):
            return None
        nearest = int(((self._window[:, :NUM_FEATURES] - features) ** 2).sum(axis=1).argmin())
        return float(self._rates[self._seen[nearest]])

    def _weights(self, rng: np.random.Generator) -> Array:
        """float64 [N]: probability of each problem."""
        features = self._features(np.arange(len(self._model)))
        centre, scale = self._window.mean(axis=0, dtype=np.float64), self._window.std(axis=0, dtype=np.float64) + 1e-6
        mixture = best_mixture((self._window - centre) / scale, self._config.max_components, rng)
        progress = np.maximum(0.0, mixture.means[:, -1] * scale[-1] + centre[-1]) + 1e-9
        joint = _features_alone(mixture).log_joint((features - centre[:-1]) / scale[:-1])
        density = np.exp(joint - joint.max(axis=0)) + 1e-12
        weights = (density / density.sum(axis=0)) @ (progress / progress.sum())
        return weights / weights.sum()


def _features_alone(mixture: Mixture) -> Mixture:
    """The mixture's marginal over features, without the ALP."""
    return Mixture(
        np.ones_like(mixture.weights), mixture.means[:, :-1], np.ascontiguousarray(mixture.covariances[:, :-1, :-1])
    )
