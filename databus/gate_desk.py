"""What becomes of versions that an engine's mismatch gate has refused: the old one serves on, as long as that helps."""

import logging
from collections.abc import Mapping

from databus.codec import MalformedMessage
from databus.messages import VersionApplied, VersionRefused
from databus.peers import Peer
from databus.run_state import RunFailed, RunState

logger = logging.getLogger(__name__)

MAX_REFUSED = 3
"""Versions in a row that somebody refuses and nobody serves."""


class GateDesk:
    """Says what was refused, and ends the run where it would only wait."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._served = -1
        self._in_a_row: dict[int, str] = {}

    def applied(self, message: VersionApplied) -> None:
        self._served = max(self._served, message.version)
        self._in_a_row = {version: why for version, why in self._in_a_row.items() if version > message.version}

    def refused(self, worker: Peer, message: VersionRefused) -> None:
        """Raises: MalformedMessage for a version it was not told of; RunFailed once too many were refused in a row."""
        version = message.version
        if version > self._state.newest_known:
            raise MalformedMessage(f"version {version} is refused, {self._state.newest_known} is the newest announced")
        if version <= max(worker.refused, worker.version):
            return  # a copy
        worker.refused = version
        self._state.refusal = (
            f"version {version} refused by {worker.name}, which serves version {worker.version} still: {message.reason}"
        )
        logger.warning("%s", self._state.refusal)
        self._state.metrics.refused(version, message.mismatch)
        if version > self._served:
            self._in_a_row[version] = message.reason
        if len(self._in_a_row) >= MAX_REFUSED:
            raise RunFailed(f"{_versions(self._in_a_row)} refused in a row, none served: {message.reason}")

    def check(self) -> None:
        """Call it once leases are given and a batch is cut, as far as they can be.

        Raises: RunFailed where nothing can be trained before a version is served, nor any published before that.
        """
        if not self._in_a_row:
            return
        self._drop_evaluation()
        if self._is_stuck():
            why = self._in_a_row[max(self._in_a_row)]
            raise RunFailed(
                f"{_versions(self._in_a_row)} refused, and max_staleness={self._state.config.max_staleness} leaves "
                f"nothing to train on without: {why}"
            )

    def _drop_evaluation(self) -> None:
        current = self._state.evaluations.current
        if current is not None and self._nobody_serves(current.version):
            logger.warning("version %d was refused by all workers: it is not evaluated", current.version)
            self._state.evaluations.drop(current.version)

    def _is_stuck(self) -> bool:
        """The learner waits, has published what it has, nothing is on its way to it, and no worker may begin anything.

        It asks for the next batch while it publishes the version that the last one gave.
        """
        state = self._state
        return (
            state.requested is not None
            and state.batch is None
            and state.newest is not None
            and state.newest >= state.step
            and not state.ledger.running
            and self._nobody_serves(state.newest)
            and not any(map(self._may_begin, state.peers.workers()))
        )

    def _may_begin(self, worker: Peer) -> bool:
        state = self._state
        capacity = state.gate.capacity(worker.version, state.accepted, running=0)
        return worker.version >= state.config.start_step and capacity > 0

    def _nobody_serves(self, version: int) -> bool:
        workers = self._state.peers.workers()
        return bool(workers) and all(worker.version < version <= worker.refused for worker in workers)


def _versions(refused: Mapping[int, str]) -> str:
    numbers = ", ".join(map(str, sorted(refused)))
    return f"version {numbers} was" if len(refused) == 1 else f"versions {numbers} were"
