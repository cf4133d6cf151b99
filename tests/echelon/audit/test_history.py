"""Each promise broken once, in a journal that is valid otherwise: the audit names the violation, and where it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_run import MAX_STALENESS, RUN_ID, ScriptedRun

from databus.ledger import group_id_of
from databus.records import (
    BatchCut,
    BrokerEnded,
    BrokerStarted,
    GroupCompleted,
    GroupLeased,
    GroupMoved,
    StateSaved,
    StepTaken,
)

PLANTED: dict[str, tuple[str, str, Callable[[ScriptedRun], Any]]] = {}
"""Name -> (category, part of the message, how to break the run of `good_run`)."""


def planted(category: str, message: str) -> Callable[[Callable[[ScriptedRun], Any]], Callable[[ScriptedRun], Any]]:
    def add(breaks: Callable[[ScriptedRun], Any]) -> Callable[[ScriptedRun], Any]:
        PLANTED[breaks.__name__] = (category, message, breaks)
        return breaks

    return add


def good_run() -> ScriptedRun:
    """Four steps, a state saved after two while one group waits; one group stale, one filtered, one lease expired."""
    run = ScriptedRun()
    old = run.lease()
    run.steps(2)
    run.complete(run.lease())
    run.save()
    expired = run.lease()
    run.ledger.expire(expired)
    run.filter(run.lease())
    run.steps(1)
    run.complete(old, [[0, 0], [0]])
    run.steps(1)
    run.lease()
    run.complete(run.lease())
    run.end()
    return run


def test_the_run_to_break_is_good(tmp_path: Path) -> None:
    report = good_run().audit(tmp_path / "run")
    assert report.violations == ()
    assert min(report.groups[state] for state in ("trained", "stale", "filtered", "completed", "leased")) > 0


# ---------------------------------------------------------------- ids and edges


@planted("group_id", f"not the hash of run {RUN_ID}, cursor 3, attempt 0")
def id_is_not_the_hash(run: ScriptedRun) -> None:
    _rename(run, _lease_of(run, 3), "0" * 32)


@planted("edge", "leased again: it is trained")
def leased_again(run: ScriptedRun) -> None:
    run.records.insert(run.where(StateSaved)[0], run.records[_lease_of(run, 1)])


@planted("edge", "cursor 40 leased, the next one is")
def cursor_skipped(run: ScriptedRun) -> None:
    index = run.where(GroupLeased)[-1]
    run.change(index, cursor=40, group_id=group_id_of(RUN_ID, 40, 0))


@planted("edge", "attempt 2 of cursor 6 leased, which waits for attempt 1")
def attempt_skipped(run: ScriptedRun) -> None:
    (index,) = run.where(GroupLeased, cursor=6, attempt=1)
    _rename(run, index, group_id_of(RUN_ID, 6, 2))
    run.change(index, attempt=2)


@planted("edge", "attempt 1 of cursor 1 leased, which does not wait for a lease")
def used_cursor_leased_again(run: ScriptedRun) -> None:
    record, frames = run.records[_lease_of(run, 1)]
    again = type(record)(group_id=group_id_of(RUN_ID, 1, 1), cursor=1, attempt=1, worker="worker-0")
    run.records.insert(run.where(StateSaved)[0], (again, frames))


@planted("edge", "completed, but it was never leased")
def completed_without_a_lease(run: ScriptedRun) -> None:
    del run.records[run.where(GroupLeased)[-1]]


@planted("edge", "went from trained to completed (step 0)")
def completed_twice(run: ScriptedRun) -> None:
    run.records.insert(run.where(StepTaken)[0] + 1, run.records[run.where(GroupCompleted)[0]])


@planted("edge", "went from filtered to stale")
def settled_twice(run: ScriptedRun) -> None:
    (index,) = run.where(GroupMoved, state="filtered")
    run.records.insert(index + 1, run.records[index])
    run.change(index + 1, state="stale")


@planted("edge", "went from leased to filtered")
def filtered_before_it_came_in(run: ScriptedRun) -> None:
    (index,) = run.where(GroupMoved, state="filtered")
    run.records[index - 1], run.records[index] = run.records[index], run.records[index - 1]


@planted("edge", "went from completed to expired")
def completed_group_expires(run: ScriptedRun) -> None:
    (index,) = run.where(GroupMoved, state="filtered")
    run.change(index, state="expired")


@planted("edge", "stale, but it is in the batch of step 1")
def group_of_a_batch_becomes_stale(run: ScriptedRun) -> None:
    (index,) = run.where(BatchCut, step=1)
    group_id = _record(run, index).group_ids[0]
    run.records.insert(index + 1, (GroupMoved(group_id=group_id, state="stale"), ()))


@planted("edge", "another attempt of cursor 6 had been completed before")
def both_attempts_of_a_cursor_completed(run: ScriptedRun) -> None:
    second = next(index for index in run.where(GroupCompleted) if _cursor(run, index) == (6, 1))
    record, frames = run.records[second]
    late = group_id_of(RUN_ID, 6, 0)
    run.records.insert(second + 1, (GroupCompleted(group_id=late, worker="w", columns=record.columns), frames))


# ---------------------------------------------------------------- batches and steps


@planted("trained_twice", "in this batch, and in that of step 0")
def group_in_two_batches(run: ScriptedRun) -> None:
    first, second = run.where(BatchCut)[:2]
    run.change(second, group_ids=(_record(run, first).group_ids[0], _record(run, second).group_ids[1]))


@planted("trained_twice", "in this batch, and in that of step 2")
def group_twice_in_a_batch(run: ScriptedRun) -> None:
    index = run.where(BatchCut)[2]
    run.change(index, group_ids=_record(run, index).group_ids[:1] * 2)


@planted("trained_twice", "cut before, and then of other groups")
def batch_differs_when_served_again(run: ScriptedRun) -> None:
    index = run.where(BatchCut)[1]
    run.records.insert(index + 1, run.records[index])
    run.change(index + 1, group_ids=_record(run, index).group_ids[::-1])


@planted("trained_twice", "taken a second time")
def step_taken_twice(run: ScriptedRun) -> None:
    index = run.where(StepTaken)[1]
    run.records.insert(index + 1, run.records[index])


@planted("batch", "in this batch, but leased")
def trained_before_it_came_in(run: ScriptedRun) -> None:
    index = run.where(BatchCut)[0]
    del run.records[run.where(GroupCompleted, group_id=_record(run, index).group_ids[0])[0]]


@planted("batch", "in this batch, but never leased")
def unknown_group_in_a_batch(run: ScriptedRun) -> None:
    index = run.where(BatchCut)[0]
    run.change(index, group_ids=(_record(run, index).group_ids[0], "f" * 32))


@planted("batch", "in this batch, but filtered")
def filtered_group_in_a_batch(run: ScriptedRun) -> None:
    index = run.where(BatchCut)[2]
    filtered = _record(run, run.where(GroupMoved, state="filtered")[0]).group_id
    run.change(index, group_ids=(_record(run, index).group_ids[0], filtered))


@planted("batch", "a batch of 1 groups, 2 make one")
def small_batch(run: ScriptedRun) -> None:
    index = run.where(BatchCut)[3]
    run.change(index, group_ids=_record(run, index).group_ids[:1])


@planted("batch", "3 completions, 2 were leased")
def large_group(run: ScriptedRun) -> None:
    index = run.where(GroupCompleted)[0]
    group = run.group(index)
    run.change_group(
        index,
        lengths=np.array([3, 2, 1], np.int32),
        rewards=np.zeros(3, np.float32),
        reward_parts=np.zeros((3, 1), np.float32),
        truncated=np.zeros(3, np.uint8),
        loss_mask=group.loss_mask,
    )


@planted("step", "batch cut, the next step is 2")
def step_skipped(run: ScriptedRun) -> None:
    for step in (3, 2):
        for index in run.where(BatchCut, step=step) + run.where(StepTaken, step=step):
            run.change(index, step=step + 1)


@planted("step", "its batch was never cut")
def step_without_a_batch(run: ScriptedRun) -> None:
    del run.records[run.where(BatchCut)[3]]


@planted("step", "batch cut, the next step is 2")
def batch_cut_while_another_is_trained(run: ScriptedRun) -> None:
    del run.records[run.where(StepTaken)[2]]


# ---------------------------------------------------------------- staleness and content


@planted("staleness", f"its tokens have lags 2 to 3, allowed are 0 to {MAX_STALENESS}")
def token_too_old(run: ScriptedRun) -> None:
    index = _completed_of_step(run, 3)
    run.change_group(index, version_values=np.array([0, 1], np.int32), version_lengths=np.array([1, 5], np.int32))


@planted("staleness", "a token of version 3, which came after")
def token_from_the_future(run: ScriptedRun) -> None:
    run.change_group(_completed_of_step(run, 2), version_values=np.array([3], np.int32))


@planted("staleness", "no loss")
def group_without_loss(run: ScriptedRun) -> None:
    run.change_group(_completed_of_step(run, 3), loss_mask=np.zeros(6, np.uint8))


@planted("content", "does not add up")
def lengths_that_do_not_add_up(run: ScriptedRun) -> None:
    run.change_group(_completed_of_step(run, 3), lengths=np.array([3, 4], np.int32))


@planted("content", "a completion of 9 tokens, at most 8 were leased")
def completion_too_long(run: ScriptedRun) -> None:
    run.change_group(
        _completed_of_step(run, 0),
        lengths=np.array([9, 0], np.int32),
        version_lengths=np.array([9], np.int32),
        token_ids=np.zeros(9, np.int32),
        logprobs=np.zeros(9, np.float32),
        loss_mask=np.ones(9, np.uint8),
    )


# ---------------------------------------------------------------- lost


@planted("lost", "it was completed, and is not in the state that was saved")
def saved_state_forgets_a_group(run: ScriptedRun) -> None:
    (index,) = run.where(StateSaved)
    record = _record(run, index)
    run.change(index, groups=tuple(group for group in record.groups if group.state != "completed"))


@planted("lost", "not among the copies for step 2")
def copy_is_missing(run: ScriptedRun) -> None:
    del run.records[run.where(GroupCompleted, copied=True)[0]]


@planted("lost", "it waits, too old for this step and all later ones")
def stale_group_is_left_behind(run: ScriptedRun) -> None:
    (index,) = run.where(GroupMoved, state="stale")
    del run.records[index]


@planted("lost", "passed over: its oldest token is of version 2, another group's of 3")
def older_group_is_passed_over(run: ScriptedRun) -> None:
    """The last group to come in, which waits, came in before the last batch was cut, and older than its groups."""
    (ended,) = run.where(BrokerEnded)
    run.change_group(run.where(GroupCompleted)[-1], version_values=np.array([2], np.int32))
    tail = run.records[ended - 3 : ended]  # a lease, the lease of the last group, and the group
    del run.records[ended - 3 : ended]
    (cut,) = run.where(BatchCut, step=3)
    run.records[cut:cut] = tail


# ---------------------------------------------------------------- saved states and copies


@planted("copy", "its copy differs from the original")
def copy_differs(run: ScriptedRun) -> None:
    run.change_group(run.where(GroupCompleted, copied=True)[0], rewards=np.array([7, 8], np.float32))


@planted("copy", "copied, but it does not wait, or was copied before")
def copied_for_no_reason(run: ScriptedRun) -> None:
    run.records.append(run.records[run.where(GroupCompleted, copied=True)[0]])
    ended = run.records.pop(run.where(BrokerEnded)[0])
    run.records.append(ended)


@planted("state", "next_cursor was saved as 50, the records say 6")
def saved_cursor_differs(run: ScriptedRun) -> None:
    run.change(run.where(StateSaved)[0], next_cursor=50)


@planted("state", "counts was saved as")
def saved_counts_differ(run: ScriptedRun) -> None:
    run.change(run.where(StateSaved)[0], counts={"trained": 5, "stale": 0, "filtered": 0, "failed": 0, "expired": 0})


@planted("state", "pending was saved as []")
def saved_pending_differs(run: ScriptedRun) -> None:
    run.change(run.where(StateSaved)[0], pending=())


@planted("state", "saved as expired, the records say leased")
def saved_group_differs(run: ScriptedRun) -> None:
    (index,) = run.where(StateSaved)
    groups = [_replaced(group, state="expired") if group.state == "leased" else group for group in _groups(run, index)]
    run.change(index, groups=tuple(groups))


@planted("state", "2 copies announced, 1 completed groups wait")
def wrong_number_of_copies(run: ScriptedRun) -> None:
    run.change(run.where(StateSaved)[0], num_copies=2)


# ---------------------------------------------------------------- whose journal it is


@planted("terms", "written by run another, this is scripted")
def journal_of_another_run(run: ScriptedRun) -> None:
    run.change(run.where(BrokerStarted)[0], run_id="another")


@planted("terms", "after the broker had closed its journal")
def record_after_the_end(run: ScriptedRun) -> None:
    run.records.append((StepTaken(step=4, metrics={}), ()))


@planted("terms", "the journal begins with GroupLeased")
def journal_without_a_beginning(run: ScriptedRun) -> None:
    del run.records[0]


@planted("metrics", "the learner read 99 tokens, the batch has")
def learner_read_other_tokens(run: ScriptedRun) -> None:
    index = run.where(StepTaken)[2]
    run.change(index, metrics=_record(run, index).metrics | {"learner/num_tokens": 99.0})


@pytest.mark.parametrize("name", PLANTED)
def test_planted_violation_is_named(name: str, tmp_path: Path) -> None:
    category, message, breaks = PLANTED[name]
    run = good_run()
    breaks(run)
    report = run.audit(tmp_path / "run")
    first = report.violations[0]
    assert first.category == category, first.line()
    assert message in first.message, first.line()
    assert first.segment is not None and first.offset is not None and first.offset >= 16
    assert "\n" not in first.line()


def test_every_category_of_the_journal_is_planted() -> None:
    assert {category for category, _, _ in PLANTED.values()} == {
        "terms", "group_id", "edge", "trained_twice", "lost", "copy", "content", "staleness", "batch", "step", "state",
        "metrics",
    }  # fmt: skip


def test_under_mask_old_tokens_may_be_there_but_not_all_of_them(tmp_path: Path) -> None:
    run = ScriptedRun("mask").steps(3)
    index = _completed_of_step(run, 2)
    run.change_group(index, version_values=np.array([0], np.int32))
    (violation,) = [each for each in run.audit(tmp_path / "run").violations if each.category == "staleness"]
    assert (violation.step, violation.message) == (2, "its tokens have lags 2 to 2, allowed are 0 to 1")


def _record(run: ScriptedRun, index: int) -> Any:
    return run.records[index][0]


def _groups(run: ScriptedRun, index: int) -> Any:
    return _record(run, index).groups


def _replaced(struct: Any, **fields: Any) -> Any:
    return type(struct)(**{name: getattr(struct, name) for name in struct.__struct_fields__} | fields)


def _lease_of(run: ScriptedRun, cursor: int) -> int:
    return run.where(GroupLeased, cursor=cursor, attempt=0)[0]


def _cursor(run: ScriptedRun, completed: int) -> tuple[int, int]:
    (lease,) = run.where(GroupLeased, group_id=_record(run, completed).group_id)
    return _record(run, lease).cursor, _record(run, lease).attempt


def _completed_of_step(run: ScriptedRun, step: int) -> int:
    """The record of the last group of a step."""
    (cut,) = run.where(BatchCut, step=step)
    return run.where(GroupCompleted, group_id=_record(run, cut).group_ids[-1])[-1]


def _rename(run: ScriptedRun, lease: int, new: str) -> None:
    """Another id for a group, wherever it is named."""
    old = _record(run, lease).group_id
    for index, (record, _) in enumerate(run.records):
        if getattr(record, "group_id", None) == old:
            run.change(index, group_id=new)
        elif isinstance(record, BatchCut) and old in record.group_ids:
            run.change(index, group_ids=tuple(new if each == old else each for each in record.group_ids))
