import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import (
    Prompts,
    RunningBroker,
    ScriptedLearner,
    broker_config,
    connect,
    make_group,
    receive,
    send_group,
)

from databus.client import BusClient
from databus.codec import MalformedMessage
from databus.config import HistoryConfig
from databus.groups import Group
from databus.history import (
    CompletionHistory,
    PastCompletion,
    completion_id,
    decode_history,
    encode_history,
    problem_key,
)
from databus.messages import Ack, Column, Credits, Lease
from databus.prompts import Prompt

WIDE = HistoryConfig(tokens=1000, window_versions=100, total_tokens=10_000)


def group_of(completions: list[list[int]], version: int = 0) -> Group:
    """A group with these tokens, all of one version."""
    group = make_group((1,), [[version] * len(tokens) for tokens in completions])
    tokens = np.array([token for each in completions for token in each], np.int32)
    return type(group)(**{**group.columns(), "token_ids": tokens})


def texts(past: tuple[PastCompletion, ...]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in past]


# ---------------------------------------------------------------- keys


def test_keys_are_stable_and_fit_a_signed_integer() -> None:
    assert problem_key((4, 5, 6)) == 480350207846263864
    assert problem_key([4, 5, 6]) == problem_key((4, 5, 6)) != problem_key((4, 5))
    assert completion_id("g", np.array([7, 8], np.int32)) == completion_id("g", np.array([7, 8], np.int64))
    assert completion_id("g", np.array([7, 8])) != completion_id("h", np.array([7, 8]))
    assert all(0 < problem_key((index,)) < 2**63 for index in range(200))


# ---------------------------------------------------------------- what is kept


def test_newest_completions_are_kept_whole() -> None:
    history = CompletionHistory(HistoryConfig(tokens=5, window_versions=9, total_tokens=100))
    history.add(1, "a", group_of([[1, 2, 3], [4, 5]]))
    assert texts(history.of(1, 0)) == [[1, 2, 3], [4, 5]]
    history.add(1, "b", group_of([[6]]))
    assert texts(history.of(1, 0)) == [[4, 5], [6]]
    assert history.of(2, 0) == ()
    assert history.num_tokens == 3


def test_one_that_is_too_long_is_kept_from_its_beginning() -> None:
    history = CompletionHistory(HistoryConfig(tokens=3, window_versions=9, total_tokens=100))
    history.add(1, "a", group_of([[1], [2, 3, 4, 5, 6]]))
    (only,) = history.of(1, 0)
    assert only.token_ids.tolist() == [2, 3, 4]
    assert only.identity == completion_id("a", np.array([2, 3, 4, 5, 6])), "whoever has it whole can tell"


def test_the_window_counts_from_the_newest_version() -> None:
    history = CompletionHistory(HistoryConfig(tokens=99, window_versions=2, total_tokens=100))
    history.add(1, "late", group_of([[1]], version=4))
    history.add(1, "early", group_of([[2]], version=3))
    assert texts(history.of(1, 5)) == [[1], [2]]
    assert texts(history.of(1, 6)) == [[1]]
    assert (history.of(1, 7), len(history), history.num_tokens) == ((), 0, 0)


def test_a_completion_is_as_old_as_its_oldest_token() -> None:
    history = CompletionHistory(WIDE)
    history.add(1, "a", make_group((1,), [[3, 4, 4], [4]]))
    assert [completion.version for completion in history.of(1, 4)] == [3, 4]


def test_the_same_answer_twice_in_a_group_is_kept_once() -> None:
    history = CompletionHistory(WIDE)
    history.add(1, "a", group_of([[1, 2], [3], [1, 2], []]))
    history.add(1, "b", group_of([[1, 2]]))
    assert texts(history.of(1, 0)) == [[1, 2], [3], [1, 2]]


def test_the_least_recently_used_problem_goes_first() -> None:
    history = CompletionHistory(HistoryConfig(tokens=4, window_versions=9, total_tokens=6))
    for key in (1, 2, 3):
        history.add(key, "g", group_of([[key, key]]))
    history.of(1, 0)
    history.add(4, "g", group_of([[4, 4]]))
    assert [len(history.of(key, 0)) for key in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_what_is_kept_does_not_hold_on_to_the_message() -> None:
    history = CompletionHistory(WIDE)
    group = group_of([[1, 2], [3]])
    history.add(1, "a", group)
    assert not any(np.shares_memory(each.token_ids, group.token_ids) for each in history.of(1, 0))


additions = st.lists(
    st.tuples(
        st.integers(1, 4),  # problem
        st.integers(0, 6),  # version
        st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=3),
    ),
    max_size=25,
)


