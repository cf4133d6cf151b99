"""Takes in the history that comes with a lease. It only makes drafts better, so a bad one never costs the lease."""

import logging
from collections.abc import Sequence

from databus.codec import Frame, MalformedMessage
from databus.history import PastCompletion, decode_history
from databus.messages import Lease

logger = logging.getLogger(__name__)


class HistoryReader:
    """malformed: how many leases came with a history that could not be read; the first of them is warned of."""

    def __init__(self) -> None:
        self.malformed = 0

    def read(self, lease: Lease, frames: Sequence[Frame]) -> tuple[PastCompletion, ...]:
        """Earlier completions of the lease's problem, newest last; none where they cannot be read."""
        try:
            return decode_history(lease.history, frames)
        except MalformedMessage as error:
            self.malformed += 1
            if self.malformed == 1:
                logger.warning("group %s is generated without its history: %s", lease.group_id, error)
            return ()
