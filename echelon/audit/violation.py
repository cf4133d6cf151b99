"""What an audit finds: violations, in the order in which the run committed them."""

from typing import Literal

from msgspec import Struct

from databus.journal import Place

Category = Literal[
    "damage",
    "terms",
    "group_id",
    "edge",
    "trained_twice",
    "lost",
    "copy",
    "content",
    "staleness",
    "batch",
    "step",
    "state",
    "metrics",
    "checkpoint",
]
"""damage: a record cannot be read. terms: who wrote the journal, and when. group_id: not the hash of (run id, cursor,
attempt). edge: a transition that the ledger does not have. lost: a completed group that no longer has its turn.
copy: differs from its original. content: columns that no group can have. staleness: a lag outside the bound.
batch: of a wrong size, or of groups that were not there to be trained. step: not the next one. state: what the broker
saved is not what the records before say. metrics: metrics.jsonl differs. checkpoint: files or position differ.
"""


class Violation(Struct, frozen=True, kw_only=True):
    """message: one line. segment, offset: the journal's record; None for what was found elsewhere."""

    category: Category
    message: str
    segment: int | None = None
    offset: int | None = None
    group_id: str | None = None
    step: int | None = None

    def line(self) -> str:
        parts = [self.category]
        if self.segment is not None:
            parts.append(f"segment {self.segment}, byte {self.offset}")
        if self.step is not None:
            parts.append(f"step {self.step}")
        if self.group_id is not None:
            parts.append(f"group {self.group_id}")
        return f"{', '.join(parts)}: {self.message}"


class Findings:
    """Collects violations; `place` is the record that is being looked at."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.place: Place | None = None

    def add(self, category: Category, message: str, *, group_id: str | None = None, step: int | None = None) -> None:
        segment, offset = self.place or (None, None)
        self.violations.append(
            Violation(category=category, message=message, segment=segment, offset=offset, group_id=group_id, step=step)
        )
