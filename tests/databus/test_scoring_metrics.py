from types import SimpleNamespace

from databus.messages import Heartbeat
from databus.scoring_metrics import ScoringMetrics


def peer(name: str, **scoring: float) -> SimpleNamespace:
    beat = Heartbeat(scoring={key.replace("__", "."): value for key, value in scoring.items()})
    return SimpleNamespace(name=name, hello=SimpleNamespace(pid=1), beat=beat)


def test_latency_and_failures_since_the_last_step() -> None:
    metrics = ScoringMetrics()
    metrics.heard(peer("a", math__scored=10, math__time_s=2.0, judge__failed=1))
    metrics.heard(peer("b", math__scored=10, math__time_s=1.0, math__failed=5))
    assert metrics.since_last() == {
        "scoring/math_s": 0.15, "scoring/math_failure_rate": 0.2, "scoring/judge_failure_rate": 1.0,
    }  # fmt: skip
    assert metrics.since_last() == {}
    metrics.heard(peer("a", math__scored=14, math__time_s=3.0, judge__failed=1))
    assert metrics.since_last() == {"scoring/math_s": 0.25, "scoring/math_failure_rate": 0.0}
