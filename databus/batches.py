"""Completed groups that wait for a batch, and the cut of one."""

from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from databus.codec import Frame
from databus.groups import Group, encode_group
from databus.ledger import Entry
from databus.messages import Batch, BatchGroup, Column
from databus.staleness import StalenessGate


@dataclass(frozen=True)
class Waiting:
    """A completed group: its place in the ledger, its data, the names of its reward's parts, and its prompt's text.

    columns, frames: the data as it came in, and goes out again; none where it has been changed since.
    place: of its record in the journal (`databus.journal.Place.pack`), -1 where it has none.
    """

    entry: Entry
    group: Group
    reward_names: tuple[str, ...]
    prompt: str
    columns: tuple[Column, ...] = ()
    frames: Sequence[Frame] = ()
    place: int = -1

    def encoded(self) -> tuple[tuple[Column, ...], Sequence[Frame]]:
        return (self.columns, self.frames) if self.columns else encode_group(self.group)


@dataclass(frozen=True)
class CutBatch:
    """The groups of step `step`, as they are trained."""

    step: int
    groups: tuple[Waiting, ...]

    def message(self, max_staleness: int) -> tuple[Batch, list[Frame]]:
        frames: list[Frame] = []
        heads: list[BatchGroup] = []
        for waiting in self.groups:
            columns, parts = waiting.encoded()
            heads.append(BatchGroup(group_id=waiting.entry.group_id, columns=columns, first_frame=len(frames)))
            frames += parts
        return Batch(step=self.step, max_staleness=max_staleness, groups=tuple(heads)), frames


class BatchQueue:
    """Holds completed groups until a batch can be cut from them."""

    def __init__(self, gate: StalenessGate) -> None:
        self._gate = gate
        self._waiting: list[Waiting] = []
        """By age, so that looking for stale groups costs a few comparisons a group, not a sort."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: Waiting) -> None:
        insort(self._waiting, waiting, key=_age)

    def remove(self, group_id: str) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting.entry.group_id != group_id]

    def __iter__(self) -> Iterator[Waiting]:
        """Oldest first."""
        return iter(self._waiting)

    def relocate(self, places: Mapping[str, int]) -> None:
        """Their records lie elsewhere in the journal now. Args: places: packed, by group id."""
        self._waiting = [replace(each, place=places[each.entry.group_id]) for each in self._waiting]

    def take(self, step: int, group_ids: Sequence[str]) -> CutBatch:
        """The batch of `step` as it was cut once. Raises: KeyError for a group that does not wait."""
        waiting = {each.entry.group_id: each for each in self._waiting}
        batch = CutBatch(step, tuple(self._admitted(waiting.pop(group_id), step) for group_id in group_ids))
        self._waiting = [each for each in self._waiting if each.entry.group_id in waiting]
        return batch

    def cut(self, step: int, on_stale: Callable[[Entry], None]) -> CutBatch | None:
        """The batch of `step`, oldest groups first; None while too few are fresh.

        Every group that this step may not train is taken out and given to `on_stale`: no later step could train it
        either. Nobody looks before there are enough groups for a batch: this is asked every turn. Under `mask`, tokens
        are masked in the batch alone.
        """
        size = self._gate.batch_groups
        if len(self._waiting) < size:
            return None
        fresh: list[Waiting] = []
        for waiting in self._waiting:
            if self._gate.can_train(waiting.group.loss_versions, step):
                fresh.append(waiting)
            else:
                on_stale(waiting.entry)
        if len(fresh) < size:
            self._waiting = fresh
            return None
        self._waiting = fresh[size:]
        return CutBatch(step, tuple(self._admitted(waiting, step) for waiting in fresh[:size]))

    def _admitted(self, waiting: Waiting, step: int) -> Waiting:
        """Checked once more, on the tokens themselves: this is where the bound is enforced."""
        group = self._gate.admit(waiting.group, step)
        assert group is not None, f"group {waiting.entry.group_id} is stale at step {step}"
        waiting.entry.step = step
        return waiting if group is waiting.group else replace(waiting, group=group, columns=(), frames=())


def _age(waiting: Waiting) -> tuple[int, int]:
    oldest, _ = waiting.group.loss_versions or (-1, -1)
    return oldest, waiting.entry.cursor  # not by lease: a run that was interrupted leases some cursors again
