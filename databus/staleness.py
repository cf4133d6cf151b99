"""The staleness bound: how many groups may be begun, and what a batch may hold."""

from dataclasses import dataclass, replace

import numpy as np

from databus.config import StalePolicy
from databus.groups import Group

LAG_BUCKETS = {"0": 0, "1": 1, "2": 2, "3to4": 3, "5to8": 5, "9plus": 9}
"""Name of each bucket of lags in metrics, and the smallest lag in it."""


@dataclass(frozen=True)
class StalenessGate:
    """max_staleness: η, in versions. batch_groups: B."""

    max_staleness: int
    batch_groups: int
    policy: StalePolicy

    def capacity(self, version: int, accepted: int, running: int) -> int:
        """How many more groups a worker that serves `version` may begin.

        The next group is the (accepted + running)-th of the run, so step (accepted + running) // B trains it, and that
        step is at most η after `version` only below (η + version + 1) · B.

        Args: accepted: groups trained, or completed and waiting. running: groups leased.
        Source: AReaL (arXiv:2505.24298), equation 3, with the worker's version: docs/decisions/002.
        """
        return (self.max_staleness + version + 1) * self.batch_groups - (accepted + running)

    def can_train(self, loss_versions: tuple[int, int] | None, step: int) -> bool:
        """May step `step` train a group whose loss-bearing tokens have versions from .. to (None: it has none)?

        Once it may not, no later step may.
        """
        if loss_versions is None:
            return False
        oldest, newest = loss_versions
        return step - (newest if self.policy == "mask" else oldest) <= self.max_staleness

    def admit(self, group: Group, step: int) -> Group | None:
        """The group as step `step` may train it; None where it has become stale.

        Under `mask` older tokens lose their loss, and the group is stale only once no token is left.
        """
        versions = group.loss_versions
        if versions is None or not self.can_train(versions, step):
            return None
        if step - versions[0] <= self.max_staleness:
            return group
        fresh = (step - group.token_versions() <= self.max_staleness).astype(np.uint8)
        return replace(group, loss_mask=group.loss_mask * fresh)
