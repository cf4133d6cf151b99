"""What is said about moving weights between GPUs: typed on the wire, and never more than its fields."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from databus.address import reachable
from databus.codec import MalformedMessage, decode_header, encode_header
from databus.messages import FromWeightServer, ToWeightServer
from databus.transfers import (
    MAX_HANDLE_BYTES,
    CollectiveOffer,
    DeviceMemory,
    MappedOffer,
    NoTransfer,
    TransferRequest,
    split_scheme,
)

words = st.text(max_size=40)
sizes = st.integers(0, 2**50)
handles = st.binary(max_size=MAX_HANDLE_BYTES)
memories = st.builds(
    DeviceMemory,
    device_uuid=words,
    num_bytes=st.integers(1, 2**50),
    handle=handles,
    offset_bytes=sizes,
    counter=handles,
    counter_offset=sizes,
    event=handles,
    has_event=st.booleans(),
)
versions = st.integers(0, 2**40)
answers = st.one_of(
    st.builds(MappedOffer, version=versions, memory=memories, visible=words),
    st.builds(CollectiveOffer, version=versions, port=st.integers(1, 65535), name=words),
    st.builds(NoTransfer, version=versions, reason=words, is_busy=st.booleans()),
)
from_server: "msgspec.msgpack.Decoder[FromWeightServer]" = msgspec.msgpack.Decoder(FromWeightServer)
to_server: "msgspec.msgpack.Decoder[ToWeightServer]" = msgspec.msgpack.Decoder(ToWeightServer)
MEMORY = DeviceMemory(
    device_uuid="GPU-1",
    num_bytes=10,
    handle=b"h" * 66,
    offset_bytes=512,
    counter=b"/torch_1_2_3",
    counter_offset=0,
    event=b"e" * 64,
    has_event=True,
)


@given(answers)
def test_answers_round_trip(answer: msgspec.Struct) -> None:
    assert decode_header(encode_header(answer), from_server) == answer


@given(versions)
def test_requests_round_trip(version: int) -> None:
    request = TransferRequest(version=version)
    assert decode_header(encode_header(request), to_server) == request


@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        decode_header(data, from_server)


@given(memories, st.integers(0, 7))
def test_memory_is_mapped_with_what_it_was_shared_with(memory: DeviceMemory, device: int) -> None:
    """torch's own tuple, there and back; the number of the device is the mapping process's own."""
    arguments = memory.arguments(device)
    assert arguments[0] == device
    assert DeviceMemory.of(memory.device_uuid, (device + 1, *arguments[1:])) == memory


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_bytes": 0},
        {"num_bytes": -1},
        {"offset_bytes": -1},
        {"counter_offset": -1},
        {"handle": b"x" * (MAX_HANDLE_BYTES + 1)},
        {"counter": b"x" * (MAX_HANDLE_BYTES + 1)},
        {"event": b"x" * (MAX_HANDLE_BYTES + 1)},
    ],
)
def test_memory_that_cannot_be_is_not_mapped(wrong: dict) -> None:
    MEMORY.arguments(0)
    with pytest.raises(ValueError, match="memory"):
        replace(MEMORY, **wrong).arguments(0)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("nccl+tcp://10.0.0.1:5", ("nccl+", "tcp://10.0.0.1:5")),
        ("ipc+ipc:///tmp/a+b", ("ipc+", "ipc:///tmp/a+b")),
        ("ipc:///tmp/nccl+x", ("", "ipc:///tmp/nccl+x")),
        ("shm:///dev/shm/x", ("", "shm:///dev/shm/x")),
    ],
)
def test_addresses_say_how_weights_may_move(address: str, parts: tuple[str, str]) -> None:
    assert split_scheme(address) == parts


def test_an_address_on_every_interface_keeps_its_scheme() -> None:
    assert reachable("nccl+tcp://0.0.0.0:5555", "tcp://10.1.1.1:1") == "nccl+tcp://10.1.1.1:5555"
