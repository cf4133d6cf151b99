"""The process that sends versions by NCCL: `python -m learner.sending DESCRIPTOR`. See `learner.collective_transfers`.

It maps the version that the learner has staged, and never unpickles anything: what the two ranks of a group need of
each other is in torch's store, which moves bytes. That store and NCCL's connections are not encrypted, and ask nobody
who they are.
"""

import sys
from collections.abc import Callable
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from msgspec import Struct
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from databus.codec import decode_header
from databus.helper import Channel, one_line
from databus.process import die_with_parent
from databus.transfers import COLLECTIVE_BYTES, COLLECTIVES, JOINED, DeviceMemory
from learner.cuda_memory import mapped

STORE_TIMEOUT = timedelta(seconds=60)


class Send(Struct, frozen=True, kw_only=True, tag=True):
    """Learner -> sender: broadcast this to whoever joins the group `name` within join_s."""

    memory: DeviceMemory
    name: str
    join_s: float
    send_s: float


class Listening(Struct, frozen=True, kw_only=True, tag=True):
    """Sender -> learner: where groups meet. Said once, first."""

    port: int


class Sent(Struct, frozen=True, kw_only=True, tag=True):
    """Sender -> learner: the worker has it."""


class SendFailed(Struct, frozen=True, kw_only=True, tag=True):
    """Sender -> learner: nobody came; the next may be sent. Of any other failure the process ends."""

    error: str


_decoder = msgspec.msgpack.Decoder(Send)


def serve(channel: Channel, map_memory: Callable[[DeviceMemory], Tensor]) -> None:
    """Until the learner closes its end. Raises: whatever stopped a transfer."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
    channel.send(Listening(port=store.port))
    known: tuple[DeviceMemory, Tensor] | None = None
    while order := channel.receive():
        send = decode_header(order, _decoder)
        if known is None or known[0] != send.memory:
            known = send.memory, map_memory(send.memory)
        meeting = PrefixStore(send.name, store)
        if _has_come(meeting, send.join_s):
            _broadcast(meeting, known[1], send.send_s)
            channel.send(Sent())
        else:
            channel.send(SendFailed(error=f"the worker did not come within {send.join_s:g} s"))


def _has_come(meeting: Store, within_s: float) -> bool:
    try:
        meeting.wait([JOINED], timedelta(seconds=within_s))
    except RuntimeError:  # torch's DistStoreError
        return False
    return True


def _broadcast(meeting: Store, buffer: Tensor, timeout_s: float) -> None:
    on_gpu = buffer.is_cuda
    if on_gpu:
        torch.cuda.set_device(buffer.device)
    dist.init_process_group(
        COLLECTIVES[buffer.device.type],
        store=meeting,
        rank=0,
        world_size=2,
        timeout=timedelta(seconds=timeout_s),
        device_id=buffer.device if on_gpu else None,
    )
    try:
        for part in buffer.split(COLLECTIVE_BYTES):
            dist.broadcast(part, 0)
        if on_gpu:
            torch.cuda.synchronize(buffer.device)
    finally:
        dist.destroy_process_group()


def main() -> None:
    die_with_parent()
    channel = Channel(int(sys.argv[1]))
    try:
        serve(channel, mapped)
    except Exception as error:
        sys.exit(f"learner.sending: {one_line(error)}")


if __name__ == "__main__":
    main()
