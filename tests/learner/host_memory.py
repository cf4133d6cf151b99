"""In place of GPUs: memory of the host that processes share through /proc, and gloo.

    python tests/learner/host_memory.py PART DESCRIPTOR

PART: `send` and `receive` are what a learner's sender and a worker's receiver are; `hang` takes an order and does
nothing, `die` ends with it, `damage` receives another bit than was sent, `mute` never says that it is up.
"""

import os
import sys
import time

import torch
from torch import Tensor

from databus.helper import Channel
from databus.process import die_with_parent
from databus.transfers import DeviceMemory


def share(tensor: Tensor) -> DeviceMemory:
    descriptor, num_bytes = tensor.untyped_storage()._share_fd_cpu_()
    return DeviceMemory(
        device_uuid="host",
        num_bytes=num_bytes,
        handle=f"/proc/{os.getpid()}/fd/{descriptor}".encode(),
        offset_bytes=0,
        counter=b"",
        counter_offset=0,
        event=b"",
        has_event=False,
    )


def map_memory(memory: DeviceMemory) -> Tensor:
    return torch.from_file(memory.handle.decode(), shared=True, size=memory.num_bytes, dtype=torch.uint8)


def map_damaged(memory: DeviceMemory) -> Tensor:
    """As where the learner puts the next version there meanwhile."""
    copy = map_memory(memory).clone()
    copy[len(copy) // 2] ^= 1
    return copy


def main(part: str, channel: Channel) -> None:
    from rollout.fetches import Ready
    from rollout.receiving import Landing
    from rollout.receiving import serve as receive

    match part:
        case "send":
            from learner.sending import serve as send

            send(channel, map_memory)
        case "receive":
            receive(channel, Landing("cpu", map_memory, share))
        case "damage":
            receive(channel, Landing("cpu", map_damaged, share))
        case "hang" | "die":
            channel.send(Ready())
            channel.receive()
            time.sleep(60.0 if part == "hang" else 0.0)
        case "mute":
            time.sleep(60.0)


if __name__ == "__main__":
    die_with_parent()
    main(sys.argv[1], Channel(int(sys.argv[2])))
