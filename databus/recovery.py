"""A broker's state from its journal: the records, folded in their order, into a state that is as new."""

import time
from collections.abc import Iterable

from databus.batches import Waiting
from databus.groups import decode_group
from databus.journal import JournalDamaged, JournalEntry
from databus.records import BatchCut, GroupCompleted, GroupLeased, GroupMoved, HistorySaved, StateSaved, StepTaken
from databus.result_desk import ResultDesk
from databus.retention import Retention
from databus.run_state import RunState
from databus.snapshot import load_copy, load_history, load_state
from databus.step_desk import StepDesk


class Recovery:
    """Does with each record what the broker did when it wrote it, but says nothing and writes nothing."""

    def __init__(self, state: RunState, results: ResultDesk, steps: StepDesk, retention: Retention) -> None:
        self._state = state
        self._results = results
        self._steps = steps
        self._retention = retention
        self._is_first = True
        self._is_loading = False
        """What follows a saved state whose past is gone is the only source of what it says."""
        self._copies: dict[str, int] = {}

    def fold(self, entries: Iterable[JournalEntry]) -> None:
        """Raises: JournalDamaged for a record that cannot have been written after those before it."""
        for item in entries:
            try:
                self._take(item)
            except (AssertionError, KeyError, ValueError) as error:
                place = item.place
                raise JournalDamaged(
                    f"segment {place.segment}, byte {place.offset}: {type(item.record).__name__} does not follow from "
                    f"what was written before: {error}"
                ) from error
            self._is_first = False

    def _take(self, item: JournalEntry) -> None:
        match item.record:
            case StateSaved() as record:
                self._saved(record, item.place.segment)
            case HistorySaved() as record:
                if self._is_loading and self._state.history is not None:
                    load_history(self._state.history, record, item.frames)
            case GroupLeased() as record:
                self._leased(record)
            case GroupCompleted(copied=True) as record:
                self._copied(record, item)
            case GroupCompleted() as record:
                self._completed(record, item)
            case GroupMoved() as record:
                self._moved(record)
            case BatchCut() as record:
                self._cut(record)
            case StepTaken() as record:
                batch = self._state.batch
                if batch is None or batch.step != record.step:
                    raise ValueError(f"step {record.step} was taken, its batch is not under way")
                self._steps.take_step(batch, record.metrics)

    def _saved(self, record: StateSaved, segment: int) -> None:
        self._is_loading, self._copies = self._is_first, {}
        if self._is_loading:
            load_state(self._state, record)
        self._retention.found(record, segment)

    def _copied(self, record: GroupCompleted, item: JournalEntry) -> None:
        queue = self._state.queue
        if self._is_loading:
            load_copy(self._state, record, item)
            return
        self._copies[record.group_id] = item.place.pack()
        if len(self._copies) == len(queue):
            queue.relocate(self._copies)

    def _leased(self, record: GroupLeased) -> None:
        state = self._state
        entry = state.ledger.lease()
        if entry.group_id != record.group_id:
            raise ValueError(f"group {record.group_id} was leased, {entry.group_id} was next")
        state.add_lease(entry.group_id, entry.cursor, record.worker, time.monotonic())

    def _completed(self, record: GroupCompleted, item: JournalEntry) -> None:
        state = self._state
        entry, held = state.ledger.get(record.group_id), state.leases.get(record.group_id)
        if entry is None or held is None:
            raise ValueError(f"group {record.group_id} was completed, and is not open")
        group = decode_group(record.columns, item.frames)
        for other in state.ledger.complete(entry):
            state.leases.drop(other.group_id)
        state.leases.drop(entry.group_id)
        self._results.take_in(entry, held.prompt, group)
        state.queue.add(
            Waiting(
                entry, group, record.reward_names, held.prompt.prompt, record.columns, item.frames, item.place.pack()
            )
        )

    def _moved(self, record: GroupMoved) -> None:
        state = self._state
        entry = state.ledger.get(record.group_id)
        if entry is None and record.state == "expired":
            return  # another attempt of its cursor had been completed, so it was forgotten already
        if entry is None:
            raise ValueError(f"group {record.group_id} became {record.state}, and is not open")
        if record.state == "expired":
            state.ledger.expire(entry)
            state.leases.expire(record.group_id)
            return
        state.queue.remove(record.group_id)
        state.leases.drop(record.group_id)
        if record.requeued:
            state.ledger.requeue(entry)
        else:
            state.ledger.settle(entry, record.state)

    def _cut(self, record: BatchCut) -> None:
        self._state.batch = self._state.queue.take(record.step, record.group_ids)
