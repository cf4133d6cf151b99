"""How episodes of several turns go, for a step's row."""

from databus.peers import Peer
from databus.worker_counters import WorkerCounters

PLAIN = {
    "episodes": "episodes",
    "truncated": "truncated_episodes",
    "tool_calls": "tool_calls",
    "tool_errors": "tool_errors",
    "tool_s": "tool_s",
}
"""Counters that are reported as the number since the last row, and under which name."""


class EpisodeMetrics:
    """From `Heartbeat.episodes`."""

    def __init__(self) -> None:
        self._counters = WorkerCounters()

    def heard(self, peer: Peer) -> None:
        self._counters.heard(peer, peer.beat.episodes)

    def since_last(self) -> dict[str, float]:
        """Nothing where completions are of one turn. Turns and episodes are counted as they end."""
        new = self._counters.since_last()
        if not new:
            return {}
        episodes = new.get("episodes", 0.0)
        row = {f"environment/{name}": new.get(counter, 0.0) for counter, name in PLAIN.items()}
        return row | {"environment/turns_mean": new.get("turns", 0.0) / episodes if episodes else 0.0}
