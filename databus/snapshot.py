"""A run's state as records that a segment of the journal begins with, and the state that such records make."""

import time
from collections.abc import Sequence

from databus.batches import Waiting
from databus.codec import Frame
from databus.groups import decode_group
from databus.history import CompletionHistory, decode_history, encode_history
from databus.journal import JournalEntry
from databus.ledger import Entry
from databus.records import GroupCompleted, HistorySaved, OpenGroup, Record, StateSaved
from databus.run_state import RunState

Records = list[tuple[Record, Sequence[Frame]]]


def saved_records(state: RunState) -> Records:
    """`StateSaved`, a copy of each group that waits, and the histories. No batch may be under way."""
    copies = [_copy(waiting) for waiting in state.queue]
    ledger = state.ledger
    head = StateSaved(
        step=state.step,
        next_cursor=ledger.next_cursor,
        num_leases=ledger.num_leases,
        pending=ledger.pending_at(state.step),
        counts=ledger.counts(),
        groups=tuple(_open_group(entry, state) for entry in ledger.open_entries()),
        num_copies=len(copies),
        to_lease=ledger.to_lease,
        scheduling=b"" if state.scheduler is None else state.scheduler.save(),
    )
    return [(head, ()), *copies, *_histories(state.history)]


def _copy(waiting: Waiting) -> tuple[GroupCompleted, Sequence[Frame]]:
    columns, frames = waiting.encoded()
    record = GroupCompleted(
        group_id=waiting.entry.group_id, worker="", columns=columns, reward_names=waiting.reward_names, copied=True
    )
    return record, frames


def _open_group(entry: Entry, state: RunState) -> OpenGroup:
    held = state.leases.get(entry.group_id)
    assert entry.state in ("leased", "completed", "expired")
    return OpenGroup(
        group_id=entry.group_id,
        cursor=entry.cursor,
        attempt=entry.attempt,
        order=entry.order,
        next_attempt=entry.next_attempt,
        state=entry.state,
        worker="" if held is None else held.worker,
    )


def _histories(history: CompletionHistory | None) -> Records:
    records: Records = []
    for key, completions in () if history is None else history.items():
        columns, frames = encode_history(completions)
        records.append((HistorySaved(problem_key=key, columns=columns), frames))
    return records


def load_state(state: RunState, saved: StateSaved) -> None:
    """Into a state that is as new. The groups that wait follow, by `load_copy`."""
    state.step = saved.step
    if state.scheduler is not None:
        state.scheduler.load(saved.scheduling)
    entries = [Entry(g.group_id, g.cursor, g.attempt, g.order, g.next_attempt, g.state) for g in saved.groups]
    state.ledger.load(entries, saved.next_cursor, saved.to_lease, saved.counts, saved.num_leases)
    for group in saved.groups:
        if group.state != "completed":
            state.add_lease(group.group_id, group.cursor, group.worker, time.monotonic())
        if group.state == "expired":
            state.leases.expire(group.group_id)


def load_copy(state: RunState, record: GroupCompleted, item: JournalEntry) -> None:
    """Raises: KeyError where no such group waits in the state that was loaded."""
    entry = state.ledger.get(record.group_id)
    if entry is None:
        raise KeyError(record.group_id)
    state.queue.add(
        Waiting(
            entry,
            decode_group(record.columns, item.frames),
            record.reward_names,
            state.prompts.get(entry.cursor).prompt,
            record.columns,
            item.frames,
            item.place.pack(),
        )
    )


def load_history(history: CompletionHistory, record: HistorySaved, frames: Sequence[Frame]) -> None:
    history.load(record.problem_key, decode_history(record.columns, frames))
