"""From the broker's batch to groups, the same on every rank."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from databus.codec import Frame, MalformedMessage, encode_header, frame_sizes
from databus.groups import Group, decode_group
from databus.messages import Batch, BatchRequest
from learner.bus import POLL_S, BrokerLink, RunStoppedError, nothing

WAITING, BATCH, STOPPED, FAILED = range(4)
"""What rank 0 has to tell the other ranks."""


class StalenessViolation(RuntimeError):
    """A batch holds a loss-bearing token that is older than the bound allows, or from the future."""


class BatchFeed:
    """Gets batches from the broker on rank 0 and hands them to all ranks as raw bytes."""

    def __init__(
        self,
        broker: BrokerLink | None,
        rank: int,
        world_size: int,
        max_staleness: int,
        timeout_s: float,
        idle: Callable[[], None] = nothing,
        grace_s: float = POLL_S,
    ) -> None:
        """Args: broker: None on ranks other than 0. timeout_s: how long to wait for one batch. idle: called on every
        rank where a batch is not there within `grace_s`, perhaps several times."""
        self._broker = broker
        self._rank = rank
        self._world_size = world_size
        self._max_staleness = max_staleness
        self._timeout_s = timeout_s
        self._idle = idle
        self._grace_s = grace_s

    def groups(self, step: int) -> list[Group]:
        """The groups that `step` trains, on every rank, checked against the staleness bound once more.

        Raises: RunStoppedError; StalenessViolation; RuntimeError if no batch comes in time or what comes is malformed.
        """
        batch, frames = self._from_broker(step) if self._broker is not None else self._from_first_rank()
        try:
            groups = decode_batch(batch, frames)
        except MalformedMessage as error:
            raise RuntimeError(f"batch {step} cannot be read: {error}") from None
        check_staleness(groups, step, self._max_staleness)
        return groups

    def _from_broker(self, step: int) -> tuple[Batch, Sequence[Frame]]:
        assert self._broker is not None
        try:
            batch, frames = self._broker.request(
                BatchRequest(step=step),
                Batch,
                lambda batch: batch.step == step,
                self._timeout_s,
                while_waiting=self._still_waiting,
                first_poll_s=self._grace_s,
            )
        except RunStoppedError as stop:
            self._tell(STOPPED if stop.ok else FAILED)
            raise
        self._tell(BATCH, [encode_header(batch), *frames])
        return batch, frames

    def _from_first_rank(self) -> tuple[Batch, Sequence[Frame]]:
        while True:
            signal = torch.zeros(2, dtype=torch.int64)
            dist.broadcast(signal, 0)
            kind, num_frames = signal.tolist()
            if kind == BATCH:
                header, *frames = _receive_frames(num_frames)
                return msgspec.msgpack.decode(header, type=Batch), frames
            if kind in (STOPPED, FAILED):
                raise RunStoppedError("rank 0 was told to stop", ok=kind == STOPPED)
            self._idle()

    def _still_waiting(self) -> None:
        """Keeps the other ranks' wait short of the process group's deadline."""
        self._tell(WAITING)
        self._idle()

    def _tell(self, kind: int, frames: Sequence[Frame] = ()) -> None:
        if self._world_size == 1:
            return
        dist.broadcast(torch.tensor([kind, len(frames)]), 0)
        if frames:
            _send_frames(frames)


def decode_batch(batch: Batch, frames: Sequence[Frame]) -> list[Group]:
    """Raises: MalformedMessage."""
    groups: list[Group] = []
    for group in batch.groups:
        own = frames[group.first_frame : group.first_frame + len(frame_sizes(group.columns))]
        groups.append(decode_group(group.columns, own))
    return groups


def check_staleness(groups: Sequence[Group], step: int, max_staleness: int) -> None:
    """The learner's own proof of the bound: 0 <= step - version <= max_staleness for every loss-bearing token.

    Raises: StalenessViolation, in one line.
    """
    for group in groups:
        lags = step - group.token_versions()[group.loss_mask.astype(bool)].astype(np.int64)
        if lags.size and not 0 <= int(lags.min()) <= int(lags.max()) <= max_staleness:
            raise StalenessViolation(
                f"batch {step} has tokens with lags {lags.min()} to {lags.max()}, allowed are 0 to {max_staleness}"
            )


def _send_frames(frames: Sequence[Frame]) -> None:
    dist.broadcast(torch.tensor([memoryview(frame).nbytes for frame in frames]), 0)
    dist.broadcast(torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8), 0)


def _receive_frames(num_frames: int) -> list[memoryview]:
    sizes = torch.zeros(num_frames, dtype=torch.int64)
    dist.broadcast(sizes, 0)
    payload = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    dist.broadcast(payload, 0)
    view: Any = payload.numpy().data
    ends = np.cumsum(sizes.numpy())
    return [view[end - size : end] for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]
