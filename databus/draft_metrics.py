"""How drafting goes, for a step's row: from what every worker has counted since its start to what is new."""

from collections.abc import Mapping

from databus.peers import Peer
from databus.worker_counters import WorkerCounters

PLAIN = ("propose_s", "refused", "failures", "malformed_histories")
"""Counters that are reported as they are, as the number since the last row."""


class DraftMetrics:
    """From `Heartbeat.drafting`."""

    def __init__(self) -> None:
        self._counters = WorkerCounters()

    def heard(self, peer: Peer) -> None:
        self._counters.heard(peer, peer.beat.drafting)

    def since_last(self) -> dict[str, float]:
        """`draft/acceptance`, `draft/accepted_per_round`, and, while anyone drafts, the rest."""
        new = self._counters.since_last()
        drafted, accepted, rounds = (new.get(name, 0.0) for name in ("drafted", "accepted", "rounds"))
        row = {
            "draft/acceptance": accepted / drafted if drafted > 0 else 0.0,
            "draft/accepted_per_round": accepted / rounds if rounds > 0 else 0.0,
        }
        row |= {f"draft/{name}": new[name] for name in PLAIN if name in new}
        return row | _acceptance_by_kind(new)


def _acceptance_by_kind(new: Mapping[str, float]) -> dict[str, float]:
    """By where a draft token came from (`own`, `sibling`, ...) and by its age; of kinds that were drafted."""
    kinds = [name.removeprefix("drafted_") for name, drafted in new.items() if name.startswith("drafted_") and drafted]
    return {f"draft/acceptance_{kind}": new.get(f"accepted_{kind}", 0.0) / new[f"drafted_{kind}"] for kind in kinds}
