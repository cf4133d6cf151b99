"""Everything that a journal says, in the order in which it happened.

A broker's state is these records, folded; `echelon audit` proves a run from them, `echelon replay` trains from them.
New fields go last, with defaults, so that an older journal can still be read.
"""

from typing import Literal

from msgspec import Struct

from databus.messages import Column

FORMAT = 1


class BrokerStarted(Struct, frozen=True, kw_only=True, tag=True):
    """A broker began to write: of a new run, or after a crash or a resumption. The terms that hold from here on."""

    run_id: str
    steps: int
    group_size: int
    batch_groups: int
    max_staleness: int
    stale_policy: str
    max_tokens: int
    format: int = FORMAT
    time_s: float = 0.0  # since the epoch


class GroupLeased(Struct, frozen=True, kw_only=True, tag=True):
    """predicted_tokens: of a completion, 0 where not known. time_s, here and below: since the epoch, 0 where an earlier
    version wrote the record.
    """

    group_id: str
    cursor: int
    attempt: int
    worker: str
    time_s: float = 0.0
    predicted_tokens: int = 0


class GroupCompleted(Struct, frozen=True, kw_only=True, tag=True):
    """A group was taken in. Its columns, as of `databus.groups.encode_group`, are the record's frames.

    copied: the group came in earlier and waits still; it is here again so that earlier segments can be dropped.
    generate_s, score_s: as its worker measured them; 0 in copies, and where an earlier version wrote the record.
    """

    group_id: str
    worker: str
    columns: tuple[Column, ...]
    reward_names: tuple[str, ...] = ()
    copied: bool = False
    time_s: float = 0.0
    generate_s: float = 0.0
    score_s: float = 0.0


class GroupMoved(Struct, frozen=True, kw_only=True, tag=True):
    """A group left `leased` or `completed` other than by completion and training.

    requeued: its cursor is to be leased again although this group is settled.
    """

    group_id: str
    state: Literal["expired", "stale", "filtered", "failed"]
    reason: str = ""
    requeued: bool = False
    time_s: float = 0.0


class BatchCut(Struct, frozen=True, kw_only=True, tag=True):
    """Step `step` trains these groups, in this order; under `mask`, without their tokens older than the bound."""

    step: int
    group_ids: tuple[str, ...]
    time_s: float = 0.0


class StepTaken(Struct, frozen=True, kw_only=True, tag=True):
    """Step `step` is trained, and with it its batch's groups. metrics: as the learner reported them."""

    step: int
    metrics: dict[str, float]
    time_s: float = 0.0


class OpenGroup(Struct, frozen=True, kw_only=True):
    """A group that is not settled; as `databus.ledger.Entry`."""

    group_id: str
    cursor: int
    attempt: int
    order: int
    next_attempt: int
    state: Literal["leased", "completed", "expired"]
    worker: str = ""


class StateSaved(Struct, frozen=True, kw_only=True, tag=True):
    """First record of a segment, written as a checkpoint of `step` is made: from here one can go on without what lies
    before. Its completed groups follow at once as copies, as many as `num_copies`.

    pending: as `databus.messages.Position`. to_lease: (cursor, attempt) of leases that come before any new cursor.
    counts: the ledger's totals. scheduling: of `Scheduler.save`. num_leases: `order` of the next lease.
    """

    step: int
    next_cursor: int
    num_leases: int
    pending: tuple[tuple[int, int], ...]
    counts: dict[str, int]
    groups: tuple[OpenGroup, ...]
    num_copies: int
    to_lease: tuple[tuple[int, int], ...] = ()
    scheduling: bytes = b""


class HistorySaved(Struct, frozen=True, kw_only=True, tag=True):
    """After `StateSaved` and its copies: earlier completions of a problem, as `databus.history.encode_history`."""

    problem_key: int
    columns: tuple[Column, ...]


class BrokerEnded(Struct, frozen=True, kw_only=True, tag=True):
    """The broker closed its journal in good order."""

    ok: bool
    reason: str = ""
    time_s: float = 0.0


Record = (
    BrokerStarted
    | GroupLeased
    | GroupCompleted
    | GroupMoved
    | BatchCut
    | StepTaken
    | StateSaved
    | HistorySaved
    | BrokerEnded
)
