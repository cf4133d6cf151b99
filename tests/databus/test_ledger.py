import pytest

from databus.ledger import Ledger, group_id_of


def test_ids_depend_on_run_cursor_and_attempt() -> None:
    ids = {group_id_of(run, cursor, attempt) for run in "ab" for cursor in (0, 1) for attempt in (0, 1)}
    assert len(ids) == 8
    assert group_id_of("a", 1, 0) == group_id_of("a", 1, 0)


def test_settled_groups_cannot_move() -> None:
    ledger = Ledger("r")
    entry = ledger.lease()
    ledger.complete(entry)
    ledger.settle(entry, "trained")
    with pytest.raises(AssertionError, match="cannot go from trained to stale"):
        ledger.settle(entry, "stale")
    assert ledger.get(entry.group_id) is None
    assert ledger.counts()["trained"] == 1


def test_leased_group_cannot_be_trained() -> None:
    ledger = Ledger("r")
    with pytest.raises(AssertionError, match="cannot go from leased to trained"):
        ledger.settle(ledger.lease(), "trained")


def test_expired_cursor_is_leased_before_new_ones() -> None:
    ledger = Ledger("r")
    first, second = ledger.lease(), ledger.lease()
    ledger.expire(second)
    ledger.expire(first)
    again = [ledger.lease() for _ in range(3)]
    assert [(entry.cursor, entry.attempt) for entry in again] == [(1, 1), (0, 1), (2, 0)]
    assert ledger.counts()["expired"] == 2


def test_late_result_replaces_the_next_attempt() -> None:
    ledger = Ledger("r")
    first = ledger.lease()
    ledger.expire(first)
    second = ledger.lease()
    assert ledger.complete(first) == [second]
    assert (ledger.accepted, ledger.running) == (1, 0)
    assert ledger.lease().cursor == 1


def test_no_id_is_leased_twice_after_a_late_result() -> None:
    """Whoever holds the attempt that the late result replaced may answer it yet."""
    ledger = Ledger("r")
    first = ledger.lease()
    ledger.expire(first)
    second = ledger.lease()
    ledger.complete(first)
    assert ledger.pending_at(0) == ((0, 2),)
    ledger.requeue(first)
    assert ledger.lease().attempt == 2 and second.attempt == 1


def test_every_transition_is_told_before_it_is_made() -> None:
    seen: list[tuple[str, str]] = []
    ledger = Ledger("r", on_transition=lambda entry, state: seen.append((entry.state, state)))
    entry = ledger.lease()
    ledger.complete(entry)
    ledger.settle(entry, "filtered")
    assert seen == [("leased", "leased"), ("leased", "completed"), ("completed", "filtered")]


def test_pending_is_what_a_resumed_run_has_to_lease() -> None:
    ledger = Ledger("r")
    trained, queued, _running, lost, later = (ledger.lease() for _ in range(5))
    for entry, step in ((trained, 0), (later, 1)):
        ledger.complete(entry)
        entry.step = step
    ledger.settle(trained, "trained")
    ledger.complete(queued)
    ledger.expire(lost)
    assert ledger.pending_at(1) == ((1, 1), (2, 1), (3, 1), (4, 1))
    assert ledger.next_cursor == 5


def test_memory_holds_open_groups_alone() -> None:
    ledger = Ledger("r")
    for _ in range(1000):
        entry = ledger.lease()
        ledger.complete(entry)
        ledger.settle(entry, "trained")
    assert not ledger._open and not ledger._attempts
