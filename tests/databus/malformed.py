"""Messages that no peer of ours would send, drawn at random: whatever a hostile or broken peer can put on the wire."""

import random
from collections.abc import Callable

import msgspec
import numpy as np
from scripted import make_group

from databus.codec import decode_columns, encode_columns, encode_header
from databus.groups import encode_group
from databus.messages import (
    BatchRequest,
    Column,
    Completed,
    Credits,
    Failed,
    Goodbye,
    Heartbeat,
    Hello,
    Mismatch,
    PositionRequest,
    Released,
    StatusRequest,
    StepDone,
    VersionApplied,
    VersionPublished,
    VersionRefused,
)
from databus.transport import MAX_FRAMES

Frames = list[bytes]

FOR_LEARNERS = (
    BatchRequest(step=0),
    StepDone(step=0, metrics={"loss/policy": 0.0}),
    VersionPublished(version=10**6, address="tcp://127.0.0.1:1", num_bytes=1),
    PositionRequest(step=0),
)
VALID = (
    *FOR_LEARNERS,
    Hello(role="worker", name="w", max_sequences=4),
    Heartbeat(running_sequences=3),
    Failed(group_id="0" * 32, cause="engine", error="x"),
    Released(group_ids=("0" * 32,)),
    VersionApplied(version=0, mismatch=Mismatch(kl=0.1, difference=1.0)),
    VersionRefused(version=0, mismatch=Mismatch(kl=0.1, difference=1.0), reason="x"),
    StatusRequest(),
)
TAGS = [type(message).__name__ for message in (*VALID, Completed(group_id="", columns=()), Goodbye(), Credits(total=1))]
LENGTH_CODES = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
"""msgpack: array32, map32, bin32, str32, ext32."""


