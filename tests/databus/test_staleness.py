"""The staleness bound as a state machine: gate, ledger and batch queue under any order of events."""

from collections import Counter
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted import make_group

from databus.batches import BatchQueue, Waiting
from databus.ledger import Entry, Ledger
from databus.staleness import StalenessGate


def gate(max_staleness: int = 1, policy: Any = "drop", batch_groups: int = 2) -> StalenessGate:
    return StalenessGate(max_staleness, batch_groups, policy)


def test_capacity_by_hand() -> None:
    assert gate(0, batch_groups=4).capacity(version=0, accepted=0, running=0) == 4
    assert gate(0, batch_groups=4).capacity(version=3, accepted=12, running=1) == 3
    assert gate(2, batch_groups=4).capacity(version=1, accepted=4, running=12) == 0


def test_admit_by_policy() -> None:
    old = make_group((1,), [[0, 2], [1, 1]])
    assert gate(policy="drop").admit(old, 1) is old
    assert gate(policy="drop").admit(old, 2) is None
    assert gate(policy="requeue").admit(old, 2) is None
    masked = gate(policy="mask").admit(old, 2)
    assert masked is not None and masked.loss_mask.tolist() == [0, 1, 1, 1]
    assert old.loss_mask.tolist() == [1, 1, 1, 1]
    assert gate(policy="mask").admit(old, 4) is None
    assert gate().admit(make_group((1,), [[0], [0]], loss_mask=[0, 0]), 0) is None


@given(
    versions=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), max_size=6),
    max_staleness=st.integers(0, 3),
    policy=st.sampled_from(["drop", "mask", "requeue"]),
    step=st.integers(0, 8),
)
def test_what_can_be_trained_is_what_is_admitted(
    versions: list[tuple[int, int]], max_staleness: int, policy: Any, step: int
) -> None:
    """The queue asks `can_train` of two remembered versions, the cut `admit` of all tokens."""
    group = make_group((1,), [[version for version, _ in versions], []], loss_mask=[loss for _, loss in versions])
    admitted = gate(max_staleness, policy).admit(group, step)
    assert (admitted is not None) == gate(max_staleness, policy).can_train(group.loss_versions, step)
    if admitted is not None:
        lags = step - admitted.token_versions()[admitted.loss_mask.astype(bool)]
        assert lags.size and lags.max() <= max_staleness


def test_batch_takes_the_oldest_first() -> None:
    ledger, queue = Ledger("r"), BatchQueue(gate(5))
    for versions in ([[2], [2]], [[1], [3]], [[1], [1]]):
        entry = ledger.lease()
        ledger.complete(entry)
        queue.add(Waiting(entry, make_group((1,), versions), (), ""))
    batch = queue.cut(3, lambda entry: None)
    assert batch is not None
    assert [waiting.entry.cursor for waiting in batch.groups] == [1, 2] and len(queue) == 1


