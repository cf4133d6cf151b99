from types import SimpleNamespace

from databus.draft_metrics import DraftMetrics
from databus.messages import Heartbeat


def worker(name: str, pid: int, **drafting: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, hello=SimpleNamespace(pid=pid), beat=Heartbeat(drafting=drafting))


def test_without_drafting_only_what_every_row_has():
    metrics = DraftMetrics()
    metrics.heard(worker("a", 1))
    assert metrics.since_last() == {"draft/acceptance": 0.0, "draft/accepted_per_round": 0.0}


def test_counts_are_of_all_workers_since_the_last_row():
    metrics = DraftMetrics()
    metrics.heard(worker("a", 1, drafted=10, accepted=4, rounds=2, drafted_own=10, accepted_own=4, failures=0))
    metrics.heard(worker("b", 2, drafted=10, accepted=8, rounds=4, drafted_sibling=10, accepted_sibling=8, failures=1))
    assert metrics.since_last() == {
        "draft/acceptance": 0.6,
        "draft/accepted_per_round": 2.0,
        "draft/failures": 1.0,
        "draft/acceptance_own": 0.4,
        "draft/acceptance_sibling": 0.8,
    }
    metrics.heard(worker("a", 1, drafted=20, accepted=14, rounds=7, drafted_own=20, accepted_own=14, failures=0))
    assert metrics.since_last() == {
        "draft/acceptance": 1.0,
        "draft/accepted_per_round": 2.0,
        "draft/failures": 0.0,
        "draft/acceptance_own": 1.0,
    }


def test_a_worker_that_was_started_again_counts_from_its_own_start():
    metrics = DraftMetrics()
    metrics.heard(worker("a", 1, drafted=10, accepted=10, rounds=5))
    metrics.since_last()
    metrics.heard(worker("a", 9, drafted=4, accepted=2, rounds=1))
    row = metrics.since_last()
    assert (row["draft/acceptance"], row["draft/accepted_per_round"]) == (0.5, 2.0)
