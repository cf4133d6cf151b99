"""How long each part of the reward takes, and how often it fails, for a step's row."""

from databus.peers import Peer
from databus.worker_counters import WorkerCounters


class ScoringMetrics:
    """From `Heartbeat.scoring`: NAME.scored, NAME.failed, NAME.time_s."""

    def __init__(self) -> None:
        self._counters = WorkerCounters()

    def heard(self, peer: Peer) -> None:
        self._counters.heard(peer, peer.beat.scoring)

    def since_last(self) -> dict[str, float]:
        """`scoring/NAME_s` a completion and `scoring/NAME_failure_rate`, of parts that were called."""
        new = self._counters.since_last()
        row: dict[str, float] = {}
        for part in dict.fromkeys(key.rpartition(".")[0] for key in new):
            scored, failed, time_s = (new.get(f"{part}.{what}", 0.0) for what in ("scored", "failed", "time_s"))
            if scored > 0:
                row[f"scoring/{part}_s"] = time_s / scored
            if scored + failed > 0:
                row[f"scoring/{part}_failure_rate"] = failed / (scored + failed)
        return row
