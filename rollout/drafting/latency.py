"""What an engine step costs: seconds = a + r * requests + b * tokens, fitted while the engine runs."""

import numpy as np

from rollout.drafting.compiled import compiled

FORGETTING = 0.995
OUTLIER = 4.0
WARM_UP = 16
MS = 1e3
UNIT = 64.0
"""Requests and tokens are counted in sixty-fours and time in milliseconds, so that all weights are of one size."""
PRIOR_VARIANCE = 100.0
MAX_VARIANCE = 1e4


@compiled
def _observe(weights, covariance, features, spread, measured):
    """One step of recursive least squares, which with numpy's calls on three numbers would take 30 µs.

    weights [3] and covariance [3, 3] are changed in place; spread [3]: scratch.
    """
    error, scale = measured, FORGETTING
    for row in range(3):
        spread[row] = 0.0
        for column in range(3):
            spread[row] += covariance[row, column] * features[column]
        error -= features[row] * weights[row]
        scale += features[row] * spread[row]
    largest = 0.0
    for row in range(3):
        weights[row] += spread[row] / scale * error
        for column in range(3):
            covariance[row, column] = (covariance[row, column] - spread[row] / scale * spread[column]) / FORGETTING
        largest = max(largest, covariance[row, row])
    if largest > MAX_VARIANCE:  # forgetting where nothing new is seen would let the variance grow for ever
        for row in range(3):
            for column in range(3):
                covariance[row, column] *= MAX_VARIANCE / largest


class LatencyModel:
    """Recursive least squares with forgetting (Haykin, Adaptive Filter Theory, ch. 10)."""

    def __init__(self, base_s: float = 5e-3, request_s: float = 5e-5, token_s: float = 5e-5) -> None:
        self._weights = np.array([base_s, request_s * UNIT, token_s * UNIT]) * MS
        self._covariance = np.eye(3) * PRIOR_VARIANCE
        self._features, self._scratch = np.ones(3), np.zeros(3)
        self._observed = 0

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """(a, r, b) in seconds; none below 0, as no request and no token makes a step shorter."""
        base, request, token = (max(0.0, weight) / MS for weight in self._weights.tolist())
        return base, request / UNIT, token / UNIT

    def predict(self, num_requests: int, num_tokens: int) -> float:
        """Seconds."""
        base, request, token = self.coefficients
        return base + request * num_requests + token * num_tokens

    def observe(self, seconds: float, num_requests: int, num_tokens: int) -> None:
        """A step of so many requests and tokens took so long. Steps that something else held up are left out."""
        self._observed += 1
        if self._observed > WARM_UP and seconds > OUTLIER * self.predict(num_requests, num_tokens):
            return
        self._features[1:] = num_requests / UNIT, num_tokens / UNIT
        _observe(self._weights, self._covariance, self._features, self._scratch, seconds * MS)
