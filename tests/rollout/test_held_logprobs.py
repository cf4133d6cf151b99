from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rollout.engine.held_logprobs import HELD_TOKENS, HeldLogprobs


class LogprobsLists(NamedTuple):
    """vLLM's, by its fields."""

    logprob_token_ids: np.ndarray
    logprobs: np.ndarray
    sampled_token_ranks: np.ndarray
    cu_num_generated_tokens: list[int] | None = None


class Output:
    """As much of vLLM's `EngineCoreOutput` as is looked at."""

    def __init__(self, request_id: str, tokens: list[int], finished: bool, logprobs: bool = True) -> None:
        self.request_id = request_id
        self.new_token_ids = tokens
        self.finished = finished
        column = np.array(tokens, np.int32)[:, None]
        self.new_logprobs: Any = LogprobsLists(column, -column / 8, column[:, 0]) if tokens and logprobs else None


Steps = st.lists(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans()), max_size=3, unique_by=lambda of: of[0]
    ),
    max_size=40,
)


@given(Steps, st.sampled_from([1, 1000]))
def test_each_request_has_the_logprobs_of_all_its_tokens(
    steps: list[list[tuple[str, int, bool]]], interval: int
) -> None:
    held, ended, counter = HeldLogprobs(), set[str](), 0
    tokens, seen = defaultdict[str, list[int]](list), defaultdict[str, list[LogprobsLists]](list)
    for step in steps:
        outputs = []
        for request_id, count, finished in step:
            if request_id not in ended:
                outputs.append(Output(request_id, list(range(counter, counter + count)), finished))
                counter += count
        held.pass_through(outputs, lambda _: interval)
        for output in outputs:
            tokens[output.request_id] += output.new_token_ids
            if output.new_logprobs is not None:
                seen[output.request_id].append(output.new_logprobs)
            if output.finished:
                ended.add(output.request_id)
    for request_id in tokens if interval == 1 else ended:
        fields = [np.concatenate([each[field] for each in seen[request_id]]) for field in range(3)]
        assert fields[0].tolist() == [[token] for token in tokens[request_id]]
        assert fields[1].tolist() == [[-token / 8] for token in tokens[request_id]]
        assert fields[2].tolist() == tokens[request_id]
    assert len(held) <= len(set(tokens) - ended)
    held.keep_only({"a"})
    assert len(held) <= 1


def test_no_more_is_held_than_there_is_room_for() -> None:
    held = HeldLogprobs()
    sizes = []
    for token in range(HELD_TOKENS + 5):
        held.pass_through([output := Output("a", [token], finished=False)], lambda _: 10_000)
        sizes.append(0 if output.new_logprobs is None else len(output.new_logprobs.logprobs))
    assert [size for size in sizes if size] == [HELD_TOKENS]
    held.pass_through([output := Output("a", [], finished=True)], lambda _: 10_000)
    assert output.new_logprobs.sampled_token_ranks.tolist() == list(range(HELD_TOKENS, HELD_TOKENS + 5))
    assert len(held) == 0


def test_what_has_none_is_let_through() -> None:
    held = HeldLogprobs()
    for finished in (False, True):
        held.pass_through([output := Output("a", [1], finished, logprobs=False)], lambda _: 10_000)
        assert output.new_logprobs is None and len(held) == 0