class StalenessMachine(RuleBasedStateMachine):
    """Two workers that apply versions late, groups that complete out of order, expire, fail and come in late."""

    BATCH, SIZE = 2, 2

    @initialize(max_staleness=st.integers(0, 3), policy=st.sampled_from(["drop", "mask", "requeue"]))
    def start(self, max_staleness: int, policy: Any) -> None:
        self.eta, self.policy = max_staleness, policy
        self.gate = StalenessGate(max_staleness, self.BATCH, policy)
        self.moves: list[tuple[str, str, str]] = []
        self.ledger = Ledger("run", on_transition=lambda e, s: self.moves.append((e.group_id, e.state, s)))
        self.queue = BatchQueue(self.gate)
        self.version = 0
        self.serving = [0, 0]
        self.running: dict[str, tuple[Entry, int, list[int]]] = {}
        self.late: dict[str, tuple[Entry, list[int]]] = {}
        self.batches: list[list[str]] = []
        self.cursors_done: Counter[int] = Counter()

    @rule(worker=st.integers(0, 1))
    def lease(self, worker: int) -> None:
        """A worker fills up, so that steps with little lag are as likely as those at the bound."""
        for _ in range(self.gate.capacity(self.serving[worker], self.ledger.accepted, self.ledger.running)):
            entry = self.ledger.lease()
            self.running[entry.group_id] = (entry, worker, [self.serving[worker]])

    @rule(worker=st.integers(0, 1), to_newest=st.booleans())
    def apply_version(self, worker: int, to_newest: bool) -> None:
        """In flight: what runs goes on with tokens of the new version."""
        if self.serving[worker] < self.version:
            self.serving[worker] = self.version if to_newest else self.serving[worker] + 1
            for _, holder, versions in self.running.values():
                if holder == worker:
                    versions.append(self.serving[worker])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 4))
    def complete(self, data: st.DataObject, count: int) -> None:
        """Mostly the youngest: an old one that stays behind is what becomes stale."""
        for _ in range(min(count, len(self.running))):
            youngest = sorted(self.running, key=lambda group_id: -self.running[group_id][0].order)
            entry, _, versions = self.running.pop(data.draw(st.sampled_from(youngest)))
            self._complete(entry, versions)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def complete_late(self, data: st.DataObject) -> None:
        entry, versions = self.late.pop(data.draw(st.sampled_from(sorted(self.late))))
        if self.ledger.get(entry.group_id) is entry:
            self._complete(entry, versions)

    def _complete(self, entry: Entry, versions: list[int]) -> None:
        for other in self.ledger.complete(entry):
            self.running.pop(other.group_id, None)
            self.late.pop(other.group_id, None)
        self.queue.add(Waiting(entry, make_group((1,), [versions, versions[-1:]]), (), ""))

    @precondition(lambda self: len(self.running) > 2)
    @rule(data=st.data(), failed=st.booleans())
    def lose(self, data: st.DataObject, failed: bool) -> None:
        entry, _, versions = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        if failed:
            self.ledger.settle(entry, "failed")
        else:
            self.ledger.expire(entry)
            self.late[entry.group_id] = (entry, versions)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def overtake(self, data: st.DataObject) -> None:
        """A lease expires, its cursor goes to the other worker, and the first result comes in after all."""
        entry, worker, versions = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        self.ledger.expire(entry)
        self.late[entry.group_id] = (entry, versions)
        self.lease(1 - worker)
        if self.ledger.get(entry.group_id) is entry:
            del self.late[entry.group_id]
            self._complete(entry, versions)

    @rule(left=st.integers(0, 2))
    def whole_round(self, left: int) -> None:
        """What mostly happens: all serve the newest version and fill up, all but the oldest complete, a step."""
        for worker in (0, 1):
            self.apply_version(worker, to_newest=True)
            self.lease(worker)
        for group_id in sorted(self.running, key=lambda each: self.running[each][0].order)[left:]:
            if group_id in self.running:
                entry, _, versions = self.running.pop(group_id)
                self._complete(entry, versions)
        self.train()

    @precondition(lambda self: len(self.queue) >= self.BATCH)
    @rule()
    def train(self) -> None:
        def stale(entry: Entry) -> None:
            event("stale")
            if self.policy == "requeue":
                self.ledger.requeue(entry)
            else:
                self.ledger.settle(entry, "stale")

        batch = self.queue.cut(self.version, stale)
        if batch is None:
            return
        assert len(batch.groups) == self.BATCH
        for waiting in batch.groups:
            lags = self.version - waiting.group.token_versions()[waiting.group.loss_mask.astype(bool)]
            assert lags.size and lags.max() <= self.eta
            self.ledger.settle(waiting.entry, "trained")
            self.cursors_done[waiting.entry.cursor] += 1
        self.batches.append([waiting.entry.group_id for waiting in batch.groups])
        self.version += 1

    @invariant()
    def never_trained_twice(self) -> None:
        if hasattr(self, "batches"):
            trained = [group_id for batch in self.batches for group_id in batch]
            assert len(trained) == len(set(trained))
            assert all(count == 1 for count in self.cursors_done.values())

    @invariant()
    def no_id_is_leased_twice(self) -> None:
        if hasattr(self, "moves"):
            leased = [group_id for group_id, state, to in self.moves if state == to == "leased"]
            assert len(leased) == len(set(leased))

    @invariant()
    def bound_on_work(self) -> None:
        if hasattr(self, "ledger"):
            assert self.ledger.accepted + self.ledger.running <= (self.eta + self.version + 1) * self.BATCH
            assert self.ledger.running == len(self.running)

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every cursor that was ever leased is settled, under way, or waiting to be leased again."""
        if hasattr(self, "ledger"):
            settled = sum(self.ledger.counts()[state] for state in ("trained", "stale", "filtered", "failed"))
            requeued = self.ledger.counts()["stale"] if self.policy == "requeue" else 0
            pending = len({cursor for cursor, _ in self.ledger.pending_at(self.version)})
            assert settled - requeued + pending == self.ledger.next_cursor


StalenessMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
test_staleness_machine = StalenessMachine.TestCase
