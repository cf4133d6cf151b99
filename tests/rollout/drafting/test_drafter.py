"""The drafter, driven as an engine would drive it, by requests that say known texts."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.config import DraftConfig
from rollout.drafting.automaton import NUM_STATES
from rollout.drafting.drafter import Drafter
from rollout.drafting.index import identity_of
from rollout.drafting.rounds import _looks
from rollout.drafting.running import new_running

VOCABULARY = 50


class Engine:
    """Requests that say what they were told to say; counts the rounds it takes."""

    def __init__(self, **settings: object) -> None:
        config = DraftConfig(**({"policy": "logarithmic", "max_tokens": 8} | settings))  # pyright: ignore[reportArgumentType]
        self.drafter = Drafter(config, max_sequences=8, vocab_size=VOCABULARY, context_tokens=256)
        self.group = 0

    def run(self, texts: list[list[int]], problem: int = 7, history: list[tuple[int, list[int]]] | None = None) -> int:
        """One group. Returns: rounds until the last of it has ended."""
        self.group += 1
        past = [(version, 0, np.array(tokens, np.int32)) for version, tokens in history or []]
        prompt = np.array([1, 2, 3], np.int32)
        begun = {
            self.drafter.add(
                problem=problem, prompt_ids=prompt, history=past, group=self.group, max_tokens=200, predicted_tokens=0
            ): text
            for text in texts
        }
        said = dict.fromkeys(begun, 0)
        new = {slot: text[:1] for slot, text in begun.items()}
        rounds = 0
        while begun:
            rounds += 1
            slots = np.array(list(begun), np.int32)
            tokens = np.array([token for slot in begun for token in new[slot]], np.int32)
            counts = np.array([len(new[slot]) for slot in begun], np.int32)
            drafts, num = self.drafter.propose(
                slots, tokens, counts, decode_only=True, num_scheduled_tokens=int(num_tokens(counts))
            )
            for row, slot in enumerate(slots.tolist()):
                said[slot] += len(new[slot])
                rest = begun[slot][said[slot] :]
                if not rest:
                    self.drafter.remove(slot)
                    del begun[slot]
                    continue
                kept = 0
                while kept < min(num[row], len(rest)) and drafts[row, kept] == rest[kept]:
                    kept += 1
                new[slot] = rest[: kept + 1]
        return rounds


def num_tokens(counts: np.ndarray) -> int:
    return int(counts.sum())


def text(seed: int, length: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(4, VOCABULARY, length).tolist()


def test_a_text_said_before_is_drafted_whole() -> None:
    engine = Engine()
    assert engine.run([text(0)]) == 60
    assert engine.run([text(0)]) < 20
    counters = engine.drafter.counters()
    assert counters["accepted"] == counters["accepted_epoch"] + counters["accepted_common"] > 40


def test_what_has_long_found_nothing_looks_less_often_until_its_text_repeats() -> None:
    running = new_running(1, 8, 100)
    looked = []
    for running.barren[0] in range(24):
        looked.append(bool(_looks(running, 0)))
    assert looked == [True] * 17 + [False, False, False, True, False, False, False]
    running.length[0] = 3
    assert _looks(running, 0)
    unheard_of = list(range(4, 44))
    assert Engine().run([unheard_of * 2]) <= 40 + 3 + 8


def test_running_siblings_draft_from_each_other() -> None:
    engine = Engine()
    ahead, behind = text(0), [*text(1, 30), *text(0)]
    engine.run([ahead, behind])
    assert engine.drafter.counters()["accepted_sibling"] >= 30


def test_history_that_came_with_the_lease_is_as_good_as_what_was_seen() -> None:
    newcomer = Engine()
    assert newcomer.run([text(0)], history=[(0, text(0))]) < 20


def test_history_is_taken_in_once() -> None:
    engine = Engine()
    engine.run([text(0)], history=[(0, text(1))])
    before = engine.drafter.counters()["index_tokens"]
    engine.run([text(2)], history=[(0, text(1)), (0, text(1))])
    # the new text, here and in the automaton of all problems
    assert engine.drafter.counters()["index_tokens"] - before <= 2 * (60 + 2)


def test_a_completion_of_ones_own_that_comes_back_as_history_is_known() -> None:
    engine = Engine()
    engine.run([text(0)])
    before = engine.drafter.counters()["index_tokens"]
    own = (0, identity_of(engine.group, np.array(text(0), np.int32)), np.array(text(0), np.int32))
    slot = engine.drafter.add(problem=7, prompt_ids=np.array([1, 2, 3], np.int32), history=[own], max_tokens=9)
    engine.drafter.remove(slot)
    assert engine.drafter.counters()["index_tokens"] == before + 1


def test_nothing_is_drafted_for_a_request_that_has_ended() -> None:
    drafter = Drafter(DraftConfig(policy="logarithmic"), max_sequences=2, vocab_size=9, context_tokens=64)
    said = np.array([5, 6, 5, 7], np.int32)
    slot = drafter.add(
        problem=1, prompt_ids=np.array([1], np.int32), history=[(0, 0, said)], max_tokens=30, end_tokens=(6,)
    )
    slots, one = np.array([slot], np.int32), np.array([1], np.int32)
    for token, some in ((5, True), (6, False)):
        _, num = drafter.propose(slots, np.array([token], np.int32), one, decode_only=True, num_scheduled_tokens=1)
        assert bool(num[0]) == some


def test_what_the_window_has_left_is_forgotten() -> None:
    engine = Engine(window_versions=2)
    engine.run([text(0)])
    engine.drafter.set_version(3)
    assert engine.run([text(0)], problem=7) == 60


def test_history_older_than_the_window_is_skipped() -> None:
    engine = Engine(window_versions=2)
    engine.drafter.set_version(9)
    assert engine.run([text(0)], history=[(6, text(0))]) == 60


def test_other_problems_help_through_the_common_automaton() -> None:
    engine = Engine()
    for problem in range(20, 40):
        engine.run([text(0)], problem=problem)
    assert engine.run([text(0)], problem=99) < 20
    assert engine.drafter.counters()["accepted_common"] > 30


def test_never_drafts_past_what_a_request_may_say() -> None:
    drafter = Drafter(DraftConfig(policy="logarithmic", max_tokens=8), max_sequences=2, vocab_size=9, context_tokens=64)
    prompt, said = np.array([1], np.int32), np.array([5, 6, 7, 8, 5], np.int32)
    slot = drafter.add(problem=1, prompt_ids=prompt, history=[(0, 0, said)], max_tokens=3)
    slots, one = np.array([slot], np.int32), np.array([1], np.int32)
    for token, most in ((5, 1), (6, 0), (7, 0)):
        _, num = drafter.propose(slots, np.array([token], np.int32), one, decode_only=True, num_scheduled_tokens=1)
        assert num[0] <= most


def test_ten_thousand_problems_stay_within_the_cap() -> None:
    drafter = Drafter(
        DraftConfig(policy="marginal", index_tokens=20_000), max_sequences=2, vocab_size=99, context_tokens=64
    )
    rng = np.random.default_rng(0)
    largest = 0.0
    for problem in range(1, 10_001):
        slot = drafter.add(problem=problem, prompt_ids=np.array([problem % 99], np.int32), max_tokens=20)
        slots, counts = np.array([slot], np.int32), np.array([20], np.int32)
        drafter.propose(
            slots, rng.integers(0, 99, 20).astype(np.int32), counts, decode_only=True, num_scheduled_tokens=1
        )
        drafter.remove(slot)
        largest = max(largest, drafter.counters()["index_tokens"]) if problem % 100 == 0 else largest
    assert 10_000 < largest <= 20_000 + 64
    assert drafter._index.arena.registers[NUM_STATES] < 2 * 20_064 + 10_000


@pytest.mark.parametrize(
    "wrong", [np.array([50], np.int32), np.array([-1], np.int32), np.array([[1]], np.int32), np.array([1.5])]
)
def test_wrong_token_ids_are_refused_and_cost_no_slot(wrong: np.ndarray) -> None:
    drafter = Engine().drafter
    for _ in range(20):
        with pytest.raises(ValueError, match="token ids must"):
            drafter.add(problem=1, prompt_ids=wrong, max_tokens=3)
    for _ in range(20):
        with pytest.raises(ValueError, match="token ids must"):
            drafter.add(problem=2, prompt_ids=np.array([1], np.int32), history=[(0, 0, wrong)], max_tokens=3)
    assert [drafter.add(problem=1, prompt_ids=np.array([1], np.int32), max_tokens=3) for _ in range(8)]
    with pytest.raises(ValueError, match="more than 8 requests at once"):
        drafter.add(problem=1, prompt_ids=np.array([1], np.int32), max_tokens=3)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_happens_the_totals_are_right(data: st.DataObject) -> None:
    """Groups, versions and evictions in any order; afterwards the index holds what it says it holds."""
    engine = Engine(window_versions=3, index_tokens=3000)
    for version in range(data.draw(st.integers(1, 12))):
        engine.drafter.set_version(version)
        texts = [text(seed, 40) for seed in data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))]
        engine.run(texts, problem=data.draw(st.integers(1, 4)))
    index = engine.drafter._index
    assert index.num_tokens == index.common.written + sum(problem.written for problem in index)
    for problem in [index.common, *index]:
        assert problem.counted == len(problem.prompt) + 1 + sum(len(each.tokens) + 1 for each in problem.texts)
        assert problem.counted <= problem.written and not problem.running
    texts = sum(each.tokens.nbytes for problem in [index.common, *index] for each in problem.texts)
    assert index.num_bytes == texts + sum(array.nbytes for array in index.arena)


def test_policy_off_drafts_nothing() -> None:
    engine = Engine(policy="off")
    engine.run([text(0)])
    assert engine.run([text(0)]) == 60 and engine.drafter.counters()["drafted"] == 0
