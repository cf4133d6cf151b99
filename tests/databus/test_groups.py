from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scripted import make_group

from databus.codec import MalformedMessage, encode_columns
from databus.groups import GROUP_COLUMNS, decode_group, encode_group, group_from_columns, run_lengths

columns = make_group((1, 2), [[0, 0, 1], [1, 1]]).columns()


@given(st.lists(st.integers(0, 3), max_size=30))
def test_run_lengths_round_trip(values: list[int]) -> None:
    flat = np.array(values, np.int32)
    spans, lengths = run_lengths(flat)
    assert np.repeat(spans, lengths).tolist() == values
    assert (lengths > 0).all() and (spans[1:] != spans[:-1]).all()


def test_good_group_passes() -> None:
    group = group_from_columns(columns)
    assert group.token_versions().tolist() == [0, 0, 1, 1, 1]
    assert (group.size, group.num_tokens, group.oldest_loss_version()) == (2, 5, 0)


def test_oldest_version_counts_loss_bearing_tokens_alone() -> None:
    assert make_group((1,), [[0, 0], [2, 3]], loss_mask=[0, 0, 1, 1]).oldest_loss_version() == 2
    assert make_group((1,), [[0], [0]], loss_mask=[0, 0]).oldest_loss_version() is None


spans = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=4)), max_size=6)


@given(spans)
def test_loss_tokens_are_those_of_the_mask(spans: list[tuple[int, list[int]]]) -> None:
    """Empty spans included: a peer may send them."""
    mask = [bit for _, bits in spans for bit in bits]
    group = replace(
        make_group((1,), [[0] * len(mask)], loss_mask=mask),
        version_values=np.array([version for version, _ in spans], np.int32),
        version_lengths=np.array([len(bits) for _, bits in spans], np.int32),
    )
    versions, tokens = group.loss_tokens
    expected = group.token_versions()[group.loss_mask.astype(bool)]
    assert np.repeat(versions, tokens).tolist() == expected.tolist() and all(tokens)


@pytest.mark.parametrize("name", list(GROUP_COLUMNS))
def test_missing_column(name: str) -> None:
    with pytest.raises(MalformedMessage, match=name):
        group_from_columns({key: value for key, value in columns.items() if key != name})


@pytest.mark.parametrize("name", list(GROUP_COLUMNS))
def test_wrong_dtype(name: str) -> None:
    with pytest.raises(MalformedMessage, match=name):
        group_from_columns(columns | {name: columns[name].astype(np.float64)})


@pytest.mark.parametrize("name", list(GROUP_COLUMNS))
def test_column_too_long(name: str) -> None:
    if name == "prompt_ids":
        return  # any length of prompt is right here; the broker compares it with the lease
    longer = np.concatenate((columns[name], columns[name][-1:]))
    with pytest.raises(MalformedMessage):
        group_from_columns(columns | {name: longer})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids", -1),
        ("prompt_ids", -5),
        ("version_values", -1),
        ("loss_mask", 2),
        ("truncated", 7),
        ("logprobs", np.nan),
        ("logprobs", 0.5),
        ("logprobs", -np.inf),
        ("rewards", np.inf),
        ("reward_parts", np.nan),
    ],
)
def test_bad_values(name: str, value: Any) -> None:
    array = columns[name].copy()
    array.flat[0] = value
    with pytest.raises(MalformedMessage, match=name):
        group_from_columns(columns | {name: array})


def test_lengths_that_only_overflow_into_the_right_sum() -> None:
    lengths = np.array([2**31 - 1, 2**31 - 1, 7], np.int32)  # 5 modulo 2**32
    with pytest.raises(MalformedMessage):
        group_from_columns(columns | {"lengths": lengths})


def _any_array(name: str) -> st.SearchStrategy[np.ndarray]:
    dtype, dimensions = GROUP_COLUMNS[name]
    shapes = hnp.array_shapes(min_dims=dimensions, max_dims=dimensions, min_side=0, max_side=4)
    return hnp.arrays(np.dtype(dtype), shapes)


@given(st.fixed_dictionaries({}, optional={name: _any_array(name) for name in GROUP_COLUMNS}))
def test_whatever_comes_is_a_sound_group_or_malformed(changed: dict[str, np.ndarray]) -> None:
    """No other error, and nothing gets through that later code could stumble over."""
    try:
        group = group_from_columns(columns | changed)
    except MalformedMessage:
        return
    assert group.token_versions().shape == group.token_ids.shape == group.logprobs.shape == group.loss_mask.shape
    assert group.lengths.sum() == group.num_tokens and group.rewards.shape == (group.size,)
    assert np.isfinite(group.logprobs).all() and np.isfinite(group.rewards).all()
    assert min(group.token_ids.min(initial=0), group.version_values.min(initial=0)) >= 0


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=4))
def test_a_mask_of_any_length_survives_the_wire(masks: list[list[int]]) -> None:
    group = make_group((1,), [[0] * len(mask) for mask in masks], [0.0] * len(masks), [bit for m in masks for bit in m])
    heads, frames = encode_group(group)
    assert decode_group(heads, frames).loss_mask.tolist() == group.loss_mask.tolist()
    num_bytes = 0 if all(map(all, masks)) else (group.num_tokens + 7) // 8
    assert next(head.shape for head in heads if head.name == "loss_mask") == (num_bytes,)


@pytest.mark.parametrize("bits", [[0], [0, 1, 0], [0, 2]], ids=["too few", "too many", "one beyond the last"])
def test_bits_that_are_no_mask(bits: list[int]) -> None:
    nine = make_group((1,), [[0] * 9]).columns()
    heads, frames = encode_columns(nine | {"loss_mask": np.array(bits, np.uint8)})
    with pytest.raises(MalformedMessage, match="'loss_mask' is not 9 bits"):
        decode_group(heads, frames)
