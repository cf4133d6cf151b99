"""What `bench_bus` compares the codec with: the same groups in other encodings, over the same kind of sockets.

All begin with the arrays of each completion that an engine gives, and end with arrays that a learner can use.
"""

import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import zmq
from bus_load import MAX_MESSAGE_BYTES, make_group

from databus.codec import Frame, decode_header, encode_header
from databus.groups import Group, decode_group, encode_group
from databus.messages import Completed
from databus.transport import make_socket

WINDOW = 32
"""Groups under way that the receiver has not taken yet."""
WARM_UP_GROUPS = 8
PATIENCE_MS = 60_000


Completion = dict[str, Any]
"""What an engine gives, and what a learner wants back: prompt_ids, token_ids, logprobs and loss_mask as arrays."""


class Codec(NamedTuple):
    """encode: from a group's completions to messages. decode: from one message to arrays. messages: for one group."""

    encode: Callable[[list[Completion]], list[Sequence[Frame]]]
    decode: Callable[[Sequence[Frame]], object]
    is_one_message: bool


class Trajectory(msgspec.Struct):
    """One completion as lists, as peers send it."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    loss_mask: list[int]
    reward: float
    version: int


DTYPES = {"prompt_ids": np.int32, "token_ids": np.int32, "logprobs": np.float32, "loss_mask": np.uint8}


def columns_codec() -> Codec:
    """Ours: a group is a header and raw column frames. Decoding checks whatever the broker checks."""
    decoder = msgspec.msgpack.Decoder(Completed)

    def encode(completions: list[Completion]) -> list[Sequence[Frame]]:
        columns, frames = encode_group(_group(completions))
        header = encode_header(Completed(group_id="0" * 32, columns=columns, reward_names=("reward",)))
        return [[header, *frames]]

    def decode(frames: Sequence[Frame]) -> Group:
        header = decode_header(frames[0], decoder)
        return decode_group(header.columns, frames[1:])

    return Codec(encode, decode, is_one_message=True)


def lists_codec() -> Codec:
    """msgspec, lists of numbers, a message a completion."""
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Trajectory)

    def encode(completions: list[Completion]) -> list[Sequence[Frame]]:
        lists = [each | {name: each[name].tolist() for name in DTYPES} for each in completions]
        return [[encoder.encode(Trajectory(**each))] for each in lists]

    def decode(frames: Sequence[Frame]) -> Completion:
        trajectory = decoder.decode(frames[0])
        return {name: np.array(getattr(trajectory, name), dtype) for name, dtype in DTYPES.items()}

    return Codec(encode, decode, is_one_message=False)


def pickle_codec() -> Codec:
    """Protocol 5 of arrays, a message a completion: what `send_pyobj` and its like do."""
    return Codec(
        lambda completions: [[pickle.dumps(each, protocol=5)] for each in completions],
        lambda frames: pickle.loads(frames[0]),  # from this benchmark's own process
        is_one_message=False,
    )


def pickled_groups_codec() -> Codec:
    """Protocol 5, a message a group."""
    return Codec(
        lambda completions: [[pickle.dumps(completions, protocol=5)]],
        lambda frames: pickle.loads(frames[0]),  # from this benchmark's own process
        is_one_message=True,
    )


CODECS: dict[str, Callable[[], Codec]] = {
    "columns": columns_codec,
    "msgspec lists": lists_codec,
    "pickle 5": pickle_codec,
    "pickle 5, groups": pickled_groups_codec,
}


def _completions(group: Group) -> list[Completion]:
    ends = np.cumsum(group.lengths)
    return [
        {
            "prompt_ids": group.prompt_ids,
            "token_ids": group.token_ids[end - length : end],
            "logprobs": group.logprobs[end - length : end],
            "loss_mask": group.loss_mask[end - length : end],
            "reward": float(reward),
            "version": int(group.version_values[0]),
        }
        for end, length, reward in zip(ends, group.lengths, group.rewards, strict=True)
    ]


def _group(completions: list[Completion]) -> Group:
    """As a worker makes it: `rollout.groups_out`."""
    lengths = np.array([len(each["token_ids"]) for each in completions], np.int32)
    rewards = np.array([each["reward"] for each in completions], np.float32)
    return Group(
        prompt_ids=completions[0]["prompt_ids"],
        lengths=lengths,
        token_ids=np.concatenate([each["token_ids"] for each in completions]),
        logprobs=np.concatenate([each["logprobs"] for each in completions]),
        loss_mask=np.concatenate([each["loss_mask"] for each in completions]),
        version_values=np.array([completions[0]["version"]], np.int32),
        version_lengths=np.array([lengths.sum()], np.int32),
        rewards=rewards,
        reward_parts=rewards[:, None],
        truncated=np.zeros(len(completions), np.uint8),
    )


def measure_codec(name: str, group_size: int, tokens: int, num_groups: int) -> float:
    """Completions a second from one process to another, encoding and decoding included.

    On a socket in a folder that nobody else may enter: what arrives is unpickled.
    """
    folder = tempfile.TemporaryDirectory()
    address = f"ipc://{folder.name}/codecs"
    context = zmq.Context()
    socket = make_socket(context, zmq.ROUTER, MAX_MESSAGE_BYTES)
    socket.bind(address)
    sender = multiprocessing.get_context("spawn").Process(
        target=_send,
        args=(address, name, group_size, tokens, WARM_UP_GROUPS + num_groups),
        daemon=True,
    )
    sender.start()
    try:
        codec = CODECS[name]()
        messages_a_group = 1 if codec.is_one_message else group_size
        return num_groups * group_size / _receive(socket, codec, num_groups, messages_a_group)
    finally:
        sender.join(PATIENCE_MS / 1000)
        socket.close(linger=0)
        context.term()
        folder.cleanup()


def _send(address: str, name: str, group_size: int, tokens: int, num_groups: int) -> None:
    codec = CODECS[name]()
    completions = _completions(make_group(group_size, tokens))
    with zmq.Context() as context, make_socket(context, zmq.DEALER, MAX_MESSAGE_BYTES) as socket:
        socket.connect(address)
        for index in range(num_groups + WINDOW):
            if index >= WINDOW:
                _wait(socket)
                socket.recv()
            if index < num_groups:
                for message in codec.encode(completions):
                    socket.send_multipart(list(message), copy=False)


def _receive(socket: zmq.Socket, codec: Codec, num_groups: int, messages_a_group: int) -> float:
    """Seconds from the first group after warm-up to the last."""
    started, route = 0.0, zmq.Frame()
    for index in range(WARM_UP_GROUPS + num_groups):
        for _ in range(messages_a_group):
            _wait(socket)
            route, *frames = socket.recv_multipart(copy=False)
            codec.decode([frame.buffer for frame in frames])
        socket.send_multipart([route.bytes, b""])
        if index == WARM_UP_GROUPS - 1:
            started = time.perf_counter()
    return time.perf_counter() - started


def _wait(socket: zmq.Socket) -> None:
    if not socket.poll(PATIENCE_MS):
        raise TimeoutError(f"nothing came within {PATIENCE_MS / 1000:g} s")
