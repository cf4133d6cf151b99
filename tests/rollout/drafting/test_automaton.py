"""The automaton against a list of all substrings."""

from collections import Counter

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.drafting.automaton import (
    COUNT,
    DEPTH,
    NUM_EDGES,
    NUM_STATES,
    Arena,
    count_out,
    follow,
    free_automaton,
    goto,
    grow,
    has_room,
    likeliest,
    new_arena,
    new_state,
    shorten,
    write,
)

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=6)


class Automaton:
    """One automaton, texts growing in any order, and beside it what it should know."""

    def __init__(self, arena: Arena | None = None) -> None:
        self.arena = arena or new_arena(4096, 4096)
        self.root = int(new_state(self.arena, 0, -1))
        self.cursors: dict[int, tuple[int, int, int]] = {}
        self.texts: dict[int, list[int]] = {}

    def grow(self, name: int, tokens: list[int]) -> None:
        cursor = self.cursors.get(name, (self.root, self.root, 0))
        self.cursors[name] = write(self.arena, *cursor, np.array(tokens, np.int32), 3, name)
        self.texts.setdefault(name, []).extend(tokens)

    def forget(self, name: int) -> None:
        count_out(self.arena, self.root, 0, np.array(self.texts.pop(name), np.int32))
        del self.cursors[name]

    def places(self) -> Counter[tuple[int, ...]]:
        """How often every substring occurs."""
        found: Counter[tuple[int, ...]] = Counter()
        for text in self.texts.values():
            for end in range(1, len(text) + 1):
                for start in range(end):
                    found[tuple(text[start:end])] += 1
        return found

    def state(self, context: tuple[int, ...]) -> int:
        state = self.root
        for token in context:
            state = int(goto(self.arena, state, token))
        return state

    def check(self) -> None:
        places = self.places()
        for context, count in places.items():
            if len(context) <= DEPTH:
                assert self.arena.states[self.state(context), COUNT] == count, context
        for context in {context[:-1] for context in places if len(context) <= DEPTH}:
            ways = {context_[-1]: n for context_, n in places.items() if context_[:-1] == context}
            token, _, best, total = likeliest(self.arena, self.state(context))
            assert (best, total) == (max(ways.values()), sum(ways.values()))
            assert ways[token] == best


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(texts=TEXTS, data=st.data())
def test_counts_every_context_of_texts_that_grow_together(texts: list[list[int]], data: st.DataObject) -> None:
    automaton = Automaton()
    order = data.draw(st.permutations([name for name, text in enumerate(texts) for _ in text]))
    taken: Counter[int] = Counter()
    for name in order:
        automaton.grow(name, [texts[name][taken[name]]])
        taken[name] += 1
    automaton.check()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(texts=TEXTS, more=TEXTS, data=st.data())
def test_counts_follow_the_texts_that_are_left(
    texts: list[list[int]], more: list[list[int]], data: st.DataObject
) -> None:
    automaton = Automaton()
    for name, text in enumerate(texts):
        automaton.grow(name, text)
    for name in data.draw(st.sets(st.sampled_from(range(len(texts))))):
        automaton.forget(name)
    automaton.check()
    for name, text in enumerate(more):
        automaton.grow(100 + name, text)
    automaton.check()


def test_counts_are_exact_up_to_their_depth_in_a_text_that_repeats_itself() -> None:
    automaton = Automaton()
    automaton.grow(0, [1] * (3 * DEPTH))
    for length in (1, 2, DEPTH - 1, DEPTH):
        assert automaton.arena.states[automaton.state((1,) * length), COUNT] == 3 * DEPTH - length + 1
    automaton.forget(0)
    assert automaton.arena.states[automaton.state((1,)), COUNT] == 0


def test_a_state_with_thousands_of_ways_on() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 3000, 20_000).astype(np.int32)
    arena = grow(new_arena(64, 64), 50_000, 30_000)
    root = int(new_state(arena, 0, -1))
    arena = grow(arena, 50_000, 30_000)
    done = 0
    cursor = (root, root, 0)
    for chunk in np.array_split(text, 200):
        if not has_room(arena, done, len(chunk)):
            arena = grow(arena, 50_000, 30_000)
        cursor = write(arena, *cursor, chunk, 0, 0)
        done += len(chunk)
    counts = np.bincount(text, minlength=3000)
    for token in range(0, 3000, 7):
        state = int(goto(arena, root, token))
        assert (arena.states[state, COUNT] if state >= 0 else 0) == counts[token]
    free_automaton(arena, root)
    assert arena.registers[NUM_STATES] == arena.registers[NUM_EDGES] == 0


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(texts=TEXTS)
def test_a_freed_automaton_leaves_its_room_and_others_alone(texts: list[list[int]]) -> None:
    kept = Automaton()
    kept.grow(0, [0, 1, 2, 0, 1])
    before = kept.arena.registers[[NUM_STATES, NUM_EDGES]].tolist()
    other = Automaton(kept.arena)
    for name, text in enumerate(texts):
        other.grow(name, text)
    free_automaton(kept.arena, other.root)
    assert kept.arena.registers[[NUM_STATES, NUM_EDGES]].tolist() == before
    again = Automaton(kept.arena)
    for name, text in enumerate(texts):
        again.grow(name, text)
    again.check()
    kept.check()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(texts=TEXTS, query=st.lists(st.integers(0, 3), max_size=40))
def test_follow_finds_the_longest_context_that_is_known(texts: list[list[int]], query: list[int]) -> None:
    automaton = Automaton()
    for name, text in enumerate(texts):
        automaton.grow(name, text)
    known = set(automaton.places())
    state, length = automaton.root, 0
    for end in range(1, len(query) + 1):
        state, length = follow(automaton.arena, state, length, query[end - 1])
        longest = max((n for n in range(1, end + 1) if tuple(query[end - n : end]) in known), default=0)
        assert length == longest
        assert state == shorten(automaton.arena, automaton.state(tuple(query[end - longest : end])), longest)
