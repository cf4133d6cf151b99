"""What the broker writes down, before it says it to anybody.

Everything that changes the ledger becomes a record; once a turn they are made durable together, and only then the
messages of that turn leave (`databus.outbox`). Where the disk is full nothing leaves until there is room again.
"""

import logging
import time
from collections.abc import Sequence

from databus.batches import CutBatch
from databus.codec import Frame
from databus.journal import DiskFull, Journal
from databus.ledger import Entry, State
from databus.messages import Completed, StepDone
from databus.records import BatchCut, GroupCompleted, GroupLeased, GroupMoved, Record, StepTaken

logger = logging.getLogger(__name__)

TRY_AGAIN_S = 1.0


class Chronicle:
    """The journal of a broker; without one, nothing. disk_full: why the last commit failed, "" if it did not."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._try_at = 0.0
        self.disk_full = ""

    def leased(self, entry: Entry, worker: str) -> None:
        self._write(GroupLeased(group_id=entry.group_id, cursor=entry.cursor, attempt=entry.attempt, worker=worker))

    def completed(self, message: Completed, frames: Sequence[Frame], worker: str) -> None:
        record = GroupCompleted(
            group_id=message.group_id, worker=worker, columns=message.columns, reward_names=message.reward_names
        )
        self._write(record, frames)

    def moved(self, entry: Entry, state: State) -> None:
        """For `Ledger.on_transition`: the other transitions have records that say more."""
        if state == "expired" or state == "filtered" or state == "failed":
            self._write(GroupMoved(group_id=entry.group_id, state=state))

    def stale(self, entry: Entry, requeued: bool) -> None:
        self._write(GroupMoved(group_id=entry.group_id, state="stale", requeued=requeued))

    def cut(self, batch: CutBatch) -> None:
        self._write(BatchCut(step=batch.step, group_ids=tuple(each.entry.group_id for each in batch.groups)))

    def stepped(self, message: StepDone) -> None:
        self._write(StepTaken(step=message.step, metrics=message.metrics))

    def _write(self, record: Record, frames: Sequence[Frame] = ()) -> None:
        if self._journal is not None:
            self._journal.append(record, frames)

    def commit(self) -> bool:
        """Make all of it durable. False while the disk is full: it is tried again once a second."""
        now = time.monotonic()
        if self._journal is None:
            return True
        if self.disk_full and now < self._try_at:
            return False
        try:
            self._journal.commit()
        except DiskFull as error:
            if not self.disk_full:
                logger.warning("nothing is acknowledged, leased or handed out any more: %s", error)
            self.disk_full, self._try_at = str(error), now + TRY_AGAIN_S
            return False
        if self.disk_full:
            logger.warning("there is room again: going on")
            self.disk_full = ""
        return True

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
