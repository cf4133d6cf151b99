"""A Gaussian mixture with full covariances, fitted by expectation maximisation."""

from dataclasses import dataclass

import numpy as np

from databus.codec import Array

ITERATIONS = 50
TOLERANCE = 1e-4
MIN_VARIANCE = 1e-4
"""Added to the diagonal of every covariance: points may coincide. Fit standardised points."""


@dataclass(frozen=True)
class Mixture:
    """weights [k]; means [k, d]; covariances [k, d, d]."""

    weights: Array
    means: Array
    covariances: Array

    def log_joint(self, points: Array) -> Array:
        """[n, k]: log of weight times density of each component at points [n, d]."""
        columns = [
            np.log(weight) + log_density(points, mean, covariance)
            for weight, mean, covariance in zip(self.weights, self.means, self.covariances, strict=True)
        ]
        return np.stack(columns, axis=1)

    def bic(self, points: Array) -> float:
        """Bayesian information criterion; smaller is better."""
        count, dims = points.shape
        parameters = len(self.weights) * (1 + dims + dims * (dims + 1) / 2) - 1
        return parameters * np.log(count) - 2 * float(log_sum(self.log_joint(points)).sum())


def log_density(points: Array, mean: Array, covariance: Array) -> Array:
    """[n]: log density of one Gaussian at points [n, d]; mean [d], covariance [d, d]."""
    factor = np.linalg.cholesky(covariance)
    scaled = np.linalg.solve(factor, (points - mean).T)
    log_det = 2 * np.log(np.diagonal(factor)).sum()
    return -0.5 * ((scaled**2).sum(axis=0) + log_det + len(mean) * np.log(2 * np.pi))


def log_sum(values: Array) -> Array:
    """[n]: log of the sum of exponentials over the last axis of [n, k]."""
    largest = values.max(axis=1, keepdims=True)
    return (largest + np.log(np.exp(values - largest).sum(axis=1, keepdims=True)))[:, 0]


def fit_mixture(points: Array, components: int, rng: np.random.Generator) -> Mixture:
    """Fit `components` Gaussians to points [n, d], n >= components."""
    mixture = _start(points, components, rng)
    before = -np.inf
    for _ in range(ITERATIONS):
        joint = mixture.log_joint(points)
        total = log_sum(joint)
        mixture = _maximise(points, np.exp(joint - total[:, None]))
        likelihood = float(total.mean())
        if likelihood - before < TOLERANCE:
            break
        before = likelihood
    return mixture


def best_mixture(points: Array, max_components: int, rng: np.random.Generator) -> Mixture:
    """The fit with the lowest BIC among 1 .. max_components Gaussians, each with several points for every dimension."""
    most = max(1, min(max_components, len(points) // (4 * points.shape[1])))
    fits = [fit_mixture(points, components, rng) for components in range(1, most + 1)]
    return min(fits, key=lambda mixture: mixture.bic(points))


def _start(points: Array, components: int, rng: np.random.Generator) -> Mixture:
    """Means far from each other (k-means++), the covariance of all points."""
    means = [points[rng.integers(len(points))]]
    while len(means) < components:
        distance = np.min([((points - mean) ** 2).sum(axis=1) for mean in means], axis=0) + 1e-12
        means.append(points[rng.choice(len(points), p=distance / distance.sum())])
    covariance = _covariance(points, points.mean(axis=0), np.ones(len(points)))
    return Mixture(np.full(components, 1 / components), np.stack(means), np.stack([covariance] * components))


def _maximise(points: Array, shares: Array) -> Mixture:
    """Args: shares: [n, k], responsibility of each component for each point."""
    totals = shares.sum(axis=0) + 1e-9
    means = (shares.T @ points) / totals[:, None]
    covariances = [_covariance(points, mean, share) for mean, share in zip(means, shares.T, strict=True)]
    return Mixture(totals / totals.sum(), means, np.stack(covariances))


def _covariance(points: Array, mean: Array, weights: Array) -> Array:
    centred = points - mean
    covariance = (weights[:, None] * centred).T @ centred / (weights.sum() + 1e-9)
    return covariance + MIN_VARIANCE * np.eye(points.shape[1])
