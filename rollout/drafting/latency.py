"""What an engine step costs: seconds = a + r * requests + b * tokens, fitted while the engine runs."""

import numpy as np

from databus.codec import Array

FORGETTING = 0.995
OUTLIER = 4.0
WARM_UP = 16
MS = 1e3
UNIT = 64.0
"""Requests and tokens are counted in sixty-fours and time in milliseconds, so that all weights are of one size."""
PRIOR_VARIANCE = 100.0
MAX_VARIANCE = 1e4


class LatencyModel:
    """Recursive least squares with forgetting (Haykin, Adaptive Filter Theory, ch. 10)."""

    def __init__(self, base_s: float = 5e-3, request_s: float = 5e-5, token_s: float = 5e-5) -> None:
        self._weights = np.array([base_s, request_s * UNIT, token_s * UNIT]) * MS
        self._covariance = np.eye(3) * PRIOR_VARIANCE
        self._observed = 0

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """(a, r, b) in seconds; none below 0, as no request and no token makes a step shorter."""
        base, request, token = np.maximum(self._weights, 0.0) / MS
        return float(base), float(request / UNIT), float(token / UNIT)

    def predict(self, num_requests: int, num_tokens: int) -> float:
        """Seconds."""
        base, request, token = self.coefficients
        return base + request * num_requests + token * num_tokens

    def observe(self, seconds: float, num_requests: int, num_tokens: int) -> None:
        """A step of so many requests and tokens took so long. Steps that something else held up are left out."""
        self._observed += 1
        if self._observed > WARM_UP and seconds > OUTLIER * self.predict(num_requests, num_tokens):
            return
        features: Array = np.array([1.0, num_requests / UNIT, num_tokens / UNIT])
        spread = self._covariance @ features
        gain = spread / (FORGETTING + features @ spread)
        self._weights = self._weights + gain * (seconds * MS - features @ self._weights)
        self._covariance = (self._covariance - np.outer(gain, spread)) / FORGETTING
        # Forgetting where nothing new is seen would let the variance grow for ever.
        largest = float(self._covariance.diagonal().max())
        if largest > MAX_VARIANCE:
            self._covariance *= MAX_VARIANCE / largest
