"""The proposer and its batch, with vLLM's runner played by a few dictionaries."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from enumerable import history_of

from rollout.config import DraftConfig
from rollout.drafting.counters import FIELDS, CounterPage
from rollout.drafting.facts import DraftFacts, problem_key
from rollout.drafting.proposer import DraftSetup, Proposer

CONTEXT, VOCABULARY, SEQUENCES, LONGEST = 40, 12, 4, 5
END = 11
TEXT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


class Runner:
    """What the proposer uses of vLLM's model runner, and the scheduler's part in what it holds."""

    def __init__(self, rows: int = SEQUENCES) -> None:
        self.requests: dict[str, Any] = {}
        self.input_batch = SimpleNamespace(req_ids=[])
        self.query_start_loc = SimpleNamespace(np=np.zeros(rows + 1, np.int32))
        self.num_tokens = np.zeros(rows, np.int32)
        self.effective_drafter_max_model_len = CONTEXT

    def begin(self, name: str, facts: DraftFacts | None = None, prompt: int = 3, max_tokens: int = 20) -> None:
        sampling = SimpleNamespace(
            max_tokens=max_tokens, extra_args=facts.extra_arguments() if facts else None, stop_token_ids=[END]
        )
        self.requests[name] = SimpleNamespace(
            prompt_token_ids=[0] * prompt, output_token_ids=[], sampling_params=sampling
        )

    def step(self, sampled: dict[str, list[int]], computed: int = 1) -> list[list[int]]:
        """A step in which rows got these tokens; `computed` each."""
        self.input_batch.req_ids = list(sampled)
        self.query_start_loc.np[: len(sampled) + 1] = np.arange(len(sampled) + 1) * computed
        for row, (name, tokens) in enumerate(sampled.items()):
            request = self.requests[name]
            request.output_token_ids.extend(tokens)
            self.num_tokens[row] = len(request.prompt_token_ids) + len(request.output_token_ids)
        return self.proposer.propose(list(sampled.values()), self.num_tokens, None, slot_mappings=None)

    proposer: Proposer


def started(
    drafter: str = "PrefixDrafter", batched_tokens: int = 1000, sequences: int = SEQUENCES
) -> tuple[Runner, Proposer, CounterPage]:
    runner = Runner(sequences)
    runner.proposer = proposer = Proposer(
        SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=sequences, max_num_batched_tokens=batched_tokens),
            model_config=SimpleNamespace(max_model_len=CONTEXT, get_vocab_size=lambda: VOCABULARY),
            speculative_config=SimpleNamespace(num_speculative_tokens=LONGEST),
        )
    )
    page = CounterPage.create()
    config = DraftConfig(policy="marginal", max_tokens=LONGEST)
    proposer.start(runner, DraftSetup(config=config, version=3, counters=page.path, drafter=f"stand_in.{drafter}"))
    return runner, proposer, page


def facts(problem: int = 7, *texts: list[int]) -> DraftFacts:
    return DraftFacts(problem=problem, group=1, history=history_of(list(texts)))


def test_drafts_go_to_the_row_of_their_request() -> None:
    runner, _, page = started()
    runner.begin("a", facts(7, TEXT))
    runner.begin("b", facts(8, TEXT[::-1]))
    assert runner.step({"a": [1, 2], "b": [9]}) == [[3, 4, 5, 6, 7], [8, 7, 6, 5, 4]]
    assert runner.step({"b": [8], "a": [3]}) == [[7, 6, 5, 4, 3], [4, 5, 6, 7, 8]]
    assert page.read()["drafted"] == 20
    assert page.read()["rounds"] == 2


def test_nothing_is_drafted_in_a_prefill() -> None:
    runner, _, _ = started()
    runner.begin("a", facts(7, TEXT))
    assert runner.step({"a": []}, computed=2) == [[]]
    assert runner.step({"a": [1]}, computed=2) == [[2, 3, 4, 5, 6]]


@pytest.mark.parametrize(("prompt", "max_tokens"), [(3, 6), (CONTEXT - 6, 20)])
def test_no_draft_beyond_what_a_request_may_say(prompt: int, max_tokens: int) -> None:
    """Six tokens: the last one is sampled behind the draft."""
    runner, _, _ = started()
    runner.begin("a", facts(7, TEXT), prompt, max_tokens)
    assert runner.step({"a": [1]}) == [[2, 3, 4, 5]]
    assert runner.step({"a": [2, 3, 4]}) == [[5]]
    assert runner.step({"a": [5]}) == [[]]
    assert runner.step({"a": [6]}) == [[]]


def test_requests_that_are_gone_leave_their_text_and_their_slot() -> None:
    runner, proposer, _ = started()
    runner.begin("gone", facts(7))
    runner.step({"gone": [8, 9]})
    del runner.requests["gone"]
    runner.begin("next", facts(7))
    assert runner.step({"next": [8]}) == [[9]]
    del runner.requests["next"]
    for turn in range(3 * SEQUENCES):
        runner.begin(f"r{turn}", facts(7))
        runner.step({f"r{turn}": [turn % 10, (turn + 3) % 10]})
        del runner.requests[f"r{turn}"]
    runner.begin("last", facts(7))
    assert runner.step({"last": [4]}) == [[7]]
    drafter: Any = proposer._drafter
    assert len(drafter.seen) == 1


def test_what_follows_an_end_is_neither_kept_nor_drafted_for() -> None:
    runner, proposer, _ = started()
    runner.begin("a", facts(7, TEXT))
    runner.begin("b", facts(7, TEXT))
    assert runner.step({"a": [1, 2, END, 4], "b": [1, 2]}) == [[], [3, 4, 5, 6, 7]]
    drafter: Any = proposer._drafter
    assert sorted(seen.text for seen in drafter.seen.values()) == [[1, 2], [1, 2, END]]


def test_a_preempted_request_goes_on_where_it_was() -> None:
    runner, _, _ = started()
    runner.begin("a", facts(7, TEXT))
    runner.begin("b", facts(8))
    runner.step({"a": [1], "b": [0]})
    runner.step({"b": [0]})
    assert runner.step({"b": [0], "a": [2]})[1] == [3, 4, 5, 6, 7]


def test_a_preempted_request_gives_its_slot_to_who_needs_it_and_begins_anew() -> None:
    runner, _, _ = started()
    runner.begin("waits", facts(7, TEXT))
    runner.step({"waits": [1, 2]})
    others = [f"other{index}" for index in range(SEQUENCES)]
    for name in others:
        runner.begin(name, facts(8))
    runner.step({name: [1] for name in others})
    del runner.requests[others[0]]
    assert runner.step({**{name: [1] for name in others[1:]}, "waits": [3]})[-1] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("history", [((2, 0, b"\x01\x02\x03"),), history_of([[1, 99]]), history_of([[-1]])])
def test_a_bad_history_is_left_out_with_one_warning(
    history: tuple[tuple[int, bytes], ...], caplog: pytest.LogCaptureFixture
) -> None:
    runner, _, page = started()
    for name in ("a", "b"):
        runner.begin(name, DraftFacts(problem=7, group=1, history=history))
        runner.step({name: [1]})
    assert page.read()["refused"] == 2
    assert page.read()["failures"] == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_request_that_is_refused_goes_without_drafts_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, proposer, page = started()
    drafter: Any = proposer._drafter
    add = drafter.add

    def refuse_nine(**given: Any) -> int:
        if given["problem"] == 9:
            raise ValueError("nine")
        return add(**given)

    monkeypatch.setattr(drafter, "add", refuse_nine)
    for name, problem in (("a", 7), ("refused", 9), ("b", 8)):
        runner.begin(name, facts(problem, TEXT))
    assert runner.step({"a": [1], "refused": [1], "b": [2]}) == [[2, 3, 4, 5, 6], [], [3, 4, 5, 6, 7]]
    assert page.read()["refused"] == 2
    del runner.requests["refused"]
    assert runner.step({"b": [3], "a": [2]}) == [[4, 5, 6, 7, 8], [3, 4, 5, 6, 7]]


def test_a_drafter_that_raises_is_dropped_until_the_next_version(caplog: pytest.LogCaptureFixture) -> None:
    runner, proposer, page = started("RaisingDrafter")
    runner.begin("a", facts(7, TEXT), max_tokens=30)
    for _ in range(10):
        assert runner.step({"a": [1]}) != [[]]
    drafted = page.read()["drafted"]
    for _ in range(3):
        assert runner.step({"a": [1]}) == [[]]
    assert page.read()["failures"] == 1
    assert page.read()["drafted"] == drafted
    proposer.set_version(4)
    runner.begin("b", facts(7, TEXT))
    assert runner.step({"a": [1], "b": [1]})[1] == [2, 3, 4, 5, 6]
    assert page.read()["drafted"] > drafted
    for _ in range(12):
        runner.step({"b": [1]})
    assert page.read()["failures"] == 2
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_drafts_leave_room_for_every_row_in_the_step() -> None:
    runner, _, _ = started(batched_tokens=16)  # 12 for drafts, and a token for each row
    for index in range(4):
        runner.begin(str(index), facts(7, TEXT))
    assert runner.step({str(index): [1] for index in range(4)}) == [[2, 3]] * 4
    runner.begin("alone", facts(7, TEXT))
    runner.requests = {"alone": runner.requests["alone"]}
    assert runner.step({"alone": [1]}) == [[2, 3, 4, 5, 6]]


def test_ten_thousand_problems_and_requests_without_facts() -> None:
    runner, _, page = started()
    for problem in range(10_000):
        runner.begin(str(problem), facts(problem, TEXT) if problem % 2 else None)
        runner.step({str(problem): [1]})
        del runner.requests[str(problem)]
    assert page.read()["proposals"] == 10_000
    assert page.read()["failures"] == 0


def test_only_pure_decode_steps_are_called_so() -> None:
    runner, proposer, _ = started()
    told: list[tuple[bool, int]] = []
    drafter: Any = proposer._drafter
    propose = drafter.propose

    def note(*given: Any, decode_only: bool, num_scheduled_tokens: int) -> Any:
        told.append((decode_only, num_scheduled_tokens))
        return propose(*given, decode_only=decode_only, num_scheduled_tokens=num_scheduled_tokens)

    drafter.propose = note
    runner.begin("a", facts(7, TEXT))
    runner.begin("b", facts(7, TEXT))
    runner.step({"a": [1]}, computed=3)
    runner.step({"a": [2]}, computed=4)
    runner.step({"a": [3], "b": []}, computed=2)
    runner.step({"a": [3], "b": [1]}, computed=7)  # more than a token and a draft: the end of b's prompt
    runner.step({"a": [3], "b": [1]}, computed=6)
    assert told == [(False, 3), (True, 4), (False, 4), (False, 14), (True, 12)]


def test_a_prompt_is_its_problem_where_none_is_named() -> None:
    prompt = np.array([1, 2, 3], np.int32)
    assert problem_key(prompt) == problem_key(prompt.copy()) != problem_key(prompt[:2])
    assert 0 <= problem_key(prompt) < 1 << 64


def test_a_request_near_its_end_does_not_keep_vllm_from_asking() -> None:
    runner, _, _ = started()
    assert runner.effective_drafter_max_model_len == CONTEXT + LONGEST


def test_before_it_is_started_it_drafts_nothing() -> None:
    proposer = Proposer(
        SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=100),
            model_config=SimpleNamespace(max_model_len=CONTEXT, get_vocab_size=lambda: VOCABULARY),
            speculative_config=SimpleNamespace(num_speculative_tokens=LONGEST),
        )
    )
    proposer.set_version(3)
    assert proposer.propose([[1], []], np.array([3, 3]), None) == [[], []]


class Instant:
    """A drafter that costs nothing, so that what is timed is ours."""

    def __init__(self, drafts: np.ndarray, num_drafts: np.ndarray) -> None:
        self._answer = drafts, num_drafts

    def propose(self, *_: Any, **__: Any) -> Any:
        return self._answer

    def counters(self) -> dict[str, float]:
        return dict.fromkeys(FIELDS, 1.0)


def test_256_rows_cost_little() -> None:
    """Measured about 100 microseconds; the bound allows for a busy machine."""
    rows = 256
    runner, proposer, _ = started(sequences=rows, batched_tokens=8192)
    for index in range(rows):
        runner.begin(str(index), facts(7))
    runner.step({str(index): [1] for index in range(rows)})
    proposer._drafter = Instant(np.ones((rows, LONGEST), np.int32), np.full(rows, 3, np.int32))  # type: ignore[assignment]
    sampled = [[1, 2, 3]] * rows
    times = []
    for _ in range(200):
        started_at = time.perf_counter()
        proposer.propose(sampled, runner.num_tokens, None)
        times.append(time.perf_counter() - started_at)
    assert np.percentile(times, 10) < 400e-6


def test_counters_cross_processes(tmp_path: Path) -> None:
    page = CounterPage.create()
    CounterPage.open(page.path).write({"drafted": 3, "propose_s": 0.25, "unknown": 1})
    assert page.read()["drafted"] == 3
    assert page.read()["propose_s"] == 0.25
    assert sum(page.read().values()) == 3.25
    path = page.path
    page.close()
    page.close()
    with pytest.raises(OSError, match="No such file"):
        CounterPage.open(path)
