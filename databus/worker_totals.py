"""What all workers have counted together, from counters that each keeps since its own start."""

from collections import Counter
from collections.abc import Mapping

from databus.peers import Peer


class WorkerTotals:
    """Sums over workers; one that has left keeps its share, and one that returns under its name starts anew."""

    def __init__(self) -> None:
        self._counters: dict[str, Mapping[str, float]] = {}
        self._reported: Counter[str] = Counter()

    def heard(self, peer: Peer, counters: Mapping[str, float]) -> None:
        """Args: counters: of the peer's newest heartbeat."""
        self._counters[f"{peer.name}/{peer.hello.pid}"] = counters

    def since_last(self) -> dict[str, float]:
        """What every counter has grown by since the last call; empty where no worker has any."""
        totals: Counter[str] = Counter()
        for counters in self._counters.values():
            totals.update(counters)
        new = {name: totals[name] - self._reported[name] for name in totals}
        self._reported = totals
        return new
