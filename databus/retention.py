"""Retention: with each checkpoint the journal begins a segment to go on from; what no checkpoint needs goes."""

from databus.group_commit import GroupCommit
from databus.messages import Position
from databus.records import StateSaved
from databus.run_state import RunState
from databus.snapshot import saved_records


class Retention:
    """Knows which segment begins with the state of which step, and what that was."""

    def __init__(self, state: RunState, commit: GroupCommit, keep: bool = False) -> None:
        """Args: keep: all segments."""
        self._state = state
        self._commit = commit
        self._keep = keep
        self._segments: dict[int, int] = {}
        self._positions: dict[int, Position] = {}

    def save(self, step: int) -> None:
        """Begin a segment with the state after `step` steps, unless there is one, the run is past it, or no room."""
        state = self._state
        if step in self._segments or state.step != step or state.batch is not None:
            return
        records = saved_records(state)
        places = self._commit.roll(records)
        if places is None:
            return
        waiting = [each.entry.group_id for each in state.queue]
        state.queue.relocate(dict(zip(waiting, (place.pack() for place in places[1:]), strict=False)))
        head = records[0][0]
        assert isinstance(head, StateSaved)
        self.found(head, places[0].segment)

    def found(self, saved: StateSaved, segment: int) -> None:
        """This segment begins with that state."""
        self._segments[saved.step] = segment
        self._positions[saved.step] = Position(
            step=saved.step,
            next_cursor=saved.next_cursor,
            pending=saved.pending,
            counts=saved.counts,
            scheduling=saved.scheduling,
        )

    def position(self, step: int) -> Position | None:
        """Where the data stood after `step` steps, if that was saved: a learner that was killed before its checkpoint
        was complete takes steps again, and asks for a position that the run is past."""
        return self._positions.get(step)

    def drop_before(self, step: int) -> None:
        """Nobody will ask for the batch of an earlier step."""
        reached = [saved for saved in self._segments if saved <= step]
        if self._keep or not reached:
            return
        oldest = max(reached)
        self._commit.drop_before(self._segments[oldest])
        for gone in [saved for saved in self._segments if saved < oldest]:
            del self._segments[gone], self._positions[gone]
        trained = self._state.trained
        for gone in [taken for taken in trained if taken < oldest]:
            del trained[gone]