@given(additions, st.integers(0, 12), st.integers(1, 4), st.integers(1, 20))
def test_bounds_hold_and_nothing_else_is_lost(
    added: list[tuple[int, int, list[list[int]]]], tokens: int, window: int, total: int
) -> None:
    """Against a model that keeps everything and cuts when it is asked."""
    history = CompletionHistory(HistoryConfig(tokens=tokens, window_versions=window, total_tokens=total))
    room = min(tokens, total)
    everything: dict[int, list[tuple[int, list[int]]]] = {}
    newest = 0
    for number, (key, version, completions) in enumerate(added):
        newest = max(newest, version)
        history.add(key, str(number), group_of(completions, version))
        different = [each for index, each in enumerate(completions) if each and each not in completions[:index]]
        everything.setdefault(key, []).extend((version, each[:room]) for each in different if room)
    assert history.num_tokens <= total
    seen = 0
    for key in range(1, 5):
        found = history.of(key, newest)
        seen += sum(map(len, texts(found)))
        assert sum(map(len, texts(found))) <= tokens
        suffix: list[tuple[int, list[int]]] = []
        for version, each in reversed(everything.get(key, [])):
            if sum(len(text) for _, text in suffix) + len(each) > room:
                break
            suffix.insert(0, (version, each))
        expected = [each for version, each in suffix if version >= newest - window]
        # A problem is forgotten as a whole, and may begin anew.
        assert texts(found) == expected[len(expected) - len(found) :]
        if sum(len(each) for entries in everything.values() for _, each in entries) <= total:
            assert texts(found) == expected
    assert seen == history.num_tokens


# ---------------------------------------------------------------- the wire

past = st.lists(
    st.builds(
        PastCompletion,
        st.integers(0, 2**31 - 1),
        st.integers(1, 2**63 - 1),
        st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6).map(lambda ids: np.array(ids, np.int32)),
    ),
    max_size=6,
)


@given(past)
def test_history_round_trips(completions: list[PastCompletion]) -> None:
    columns, frames = encode_history(completions)
    decoded = decode_history(columns, [bytes(frame) for frame in frames])
    assert [(each.version, each.identity) for each in decoded] == [
        (each.version, each.identity) for each in completions
    ]
    for ours, theirs in zip(decoded, completions, strict=True):
        assert ours.token_ids.dtype == np.int32
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()


GOOD = {
    "token_ids": np.array([1, 2, 3], np.int32),
    "lengths": np.array([2, 1], np.int32),
    "versions": np.array([0, 4], np.int32),
    "ids": np.array([8, 9], np.int64),
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": np.array([2, 2], np.int32)}, "do not add up to 3"),
        ({"lengths": np.array([3, 0], np.int32)}, "do not add up"),
        ({"lengths": np.array([4, -1], np.int32)}, "'lengths' has a negative entry"),
        ({"lengths": np.array([3], np.int32)}, "differ in length"),
        ({"versions": np.array([0, -1], np.int32)}, "'versions' has a negative entry"),
        ({"token_ids": np.array([1, -2, 3], np.int32)}, "'token_ids' has a negative entry"),
        ({"token_ids": np.array([1, 2, 3], np.int64)}, "'token_ids' is <i8"),
        ({"token_ids": np.array([[1, 2, 3]], np.int32)}, "2 dimensions"),
        ({"ids": np.array([8], np.int64)}, "differ in length"),
        ({"extra": np.array([8], np.int64)}, "unknown columns: extra"),
    ],
)
def test_malformed_history(changes: dict[str, np.ndarray], says: str) -> None:
    from databus.codec import encode_columns

    assert len(decode_history(*encode_columns(GOOD))) == 2
    with pytest.raises(MalformedMessage, match=says):
        decode_history(*encode_columns(GOOD | changes))


