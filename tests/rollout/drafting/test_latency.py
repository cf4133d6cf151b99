import numpy as np

from rollout.drafting.latency import LatencyModel


def test_finds_what_steps_cost_amid_noise() -> None:
    rng = np.random.default_rng(0)
    model = LatencyModel()
    for _ in range(400):
        requests = int(rng.integers(1, 256))
        tokens = requests + int(rng.integers(0, 4 * requests))
        seconds = (7e-3 + 8e-5 * requests + 3e-5 * tokens) * rng.normal(1.0, 0.05)
        model.observe(seconds, requests, tokens)
    base, request, token = model.coefficients
    assert abs(base - 7e-3) < 1.5e-3 and abs(request - 8e-5) < 1.5e-5 and abs(token - 3e-5) < 5e-6


def test_follows_an_engine_that_changes() -> None:
    model = LatencyModel()
    for cost in (1e-4, 3e-4):
        for tokens in [*range(1, 300)] * 3:
            model.observe(5e-3 + cost * tokens, tokens // 2, tokens)
        assert abs(model.predict(100, 200) - (5e-3 + cost * 200)) < 1e-3


def test_a_pause_is_no_step() -> None:
    model = LatencyModel()
    for tokens in [*range(1, 200)]:
        model.observe(5e-3 + 1e-4 * tokens, tokens, tokens)
    before = model.predict(64, 64)
    model.observe(3.0, 64, 64)
    assert abs(model.predict(64, 64) - before) < 1e-6


def test_thousands_of_equal_steps_do_no_harm() -> None:
    model = LatencyModel()
    for _ in range(20_000):
        model.observe(0.02, 64, 64)
    assert abs(model.predict(64, 64) - 0.02) < 1e-3
    assert all(0 <= part < 0.1 for part in model.coefficients)
