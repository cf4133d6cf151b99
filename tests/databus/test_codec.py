import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from databus.codec import (
    DTYPES,
    MalformedMessage,
    decode_columns,
    decode_header,
    encode_columns,
    encode_header,
    frame_sizes,
)
from databus.messages import Column, Credits, Failed, Heartbeat, Lease, Released, Sampling, ToBroker, VersionApplied

arrays = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=12))
)
to_broker = msgspec.msgpack.Decoder(ToBroker)
words = st.text(max_size=20)


@given(st.dictionaries(words, arrays, max_size=5))
def test_columns_round_trip(columns: dict[str, np.ndarray]) -> None:
    heads, frames = encode_columns(columns)
    decoded = decode_columns(heads, [bytes(frame) for frame in frames])
    assert decoded.keys() == columns.keys()
    for name, array in columns.items():
        assert decoded[name].dtype == array.dtype and decoded[name].shape == array.shape
        assert decoded[name].tobytes() == array.tobytes()
        assert not decoded[name].flags.writeable


messages = st.one_of(
    st.builds(Credits, total=st.integers(0, 2**40)),
    st.builds(Failed, group_id=words, cause=st.sampled_from(["engine", "reward"]), error=words),
    st.builds(Released, group_ids=st.lists(words).map(tuple)),
    st.builds(VersionApplied, version=st.integers(0, 2**31), pause_s=st.floats(0, 1e6)),
    st.builds(Heartbeat, running_sequences=st.integers(0, 1000)),
)


@given(messages)
def test_headers_round_trip(message: msgspec.Struct) -> None:
    assert decode_header(encode_header(message), to_broker) == message


def test_lease_round_trips_exactly() -> None:
    lease = Lease(
        group_id="g", cursor=3, attempt=1, purpose="train", prompt="1+1=", prompt_ids=(4, 5), problem=b'{"a": 1}',
        group_size=2, sampling=Sampling(max_tokens=5, temperature=0.7), lease_s=1.5,
    )  # fmt: skip
    assert decode_header(encode_header(lease), msgspec.msgpack.Decoder(Lease)) == lease


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    try:
        message = decode_header(data, to_broker)
    except MalformedMessage:
        return
    assert isinstance(message, msgspec.Struct)


@given(messages, st.data())
def test_truncated_headers_are_malformed(message: msgspec.Struct, data: st.DataObject) -> None:
    whole = encode_header(message)
    with pytest.raises(MalformedMessage):
        decode_header(whole[: data.draw(st.integers(0, len(whole) - 1))], to_broker)


def test_deep_nesting_is_malformed_not_a_crash() -> None:
    with pytest.raises(MalformedMessage):
        decode_header(b"\x91" * 100_000 + b"\xc0", to_broker)


@pytest.mark.parametrize(
    ("column", "data", "says"),
    [
        (Column("a", "<i4", (2,)), b"1234567", "7 bytes"),
        (Column("a", "|O", (1,)), b"12345678", "not allowed"),
        (Column("a", "<f8", (1,)), b"12345678", "not allowed"),
        (Column("a", "<i4", (-1,)), b"", "bad shape"),
        (Column("a", "<i4", (1, 1, 1, 1, 1)), b"1234", "bad shape"),
        (Column("a", "<i8", (2**40, 2**40)), b"", "0 bytes"),
        (Column("a", "<i4", (300,)), bytes(1199), "1199 bytes"),
    ],
)
def test_malformed_columns(column: Column, data: bytes, says: str) -> None:
    with pytest.raises(MalformedMessage, match=says):
        decode_columns([column], [data])


def test_columns_and_frames_must_match() -> None:
    column = Column("a", "<i4", (1,))
    large = Column("b", "<i4", (300,))
    with pytest.raises(MalformedMessage, match="2 frames announced, 1 frames"):
        decode_columns([column, large], [bytes(8)])
    with pytest.raises(MalformedMessage, match="twice"):
        decode_columns([column, column], [bytes(16)])


def test_small_columns_share_a_frame_and_large_ones_do_not() -> None:
    given = {
        "one": np.arange(3, dtype=np.uint8),
        "large": np.arange(300, dtype=np.int32),
        "empty": np.zeros((0, 2), np.float32),
        "two": np.arange(128, dtype=np.int64),
    }
    heads, frames = encode_columns(given)
    assert [memoryview(frame).nbytes for frame in frames] == frame_sizes(heads) == [8 + 1024, 1200]
    assert np.shares_memory(np.frombuffer(frames[1], np.int32), given["large"])
    decoded = decode_columns(heads, frames)
    assert all(np.array_equal(decoded[name], array) for name, array in given.items())
    assert all(array.flags.aligned for array in decoded.values())


def test_own_wrong_dtype_is_our_error() -> None:
    with pytest.raises(ValueError, match="'a' has dtype <f8"):
        encode_columns({"a": np.zeros(2)})
