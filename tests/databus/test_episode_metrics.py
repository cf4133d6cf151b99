from types import SimpleNamespace

from databus.episode_metrics import EpisodeMetrics
from databus.messages import Heartbeat


def worker(name: str, **episodes: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, hello=SimpleNamespace(pid=1), beat=Heartbeat(episodes=episodes))


def test_nothing_where_completions_are_of_one_turn():
    metrics = EpisodeMetrics()
    metrics.heard(worker("a"))
    assert metrics.since_last() == {}


def test_counts_are_of_all_workers_since_the_last_row():
    metrics = EpisodeMetrics()
    metrics.heard(worker("a", episodes=2, turns=5, truncated=1, tool_calls=3, tool_errors=1, tool_s=0.5))
    metrics.heard(worker("b", episodes=2, turns=3, truncated=0, tool_calls=1, tool_errors=0, tool_s=0.25))
    assert metrics.since_last() == {
        "environment/episodes": 4,
        "environment/truncated_episodes": 1,
        "environment/tool_calls": 4,
        "environment/tool_errors": 1,
        "environment/tool_s": 0.75,
        "environment/turns_mean": 2.0,
    }
    metrics.heard(worker("a", episodes=3, turns=6, truncated=2, tool_calls=3, tool_errors=1, tool_s=0.5))
    row = metrics.since_last()
    assert (row["environment/episodes"], row["environment/turns_mean"], row["environment/tool_calls"]) == (1, 1.0, 0)
    assert metrics.since_last()["environment/turns_mean"] == 0.0