class Malformed:
    """Draws messages. Each kind in `answered` is answered by the broker, or it is a defect."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.answered: tuple[Callable[[], Frames], ...] = (
            self.noise,
            self.no_header,
            self.wrong_types,
            self.huge_length,
            self.deep_nesting,
            self.columns_and_frames_differ,
            self.columns_that_lie,
            self.group_of_nobody,
            self.values_out_of_range,
            self.message_for_a_learner,
            self.hello_that_is_refused,
        )
        self.rare: tuple[Callable[[], Frames], ...] = (self.too_many_frames, self.endless_names)
        self.perhaps_valid: tuple[Callable[[], Frames], ...] = (self.truncated, self.flipped)

    def draw(self) -> tuple[Frames, bool]:
        """A message, and whether it must be answered."""
        kind = self._random.random()
        if kind < 0.002:
            return self._random.choice(self.rare)(), True
        if kind < 0.2:
            return self._random.choice(self.perhaps_valid)(), False
        return self._random.choice(self.answered)(), True

    # ------------------------------------------------------------ headers

    def noise(self) -> Frames:
        # A byte that msgpack never uses keeps chance from making a message of it.
        return [b"\xc1" + self._random.randbytes(self._random.randrange(200))]

    def no_header(self) -> Frames:
        return [b""] * self._random.randint(1, 5)

    def truncated(self) -> Frames:
        header = self._valid()
        return [header[: self._random.randrange(len(header))]]

    def flipped(self) -> Frames:
        header = bytearray(self._valid())
        for _ in range(self._random.randint(1, 4)):
            header[self._random.randrange(len(header))] ^= 1 << self._random.randrange(8)
        return [bytes(header)]

    def wrong_types(self) -> Frames:
        """The right names with values of another type; `type` itself is one of them at times."""
        message = msgspec.to_builtins(self._random.choice(VALID))
        for name in message:
            if name != "type" or self._random.random() < 0.2:
                message[name] = self._random.choice([None, [[]], {"a": {}}, -1.5, b"\xff", True])
        message.setdefault("type", 7)
        if message.keys() == {"type"}:
            message["type"] = None
        return [msgspec.msgpack.encode(message)]

    def huge_length(self) -> Frames:
        """A length of 4 GiB that no bytes follow."""
        length = self._random.choice(LENGTH_CODES) + b"\xff\xff\xff\xff"
        if self._random.random() < 0.5:
            return [length]
        return [b"\x82\xa4type" + msgspec.msgpack.encode(self._random.choice(TAGS)) + b"\xa7columns" + length]

    def deep_nesting(self) -> Frames:
        depth = self._random.choice([100, 1000, 100_000])
        return [self._random.choice([b"\x91", b"\x81\xa1a"]) * depth]

    # ------------------------------------------------------------ groups

    def columns_and_frames_differ(self) -> Frames:
        """Frames are missing, are too many, or have another length than their column says."""
        header, *frames = self._group()
        index = self._random.randrange(len(frames))
        change = self._random.randrange(3)
        if change == 0:
            del frames[index]
        elif change == 1:
            frames.insert(index, self._random.randbytes(8))
        else:
            frames[index] += b"\0"
        return [header, *frames]

    def columns_that_lie(self) -> Frames:
        """Shapes that overflow, types that would run code, names that are not there or there twice."""
        names = ["token_ids", "lengths", "__class__", "x" * 300, ""]
        dtypes = ["|O", "<f8", "<i4", "|V8", "(2,)<i4", "i", "<U9", ""]
        shapes = [(2**62, 4), (-1,), (0,) * 5, (2**31,), (1,), ()]
        columns = tuple(
            Column(
                name=self._random.choice(names),
                dtype=self._random.choice(dtypes),
                shape=self._random.choice(shapes),
            )
            for _ in range(self._random.randint(1, 10))
        )
        frames = [self._random.randbytes(self._random.randrange(64)) for _ in columns]
        return [encode_header(Completed(group_id="0" * 32, columns=columns)), *frames]

    def group_of_nobody(self) -> Frames:
        """Right in itself, but never leased: it is acknowledged, and dropped."""
        return self._group()

    def values_out_of_range(self) -> Frames:
        changes = {
            "logprobs": np.float32(self._random.choice([np.nan, np.inf, 1.0])),
            "token_ids": np.int32(-1),
            "loss_mask": np.uint8(255),  # bits beyond the last of five tokens
            "lengths": np.int32(-5),
            "version_values": np.int32(-1),
            "rewards": np.float32(np.nan),
        }
        name = self._random.choice(list(changes))
        return self._group({name: changes[name]})

    # ------------------------------------------------------------ roles and limits

    def message_for_a_learner(self) -> Frames:
        return [encode_header(self._random.choice(FOR_LEARNERS))]

    def hello_that_is_refused(self) -> Frames:
        hello = self._random.choice(
            [
                Hello(role="worker", name="somebody-else"),
                Hello(role="learner", name="x" * self._random.choice([1, 100_000])),
                Hello(role="worker", name="", protocol=-1),
            ]
        )
        return [encode_header(hello)]

    def too_many_frames(self) -> Frames:
        return [self._valid(), *[b"x"] * (MAX_FRAMES + self._random.randrange(1000))]

    def endless_names(self) -> Frames:
        """A million bytes that the broker must neither keep nor send back."""
        column = Column(name="x" * 1_000_000, dtype="<i4", shape=(0,))
        return [encode_header(Completed(group_id="0" * 32, columns=(column,))), b""]

    def _valid(self) -> bytes:
        return encode_header(self._random.choice(VALID))

    def _group(self, changes: dict[str, np.generic] | None = None) -> Frames:
        encoded = encode_group(make_group([1, 2], [[0, 0, 0], [0, 0]], loss_mask=[1, 1, 1, 1, 0]))
        arrays = {name: array.copy() for name, array in decode_columns(*encoded).items()}
        for name, value in (changes or {}).items():
            arrays[name].flat[0] = value
        columns, frames = encode_columns(arrays)
        group_id = self._random.randbytes(16).hex()
        header = encode_header(Completed(group_id=group_id, columns=columns, reward_names=("reward",)))
        return [header, *map(bytes, frames)]