@given(st.lists(st.binary(max_size=40), max_size=5), st.data())
def test_any_frames_are_a_history_or_malformed(frames: list[bytes], data: st.DataObject) -> None:
    names = st.sampled_from(["token_ids", "lengths", "versions", "ids", "x"])
    dtypes = st.sampled_from(["<i4", "<i8", "<f4", "|O"])
    column = st.builds(Column, names, dtypes, st.lists(st.integers(-1, 9), max_size=2).map(tuple))
    columns = tuple(data.draw(st.lists(column, max_size=5)))
    try:
        decoded = decode_history(columns, frames)
    except MalformedMessage:
        return
    assert all(len(each.token_ids) for each in decoded)


# ---------------------------------------------------------------- with the broker, over real sockets


class TwoProblems(Prompts):
    def get(self, cursor: int) -> Prompt:
        return super().get(cursor % 2)


def take_lease(worker: BusClient) -> tuple[Lease, tuple[PastCompletion, ...]]:
    while True:
        arrived = worker.recv(5.0)
        assert arrived is not None, "no lease came"
        if isinstance(arrived.message, Lease):
            return arrived.message, decode_history(arrived.message.history, arrived.frames)


def answer(worker: BusClient, lease: Lease, completions: list[list[int]]) -> None:
    group = group_of(completions)
    columns = group.columns() | {"prompt_ids": np.array(lease.prompt_ids, np.int32)}
    send_group(worker, lease.group_id, type(group)(**columns))
    assert receive(worker, Ack).accepted


def take_leases(worker: BusClient, count: int) -> list[tuple[Lease, tuple[PastCompletion, ...]]]:
    return [take_lease(worker) for _ in range(count)]


def test_leases_carry_what_was_answered_before_to_whoever_gets_them(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=2, history=WIDE, max_staleness=9), prompts=TwoProblems())
    learner = ScriptedLearner(address)
    old = connect(address, "old", "worker", max_sequences=4)
    old.send(Credits(total=2))
    (first, before), (second, _) = take_leases(old, 2)
    assert (first.problem_key, before) == (problem_key(first.prompt_ids), ())
    assert second.problem_key != first.problem_key
    answer(old, first, [[1, 2, 3], [4, 5]])
    answer(old, second, [[7], [8]])

    new = connect(address, "new", "worker", max_sequences=4)
    new.send(Credits(total=2))
    (third, of_first), (fourth, of_second) = take_leases(new, 2)
    assert third.problem_key == first.problem_key
    assert texts(of_first) == [[1, 2, 3], [4, 5]]
    assert of_first[0].identity == completion_id(first.group_id, np.array([1, 2, 3]))
    assert texts(of_second) == [[7], [8]]
    for lease in (third, fourth):
        answer(new, lease, [[1], [2]])
    for step in range(2):
        learner.step(step)
    old.close("done")
    new.close("done")
    learner.finish()
    running.join()


def test_nothing_is_sent_where_nobody_drafts(address: str) -> None:
    RunningBroker(broker_config(address, max_staleness=9), prompts=TwoProblems())
    ScriptedLearner(address)
    worker = connect(address, "w", "worker", max_sequences=4)
    for total in range(1, 4):
        worker.send(Credits(total=total))
        lease, past = take_lease(worker)
        assert (lease.problem_key, past) == (0, ())
        answer(worker, lease, [[1], [2]])
    worker.close("done")


def test_evaluation_neither_gives_nor_gets_history(address: str) -> None:
    evals = [Prompts().get(0), Prompts().get(7)]  # the first is a training problem, too
    config = broker_config(address, history=WIDE, max_staleness=9, eval_every=1, eval_timeout_s=60.0)
    RunningBroker(config, evals, TwoProblems())
    worker = connect(address, "w", "worker", max_sequences=4)
    ScriptedLearner(address)
    evaluated = take_leases(worker, 2)
    for (lease, past), prompt in zip(evaluated, evals, strict=True):
        assert (lease.purpose, past, lease.problem_key) == ("eval", (), problem_key(prompt.prompt_ids))
        answer(worker, lease, [[5, 5]])
    for total, expected in ((1, []), (2, []), (3, [[6], [7]])):
        worker.send(Credits(total=total))
        lease, past = take_lease(worker)
        assert texts(past) == expected
        answer(worker, lease, [[6], [7]])
    worker.close("done")
