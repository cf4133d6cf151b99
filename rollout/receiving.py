"""The process that takes versions into a GPU's memory: `python -m rollout.receiving DESCRIPTOR` (`rollout.receiver`).

It ends with the first thing that goes wrong: what state CUDA and NCCL are in then, nobody knows.
"""

import mmap
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from databus.codec import decode_header
from databus.helper import Channel, one_line
from databus.process import die_with_parent
from databus.transfers import COLLECTIVE_BYTES, COLLECTIVES, JOINED, CollectiveOffer, DeviceMemory, MappedOffer
from rollout.cuda_memory import mapped, shared, word_sum
from rollout.fetches import DeviceCopy, Fetch, Fetched, FetchFailed, Ready

_decoder = msgspec.msgpack.Decoder(Fetch)


class Landing:
    """One buffer, into which versions come one after another."""

    def __init__(
        self,
        device: str,
        map_memory: Callable[[DeviceMemory], Tensor] = mapped,
        share: Callable[[Tensor], DeviceMemory] = shared,
    ) -> None:
        self._device = device
        self._map_memory = map_memory
        self._share = share
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._memory: DeviceMemory | None = None
        self._theirs: tuple[DeviceMemory, Tensor] | None = None

    def fetch(self, order: Fetch) -> DeviceCopy:
        """Raises: whatever stops it."""
        if self._memory is None or len(self._buffer) != order.num_bytes:
            self._memory = self._claim(order.num_bytes)
        match order.offer:
            case MappedOffer(memory=memory):
                self._copy(memory)
            case CollectiveOffer():
                self._receive(order.offer, order.host, timedelta(seconds=order.timeout_s))
        self._write(order.path)
        return DeviceCopy(memory=self._memory, word_sum=word_sum(self._buffer))

    def _claim(self, num_bytes: int) -> DeviceMemory:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)  # the old one goes first
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._share(self._buffer)

    def _copy(self, memory: DeviceMemory) -> None:
        if self._theirs is None or self._theirs[0] != memory:
            self._theirs = memory, self._map_memory(memory)
        theirs = self._theirs[1]
        if len(theirs) != len(self._buffer):
            raise ValueError(f"the learner has {len(theirs)} bytes, expected {len(self._buffer)}")
        self._buffer.copy_(theirs)

    def _receive(self, offer: CollectiveOffer, host: str, timeout: timedelta) -> None:
        store = TCPStore(host.strip("[]"), offer.port, is_master=False, timeout=timeout)
        meeting = PrefixStore(offer.name, store)
        meeting.set(JOINED, "1")
        on_gpu = self._buffer.is_cuda
        dist.init_process_group(
            COLLECTIVES[self._buffer.device.type],
            store=meeting,
            rank=1,
            world_size=2,
            timeout=timeout,
            device_id=self._buffer.device if on_gpu else None,
        )
        try:
            for part in self._buffer.split(COLLECTIVE_BYTES):
                dist.broadcast(part, 0)
            if on_gpu:
                torch.cuda.synchronize(self._buffer.device)
        finally:
            dist.destroy_process_group()

    def _write(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            host = mmap.mmap(descriptor, len(self._buffer), mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(descriptor)
        # The map goes with the tensor: closed by hand it would object to it.
        torch.frombuffer(host, dtype=torch.uint8).copy_(self._buffer)


def serve(channel: Channel, landing: Landing) -> None:
    """Until the worker closes its end, or something fails."""
    channel.send(Ready())
    while order := channel.receive():
        try:
            answer: Fetched | FetchFailed = Fetched(copy=landing.fetch(decode_header(order, _decoder)))
        except Exception as error:
            answer = FetchFailed(error=one_line(error))
        channel.send(answer)
        if isinstance(answer, FetchFailed):
            os._exit(1)  # NCCL may wait in what Python would do at its end


def main() -> None:
    die_with_parent()
    channel = Channel(int(sys.argv[1]))
    try:
        if not torch.cuda.is_available():
            raise ValueError("this process sees no NVIDIA GPU")
        landing = Landing("cuda:0")
    except Exception as error:
        channel.send(FetchFailed(error=one_line(error)))
        return
    serve(channel, landing)


if __name__ == "__main__":
    main()
