"""The replay against a stand-in for the drafter, and the command from a run's folder to its tables."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import make_group

from databus.codec import Array
from echelon.commands import bench_draft
from echelon.config import DataConfig, RunConfig
from echelon.draft_replay import EchelonSpeculator, GroupReplayer, Round, Tally, num_equal
from echelon.rollout_record import RolloutRecord, RolloutWriter, record_of
from rollout.config import DraftConfig, RolloutConfig

MAX_TOKENS = 8
COMPLETIONS = [[1, 2, 3, 4, 5], [1, 2], [7]]


class Copycat:
    """Proposes what followed the last token in the newest finished completion; checks what it is told."""

    def __init__(self, config: DraftConfig, *, max_sequences: int, vocab_size: int, context_tokens: int) -> None:
        self.config = config
        self.sizes = (max_sequences, vocab_size, context_tokens)
        self.versions: list[int] = []
        self.texts: dict[int, list[int]] = {}
        self.finished: list[list[int]] = []
        self.steps: list[tuple[bool, int]] = []
        self.room: list[int] = []
        self._drafted = self._accepted = 0.0

    def add(
        self,
        *,
        problem: int,
        prompt_ids: Array,
        history: Sequence[tuple[int, Array]],
        predicted_tokens: int,
        group: int,
        max_tokens: int,
    ) -> int:
        slot = max(self.texts, default=-1) + 1
        assert problem > 0 and group > 0 and len(prompt_ids) and not history and not predicted_tokens
        self.texts[slot] = []
        self.room.append(max_tokens)
        return slot

    def remove(self, slot: int) -> None:
        self.finished.append(self.texts.pop(slot))

    def set_version(self, version: int) -> None:
        self.versions.append(version)

    def propose(
        self, slots: Array, tokens: Array, counts: Array, *, decode_only: bool, num_scheduled_tokens: int
    ) -> tuple[Array, Array]:
        assert slots.dtype == tokens.dtype == counts.dtype == np.int32
        assert set(slots.tolist()) == set(self.texts), "whoever is not in the batch has been removed"
        self.steps.append((decode_only, num_scheduled_tokens))
        drafts = np.zeros((len(slots), self.config.max_tokens), np.int32)
        sizes = np.zeros(len(slots), np.int32)
        for row, new in enumerate(np.split(tokens, np.cumsum(counts)[:-1])):
            assert len(new)
            text = self.texts[int(slots[row])]
            text += new.tolist()
            past = next((each for each in reversed(self.finished) if text[-1] in each), [])
            draft = past[past.index(text[-1]) + 1 :][: self.config.max_tokens] if past else []
            drafts[row, : len(draft)] = draft
            sizes[row] = len(draft)
        self._drafted += float(sizes.sum())
        return drafts, sizes

    def counters(self) -> Mapping[str, float]:
        return {
            "rounds": 9.0,
            "drafted": self._drafted,
            "accepted": 3.0,
            "drafted_sibling": 6.0,
            "accepted_sibling": 3.0,
            "drafted_lag0": 4.0,
            "accepted_lag0": 1.0,
            "drafted_lag2": 2.0,
            "accepted_lag2": 2.0,
            "propose_s": 0.5,
        }


def record(completions: Sequence[Sequence[int]], cursor: int = 0, version: int = 0) -> RolloutRecord:
    group = make_group((9, 9, 9), [[version] * len(tokens) for tokens in completions])
    columns = group.columns() | {"token_ids": np.array([token for each in completions for token in each], np.int32)}
    return record_of(cursor, cursor // 2, f"g{cursor}", type(group)(**columns))


def copycat(max_tokens: int = 16) -> Copycat:
    return Copycat(
        DraftConfig(policy="marginal", max_tokens=max_tokens), max_sequences=4, vocab_size=9, context_tokens=9
    )


def rounds_of(drafter: Copycat, record: RolloutRecord) -> list[tuple[list[int], list[int]]]:
    replayer = GroupReplayer(EchelonSpeculator(drafter, MAX_TOKENS))
    return [(one.drafted.tolist(), one.accepted.tolist()) for one in replayer.replay(record)]


def test_siblings_advance_together_and_the_first_token_has_no_draft() -> None:
    drafter = copycat()
    # First round: nothing is known. [7] has ended with its first token; then [1, 2] with its second.
    assert rounds_of(drafter, record(COMPLETIONS)) == [
        ([0, 0], [0, 0]),
        ([0], [0]),
        ([0], [0]),
        ([0], [0]),
    ]
    assert sorted(drafter.finished) == sorted(COMPLETIONS), "all tokens were told, and every slot given back"
    assert drafter.texts == {}
    assert drafter.steps[0] == (False, 3)
    assert all(decode_only for decode_only, _ in drafter.steps[1:])


def test_nobody_tells_the_drafter_where_a_completion_ends() -> None:
    drafter = copycat()
    rounds_of(drafter, record(COMPLETIONS))
    assert drafter.room == [MAX_TOKENS] * len(COMPLETIONS)


def test_what_was_seen_before_is_accepted() -> None:
    drafter = copycat()
    drafter.finished.append([1, 2, 3, 4, 8])
    # 2 3 4 8 is drafted for both; the first takes three of them and 5, the second one, which ends it.
    assert rounds_of(drafter, record(COMPLETIONS[:2], version=4)) == [([4, 4], [3, 1])]
    assert drafter.versions == [4]
    # The step after that would have computed 4 drafts and a token of its own for each of the two.
    assert drafter.steps == [(False, 3), (True, 10)]


def test_a_draft_has_a_longest_length() -> None:
    drafter = copycat(max_tokens=2)
    drafter.finished.append(COMPLETIONS[0])
    assert rounds_of(drafter, record(COMPLETIONS[:1])) == [([2], [2]), ([1], [1])]


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=4), st.integers(1, 5))
def test_every_token_is_replayed_once(completions: list[list[int]], max_tokens: int) -> None:
    drafter = copycat(max_tokens)
    for _ in range(2):
        tokens = sum(max(0, len(each) - 1) for each in completions)
        rounds = rounds_of(drafter, record(completions))
        emitted = sum(accepted + 1 for _, row in rounds for accepted in row)
        # A round that accepts all that is left has no token more.
        assert tokens <= emitted <= tokens + len(completions)
    assert sorted(drafter.finished) == sorted([each for each in completions] * 2)


def test_equal_tokens_from_the_left() -> None:
    tokens = np.array([1, 2, 3])
    assert [num_equal(np.array(draft), tokens) for draft in ([], [1], [1, 2, 3, 4], [1, 3], [2, 2])] == [0, 1, 3, 1, 0]


def test_tally() -> None:
    tally = Tally()
    tally.add(Round(np.array([4, 0]), np.array([2, 0])))
    assert (tally.rounds, tally.accepted_per_round, tally.acceptance) == (2, 1.0, 0.5)
    assert (Tally().accepted_per_round, Tally().acceptance) == (0.0, 0.0)


# ---------------------------------------------------------------- the command


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rollout = RolloutConfig(context_tokens=77, max_tokens=20)
    config = RunConfig(model="m", data=DataConfig(train="t"), rollout=rollout)
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    return tmp_path


def arguments(run_dir: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"run_dir": str(run_dir), "policy": "logarithmic", "max_tokens": None} | changes))


def write(run_dir: Path, epochs: int) -> None:
    writer = RolloutWriter(run_dir / "rollouts.bin", num_prompts=2)
    for cursor in range(2 * epochs):
        group = make_group((9, cursor % 2), [[cursor // 2] * 5] * 3)
        writer.record(cursor, f"g{cursor}", group)
    writer.close()


def test_tables(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write(run_dir, epochs=2)
    made: list[Copycat] = []

    def make(*words: Any, **settings: Any) -> Copycat:
        made.append(Copycat(*words, **settings))
        return made[-1]

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(bench_draft, "arctic_is_installed", lambda: False)
    assert bench_draft.execute(arguments(run_dir, max_tokens=3), make) == 0
    (drafter,) = made
    assert drafter.sizes == (3, 15, 77)
    assert (drafter.config.policy, drafter.config.max_tokens) == ("logarithmic", 3)
    assert drafter.versions == [0, 0, 1, 1]
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    by_epoch = {row[0]: [float(word) for word in row[2:]] for row in rows if len(row) > 4 and row[1] == "echelon"}
    assert set(by_epoch) == {"0", "1", "all"}
    assert by_epoch["1"][0] > by_epoch["0"][0], "by then it has seen them"
    assert ["sibling", *rest_of(rows, "sibling")] in rows
    assert rest_of(rows, "sibling")[2] == "0.500"
    assert rest_of(rows, "0", skip="echelon")[2] == "0.250"
    assert rest_of(rows, "2", skip="echelon")[2] == "1.000"


def rest_of(rows: list[list[str]], first: str, skip: str = "") -> list[str]:
    return next(row[1:] for row in rows if row and row[0] == first and skip not in row[1:2])


def test_bad_input_is_one_line(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match="is missing: only a run with"):
        bench_draft.execute(arguments(run_dir), Copycat)
    write(run_dir, epochs=0)
    with pytest.raises(ValueError, match="holds no group yet"):
        bench_draft.execute(arguments(run_dir), Copycat)
    with pytest.raises(ValueError, match="is not a run's folder"):
        bench_draft.execute(arguments(tmp_path_factory.mktemp("none")), Copycat)


def test_parts_are_told_apart() -> None:
    counters = {"drafted_own": 1.0, "accepted_own": 0.5, "drafted_lag16": 2.0, "accepted_lag16": 1.0, "drafted_x": 3.0}
    assert bench_draft.by_part(counters) == {"source": {"own": (1.0, 0.5)}, "lag": {"16": (2.0, 1.0)}}
