"""What workers have counted since their start, as what is new since the last step."""

from collections import defaultdict
from collections.abc import Mapping

from databus.peers import Peer


class WorkerCounters:
    """Sums over workers; one that has left keeps its share, and one that returns under its name starts anew."""

    def __init__(self) -> None:
        self._counters: dict[str, Mapping[str, float]] = {}
        self._reported: defaultdict[str, float] = defaultdict(float)

    def heard(self, peer: Peer, counters: Mapping[str, float]) -> None:
        self._counters[f"{peer.name}/{peer.hello.pid}"] = counters

    def since_last(self) -> dict[str, float]:
        totals: defaultdict[str, float] = defaultdict(float)
        for counters in self._counters.values():
            for name, count in counters.items():
                totals[name] += count
        new = {name: totals[name] - self._reported[name] for name in totals}
        self._reported = totals
        return new
