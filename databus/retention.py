"""Retention: with each checkpoint the journal begins a segment to go on from; what no checkpoint needs goes."""

from databus.group_commit import GroupCommit
from databus.history import CompletionHistory
from databus.run_state import RunState
from databus.snapshot import saved_records


class Retention:
    """Knows which segment begins with the state of which step."""

    def __init__(
        self, state: RunState, commit: GroupCommit, history: CompletionHistory | None, keep: bool = False
    ) -> None:
        """Args: keep: all segments."""
        self._state = state
        self._commit = commit
        self._history = history
        self._keep = keep
        self._segments: dict[int, int] = {}

    def save(self, step: int) -> None:
        """Begin a segment with the state after `step` steps, unless the run is past that or the disk is full."""
        state = self._state
        if state.step != step or state.batch is not None:
            return
        places = self._commit.roll(saved_records(state, self._history))
        if places is None:
            return
        waiting = [each.entry.group_id for each in state.queue]
        state.queue.relocate(dict(zip(waiting, (place.pack() for place in places[1:]), strict=False)))
        self.found(step, places[0].segment)

    def found(self, step: int, segment: int) -> None:
        """This segment begins with the state after `step` steps."""
        self._segments[step] = segment

    def drop_before(self, step: int) -> None:
        """Nobody will ask for the batch of an earlier step."""
        reached = [saved for saved in self._segments if saved <= step]
        if self._keep or not reached:
            return
        oldest = max(reached)
        self._commit.drop_before(self._segments[oldest])
        self._segments = {saved: segment for saved, segment in self._segments.items() if saved >= oldest}
        trained = self._state.trained
        for gone in [taken for taken in trained if taken < oldest]:
            del trained[gone]
