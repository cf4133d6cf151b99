from databus.messages import Heartbeat
from databus.speed import RATE_WINDOW_S, Speed


def beats(speed: Speed, start: float, end: float, rate: float, running: int = 1) -> None:
    """Heartbeats every second of a worker that generates `rate` tokens a second."""
    now = start
    while now <= end:
        speed.take(Heartbeat(running_sequences=running, generated_tokens=int(rate * (now - 1))), now)
        now += 1.0


def test_rate_over_a_window() -> None:
    speed = Speed()
    beats(speed, 1, RATE_WINDOW_S, 50)
    assert speed.tokens_per_s == 0, "no whole window yet"
    beats(speed, 1 + RATE_WINDOW_S, 2 * RATE_WINDOW_S, 50)
    assert speed.tokens_per_s == 50 and speed.busy


def test_one_moment_without_work_and_the_window_does_not_count() -> None:
    speed = Speed()
    beats(speed, 1, 5, 50)
    beats(speed, 6, 6, 50, running=0)
    beats(speed, 7, 11, 50)
    assert speed.tokens_per_s == 50 and not speed.busy
    beats(speed, 12, 21, 50)
    assert speed.busy


def test_an_engine_that_hangs_is_busy_and_slow() -> None:
    speed = Speed()
    for now in range(1, 30):
        speed.take(Heartbeat(running_sequences=4, generated_tokens=7), float(now))
    assert speed.tokens_per_s == 0 and speed.busy


def test_counters_that_start_anew_give_no_negative_rate() -> None:
    speed = Speed()
    speed.take(Heartbeat(running_sequences=1, generated_tokens=1000), 1.0)
    speed.take(Heartbeat(running_sequences=1, generated_tokens=10), 2.0)
    assert speed.tokens_per_s == 0
