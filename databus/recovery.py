"""A broker's state from its journal: the records, folded in their order, into a state that is as new."""

import time
from collections.abc import Iterable

from databus.batches import Waiting
from databus.codec import decode_columns
from databus.groups import group_from_columns
from databus.journal import JournalDamaged, JournalEntry
from databus.lease_desk import LeaseDesk
from databus.records import BatchCut, GroupCompleted, GroupLeased, GroupMoved, StepTaken
from databus.run_state import RunState
from databus.step_desk import StepDesk


class Recovery:
    """Does with each record what the broker did when it wrote it, but says nothing and writes nothing."""

    def __init__(self, state: RunState, leases: LeaseDesk, steps: StepDesk) -> None:
        self._state = state
        self._leases = leases
        self._steps = steps

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

    def _take(self, item: JournalEntry) -> None:
        match item.record:
            case GroupLeased() as record:
                self._leased(record)
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

    def _leased(self, record: GroupLeased) -> None:
        state = self._state
        entry = state.ledger.lease()
        if entry.group_id != record.group_id:
            raise ValueError(f"group {record.group_id} was leased, {entry.group_id} was next")
        prompt = state.prompts.get(entry.cursor)
        predicted = 0 if state.scheduler is None else state.scheduler.predicted_tokens(entry.cursor)
        state.leases.add(entry.group_id, record.worker, prompt, time.monotonic(), predicted * state.config.group_size)

    def _completed(self, record: GroupCompleted, item: JournalEntry) -> None:
        state = self._state
        entry, held = state.ledger.get(record.group_id), state.leases.get(record.group_id)
        if entry is None or held is None:
            raise ValueError(f"group {record.group_id} was completed, and is not open")
        group = group_from_columns(decode_columns(record.columns, item.frames))
        for other in state.ledger.complete(entry):
            state.leases.drop(other.group_id)
        state.leases.drop(entry.group_id)
        self._leases.take_in(entry, held.prompt, group)
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
