"""Who of the workers is leased to: slow ones are sent away, spares stand in for those who are missing."""

import logging
from collections.abc import Sequence

from databus.messages import Drain, Leaving
from databus.peers import Peer
from databus.run_state import RunState
from databus.slowness import lagging, lagging_since, median_of_others, slowest

logger = logging.getLogger(__name__)


class Staffing:
    """drained: workers that were told to leave, and why, until one of that name is back."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._lagging_since: dict[str, float] = {}
        self._wanted = 0
        self.drained: dict[str, str] = {}

    def joined(self, worker: Peer) -> None:
        self.drained.pop(worker.name, None)
        self._post_spares()  # at once: whoever stood in for it is not to get another lease

    def leaving(self, worker: Peer, message: Leaving) -> None:
        logger.info("%s is leaving: %s", worker.name, message.reason)
        worker.standing = "leaving"

    def tick(self, now: float) -> None:
        self._drain_slow(now)
        self._post_spares()

    def _post_spares(self) -> None:
        workers = self._state.peers.workers()
        self._wanted = max(self._wanted, num_regular(workers))
        for worker, on_duty in zip(workers, spares_on_duty(workers, self._wanted), strict=True):
            if worker.hello.spare and worker.standing != "leaving":
                worker.standing = "working" if on_duty else "spare"

    def _drain_slow(self, now: float) -> None:
        bus = self._state.config.bus
        rates = {
            worker.name: rate
            for worker in self._state.peers.workers()
            if worker.standing == "working" and (rate := worker.speed.working_tokens_per_s) is not None
        }
        self._lagging_since = lagging_since(self._lagging_since, lagging(rates, bus.slow_fraction), now)
        name = slowest(self._lagging_since, rates, now, bus.slow_s)
        worker = None if name is None else self._state.peers.get(name)
        if worker is not None:
            self._drain(worker, rates[worker.name], median_of_others(rates, worker.name))

    def _drain(self, worker: Peer, rate: float, usual: float) -> None:
        reason = f"slow: {rate:.0f} tokens/s, the others' median is {usual:.0f}"
        logger.warning("%s is sent away: %s", worker.name, reason)
        self._state.send(worker.name, Drain(reason=reason))
        self._state.metrics.slow(worker.name, rate)
        self.drained[worker.name] = reason
        worker.standing = "leaving"


def num_regular(workers: Sequence[Peer]) -> int:
    """Workers that are no spares and stay."""
    return sum(not worker.hello.spare and worker.standing != "leaving" for worker in workers)


def spares_on_duty(workers: Sequence[Peer], wanted: int) -> list[bool]:
    """For each worker whether it is a spare that is needed: as many as regular ones are missing, first come first.

    Args: wanted: how many regular workers there have been at once.
    """
    missing = wanted - num_regular(workers)
    needed: list[bool] = []
    for worker in workers:
        is_free = worker.hello.spare and worker.standing != "leaving"
        needed.append(is_free and sum(needed) < missing)
    return needed
