import numpy as np
import pytest
import scipy.stats

from rollout.scheduling.mixture import best_mixture, fit_mixture, log_density


def two_clouds(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    near = rng.multivariate_normal([-2, 0, 0], np.diag([0.2, 0.5, 0.1]), count)
    far = rng.multivariate_normal([3, 1, 2], [[0.5, 0.2, 0], [0.2, 0.5, 0], [0, 0, 0.3]], 2 * count)
    return np.concatenate((near, far))


def test_density_is_scipys() -> None:
    points, mean = np.random.default_rng(1).normal(size=(20, 3)), np.array([0.3, -1, 2])
    covariance = np.array([[1.0, 0.3, 0.1], [0.3, 2.0, 0.0], [0.1, 0.0, 0.5]])
    expected = scipy.stats.multivariate_normal(mean, covariance).logpdf(points)
    np.testing.assert_allclose(log_density(points, mean, covariance), expected)


def test_two_clouds_are_found() -> None:
    mixture = best_mixture(two_clouds(150), 6, np.random.default_rng(3))
    assert len(mixture.weights) == 2
    order = np.argsort(mixture.weights)
    np.testing.assert_allclose(mixture.weights[order], [1 / 3, 2 / 3], atol=0.02)
    np.testing.assert_allclose(mixture.means[order], [[-2, 0, 0], [3, 1, 2]], atol=0.2)


def test_one_cloud_is_one() -> None:
    points = np.random.default_rng(0).normal(size=(300, 3))
    assert len(best_mixture(points, 6, np.random.default_rng(0)).weights) == 1


@pytest.mark.parametrize("count", [1, 2, 40])
def test_points_that_coincide(count: int) -> None:
    mixture = best_mixture(np.ones((count, 3)), 6, np.random.default_rng(0))
    assert np.isfinite(mixture.log_joint(np.ones((1, 3)))).all()
    assert np.isfinite(fit_mixture(np.ones((40, 2)), 3, np.random.default_rng(0)).means).all()
