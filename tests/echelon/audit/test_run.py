"""Runs that kept their promises pass."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_run import MAX_STALENESS, ScriptedRun

from databus.config import StalePolicy
from databus.ledger import Entry
from databus.records import BatchCut
from echelon.audit.run import AuditReport


def assert_holds(report: AuditReport) -> None:
    assert [violation.line() for violation in report.violations] == []


def test_a_good_run_passes_and_is_summed_up(tmp_path: Path) -> None:
    run = ScriptedRun()
    run.steps(2)
    run.save()
    run.filter(run.lease())
    run.settle(run.lease(), "failed")
    late, waits = run.lease(), run.lease()
    run.ledger.expire(late)
    run.lease()  # its second attempt, which the late result replaces
    run.complete(late)
    run.complete(waits)
    run.steps(2)
    run.lease()
    run.end()
    report = run.audit(tmp_path / "run")
    assert_holds(report)
    assert (report.first_step, report.last_step) == (0, 3)
    states = {"trained": 8, "stale": 0, "filtered": 1, "failed": 1, "completed": 0, "leased": 1, "expired": 0}
    assert report.groups == states
    assert (report.tokens, report.loss_tokens, report.max_lag) == (48, 48, 0)
    assert (report.num_segments, report.num_rows, report.num_checkpoints) == (2, 4, 1)


@pytest.mark.parametrize("policy", ["drop", "mask", "requeue"])
def test_stale_groups_pass_under_every_policy(policy: StalePolicy, tmp_path: Path) -> None:
    run = ScriptedRun(policy)
    old, mixed = run.lease(), run.lease()
    run.steps(2)
    run.complete(old, [[0] * 3, [0] * 3])
    run.complete(mixed, [[0, 1, 2], [0]])
    run.steps(3)
    run.save()
    run.steps(1)
    report = run.audit(tmp_path / "run")
    assert_holds(report)
    assert report.groups["stale"] == (1 if policy == "mask" else 2)


def test_what_a_killed_broker_left_passes(tmp_path: Path) -> None:
    """No last word, a batch that is being trained, a row that was not written yet; then another broker goes on."""
    run = ScriptedRun().steps(2)
    batch = run.batch()
    run.start()
    run.train(batch)
    run.rows.pop()
    assert_holds(run.audit(tmp_path / "run"))


def test_a_batch_may_be_cut_again_as_it_was(tmp_path: Path) -> None:
    run = ScriptedRun().steps(2)
    (index,) = run.where(BatchCut, step=1)
    run.records.append(run.records[index])
    run.steps(1)
    assert_holds(run.audit(tmp_path / "run"))


@pytest.mark.parametrize("kept", [1, 2])
def test_early_segments_may_be_gone(kept: int, tmp_path: Path) -> None:
    run = ScriptedRun().steps(2)
    waits, late = run.lease(), run.lease()
    run.ledger.expire(late)
    run.complete(waits)
    run.save()
    run.complete(late)
    run.steps(1)
    run.save()
    run.steps(3)
    run.end()
    report = run.audit(tmp_path / "run", drop_before=kept)
    assert_holds(report)
    assert (report.first_step, report.last_step) == (kept + 1, 5)
    assert report.groups["trained"] == 12


class RandomRun(ScriptedRun):
    """Does what it is told, where the ledger allows it."""

    def __init__(self, policy: StalePolicy) -> None:
        super().__init__(policy)
        self.entries: list[Entry] = []

    def act(self, action: str, choice: int) -> None:
        live = [entry for entry in self.entries if self.ledger.get(entry.group_id) is entry]
        leased = [entry for entry in live if entry.state == "leased"]
        answerable = [entry for entry in live if entry.state in ("leased", "expired")]
        match action:
            case "lease":
                self.entries.append(self.lease())
            case "complete" if answerable:
                self.complete_one(answerable[choice % len(answerable)], choice)
            case "expire" if leased:
                self.ledger.expire(leased[choice % len(leased)])
            case "fail" if leased:
                self.settle(leased[choice % len(leased)], "failed")
            case "filter" if answerable:
                self.filter(answerable[choice % len(answerable)])
            case "cut" if (batch := self.cut()) is not None:
                self.train(batch)
            case "save":
                self.save()
            case "restart":
                self.start()

    def complete_one(self, entry: Entry, choice: int) -> None:
        oldest = max(0, self.step - MAX_STALENESS - 1)
        first = [oldest + (choice >> shift) % (self.step - oldest + 1) for shift in (0, 2, 4)]
        mask = [(choice >> shift) & 1 for shift in range(4)]
        self.complete(entry, [sorted(first), [self.step]], loss_mask=mask)


ACTIONS = ("lease", "complete", "cut", "lease", "complete", "expire", "fail", "filter", "cut", "save", "restart")


@settings(max_examples=200, deadline=None)
@given(
    policy=st.sampled_from(["drop", "mask", "requeue"]),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 255)), max_size=80),
    keep=st.booleans(),
)
def test_whatever_the_ledger_allows_passes(
    policy: StalePolicy, actions: list[tuple[str, int]], keep: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = RandomRun(policy)
    for action, choice in actions:
        run.act(action, choice)
    num_saved = sum(action == "save" for action, _ in actions)
    assert_holds(run.audit(tmp_path_factory.mktemp("run") / "run", drop_before=0 if keep else num_saved))
