"""Which workers are started again, how often, and which the broker has sent away."""

import time
from collections.abc import Mapping

from echelon.launch.base import RunningRole

MAX_RESTARTS = 3


class Replacements:
    """drained: workers that were sent away and are not back yet, with the broker's reason."""

    def __init__(self, patience_s: float) -> None:
        """Args: patience_s: how long one that was sent away may take to leave, before it is killed."""
        self.drained: Mapping[str, str] = {}
        self._patience_s = patience_s
        self._since: dict[str, float] = {}
        self._restarts: dict[str, int] = {}

    def take(self, drained: Mapping[str, str], children: Mapping[str, RunningRole]) -> None:
        """What the broker says; whoever does not leave is ended."""
        now = time.monotonic()
        self.drained = drained
        self._since = {name: self._since.get(name, now) for name in drained}
        for name, since in self._since.items():
            child = children.get(name)
            if child is not None and child.started < since and now - since > self._patience_s:
                child.kill()

    def may_restart(self, name: str) -> bool:
        return self._restarts.get(name, 0) < MAX_RESTARTS

    def restarted(self, name: str) -> int:
        """Counts; how often it has been by now."""
        self._restarts[name] = self._restarts.get(name, 0) + 1
        return self._restarts[name]
