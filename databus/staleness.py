"""The staleness bound: how many groups may be begun, and what a batch may hold."""

from dataclasses import dataclass, replace

import numpy as np

from databus.config import StalePolicy
from databus.groups import Group


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

    def is_fresh(self, group: Group, step: int) -> bool:
        """Has no loss-bearing token a lag above η at this step? False as well where no token bears loss."""
        oldest = group.oldest_loss_version()
        return oldest is not None and step - oldest <= self.max_staleness

    def admit(self, group: Group, step: int) -> Group | None:
        """The group as step `step` may train it; None where it has become stale.

        Under `mask` older tokens lose their loss, and the group is stale only once no token is left.
        """
        if self.is_fresh(group, step):
            return group
        if self.policy != "mask":
            return None
        fresh = (step - group.token_versions() <= self.max_staleness).astype(np.uint8)
        masked = replace(group, loss_mask=group.loss_mask * fresh)
        return masked if masked.loss_mask.any() else None
