"""A run as `echelon serve` follows it: an observer, who may ask what was published, and pull it."""

from pathlib import Path

from databus.errors import BusError, BusLost
from databus.messages import VersionAnnounced
from echelon.joining import find_run
from echelon.observer import Observer
from echelon.roles.worker import Membership, pull_through

OVER = ("finished", "failed")


class FollowedRun:
    """A `rollout.service.following.RunSource`."""

    def __init__(self, name: str, run: Membership) -> None:
        """Connects, which may take a moment. Raises: BusError where nobody answers."""
        self.name = name
        self.dtype: str = run.config.rollout.dtype
        self.pull = pull_through(run.bus)
        self._newest: VersionAnnounced | None = None
        self._observer = Observer(run.bus)
        if self._observer.lost:
            self._observer.close()
            raise BusError(f"the run at {name} does not answer")

    def newest(self) -> VersionAnnounced | None:
        """What was published last. Raises: BusLost, one line, once the run is over or gone."""
        status = self._observer.poll()
        if status is not None:
            self._newest = status.published
            if status.phase in OVER:
                raise BusLost(f"the run has {status.phase}")
        if self._observer.lost:
            raise BusLost("the run is gone")
        return self._newest

    def close(self) -> None:
        self._observer.close()


def follow_run(target: str, keys: str | None) -> FollowedRun:
    """Args: target: the run's folder or its bus address. Raises: ValueError, one line; BusError."""
    return FollowedRun(target, find_run(target, None if keys is None else Path(keys).expanduser().resolve()))
