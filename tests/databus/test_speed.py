import pytest

from databus.messages import Heartbeat
from databus.speed import RATE_WINDOW_S, Speed


def beats(speed: Speed, start: float, seconds: float, rate: float, tokens: int = 0, running: int = 1) -> int:
    """Heartbeats every second of a worker that generates `rate` tokens a second; its tokens at the end."""
    for second in range(int(seconds) + 1):
        speed.take(Heartbeat(running_sequences=running, generated_tokens=tokens + int(rate * second)), start + second)
    return tokens + int(rate * seconds)


def test_rate_over_a_window() -> None:
    speed = Speed()
    beats(speed, 0, RATE_WINDOW_S - 1, 50)
    assert speed.tokens_per_s == 0 and speed.working_tokens_per_s is None, "no whole window yet"
    beats(speed, RATE_WINDOW_S, RATE_WINDOW_S, 50, tokens=500)
    assert speed.tokens_per_s == speed.working_tokens_per_s == 50


def test_waiting_makes_nobody_slow() -> None:
    """On-policy, the quick wait for the slow one at every step."""
    speed = Speed()
    tokens = beats(speed, 0, 2, 50)
    tokens = beats(speed, 2, 6, 0, tokens, running=0)
    beats(speed, 8, 2, 50, tokens)
    assert speed.tokens_per_s == 20
    assert speed.working_tokens_per_s == 50


def test_no_work_at_all_says_nothing() -> None:
    speed = Speed()
    tokens = beats(speed, 0, RATE_WINDOW_S, 50)
    beats(speed, RATE_WINDOW_S, RATE_WINDOW_S, 0, tokens, running=0)
    assert speed.tokens_per_s == 0 and speed.working_tokens_per_s is None


def test_an_engine_that_hangs_is_slow() -> None:
    speed = Speed()
    beats(speed, 0, 30, 0, tokens=7)
    assert speed.tokens_per_s == 0 and speed.working_tokens_per_s == 0


def test_counters_that_start_anew_give_no_negative_rate() -> None:
    speed = Speed()
    beats(speed, 0, RATE_WINDOW_S, 50)
    beats(speed, RATE_WINDOW_S + 1, RATE_WINDOW_S, 30, tokens=10)
    assert speed.working_tokens_per_s == pytest.approx(30)
