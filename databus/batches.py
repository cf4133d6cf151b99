"""Completed groups that wait for a batch, and the cut of one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from databus.codec import Frame, encode_columns
from databus.groups import Group
from databus.ledger import Entry
from databus.messages import Batch, BatchGroup
from databus.staleness import StalenessGate


@dataclass(frozen=True)
class Waiting:
    """A completed group: its place in the ledger, its data, the names of its reward's parts, and its prompt's text."""

    entry: Entry
    group: Group
    reward_names: tuple[str, ...]
    prompt: str


@dataclass(frozen=True)
class CutBatch:
    """The groups of step `step`, as they are trained."""

    step: int
    groups: tuple[Waiting, ...]

    def message(self, max_staleness: int) -> tuple[Batch, list[Frame]]:
        frames: list[Frame] = []
        heads: list[BatchGroup] = []
        for waiting in self.groups:
            columns, parts = encode_columns(waiting.group.columns())
            heads.append(BatchGroup(group_id=waiting.entry.group_id, columns=columns, first_frame=len(frames)))
            frames += parts
        return Batch(step=self.step, max_staleness=max_staleness, groups=tuple(heads)), frames


class BatchQueue:
    """Holds completed groups until a batch can be cut from them."""

    def __init__(self, gate: StalenessGate) -> None:
        self._gate = gate
        self._waiting: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: Waiting) -> None:
        self._waiting.append(waiting)

    def cut(self, step: int, on_stale: Callable[[Entry], None]) -> CutBatch | None:
        """The batch of `step`, oldest groups first; None while too few are fresh.

        Every group that this step may not train is taken out and given to `on_stale`: no later step could train it
        either. Under `mask`, tokens are masked in the batch alone.
        """
        fresh: list[Waiting] = []
        kept: list[Waiting] = []
        for waiting in sorted(self._waiting, key=_age):
            group = self._gate.admit(waiting.group, step)
            if group is None:
                on_stale(waiting.entry)
                continue
            kept.append(waiting)
            fresh.append(waiting if group is waiting.group else replace(waiting, group=group))
        size = self._gate.batch_groups
        if len(fresh) < size:
            self._waiting = kept
            return None
        self._waiting = kept[size:]
        for waiting in fresh[:size]:
            waiting.entry.step = step
        return CutBatch(step, tuple(fresh[:size]))


def _age(waiting: Waiting) -> tuple[int, int]:
    oldest = waiting.group.oldest_loss_version()
    return (-1 if oldest is None else oldest, waiting.entry.order)
