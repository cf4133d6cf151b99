"""What the broker writes down: everything that changes the ledger becomes a record."""

import time
from collections.abc import Callable, Sequence

from databus.batches import CutBatch
from databus.codec import Frame
from databus.config import BrokerConfig
from databus.journal import Journal, JournalEntry, Place
from databus.ledger import Entry, State
from databus.messages import Completed, StepDone
from databus.records import (
    BatchCut,
    BrokerEnded,
    BrokerStarted,
    GroupCompleted,
    GroupLeased,
    GroupMoved,
    Record,
    StepTaken,
)

Listener = Callable[[Record], None]
"""Hears of every record as it is made, which is before it is durable; it must not raise, nor take long."""


class Chronicle:
    """Records of what happens, in their order, for the journal and for a listener, if there are any."""

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener
        self._journal: Journal | None = None

    def write_to(self, journal: Journal | None) -> None:
        """From here on; what is replayed from a journal is not written to it again."""
        self._journal = journal

    def started(self, config: BrokerConfig) -> None:
        record = BrokerStarted(
            run_id=config.run_id,
            steps=config.steps,
            group_size=config.group_size,
            batch_groups=config.batch_groups,
            max_staleness=config.max_staleness,
            stale_policy=config.stale_policy,
            max_tokens=config.max_tokens,
            time_s=time.time(),
        )
        self._write(record)

    def ended(self, ok: bool, reason: str) -> None:
        self._write(BrokerEnded(ok=ok, reason=reason, time_s=time.time()))

    def leased(self, entry: Entry, worker: str, predicted_tokens: int) -> None:
        record = GroupLeased(
            group_id=entry.group_id,
            cursor=entry.cursor,
            attempt=entry.attempt,
            worker=worker,
            time_s=time.time(),
            predicted_tokens=predicted_tokens,
        )
        self._write(record)

    def completed(self, message: Completed, frames: Sequence[Frame], worker: str) -> int:
        """Returns: the packed place of the record; -1 where there is no journal."""
        record = GroupCompleted(
            group_id=message.group_id,
            worker=worker,
            columns=message.columns,
            reward_names=message.reward_names,
            time_s=time.time(),
            generate_s=message.generate_s,
            score_s=message.score_s,
        )
        place = self._write(record, frames)
        return -1 if place is None else place.pack()

    def read(self, place: int) -> JournalEntry:
        """What `completed` wrote, once it is durable. Raises: JournalDamaged."""
        assert self._journal is not None
        return self._journal.read(Place.unpack(place))

    def moved(self, entry: Entry, state: State) -> None:
        """For `Ledger.on_transition`: the other transitions have records that say more."""
        if state == "expired" or state == "filtered" or state == "failed":
            self._write(GroupMoved(group_id=entry.group_id, state=state, time_s=time.time()))

    def stale(self, entry: Entry, requeued: bool) -> None:
        self._write(GroupMoved(group_id=entry.group_id, state="stale", requeued=requeued, time_s=time.time()))

    def cut(self, batch: CutBatch) -> None:
        group_ids = tuple(each.entry.group_id for each in batch.groups)
        self._write(BatchCut(step=batch.step, group_ids=group_ids, time_s=time.time()))

    def stepped(self, message: StepDone) -> None:
        self._write(StepTaken(step=message.step, metrics=message.metrics, time_s=time.time()))

    def _write(self, record: Record, frames: Sequence[Frame] = ()) -> Place | None:
        if self._listener is not None:
            self._listener(record)
        return None if self._journal is None else self._journal.append(record, frames)
