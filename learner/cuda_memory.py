"""A GPU's memory, named so that other processes of the machine can map it, and mapped."""

import torch
from torch import Tensor

from databus.transfers import DeviceMemory


def shared(tensor: Tensor) -> DeviceMemory:
    """Args: tensor: uint8, all of its storage. Its memory must outlive whoever maps it. Raises: RuntimeError."""
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return DeviceMemory.of(uuid, tensor.untyped_storage()._share_cuda_())


def mapped(memory: DeviceMemory) -> Tensor:
    """The same memory, uint8. Raises: ValueError where this process does not see the GPU; RuntimeError."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == memory.device_uuid:
            storage = torch.UntypedStorage._new_shared_cuda(*memory.arguments(index))
            return torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index)).set_(storage)
    raise ValueError(f"GPU {memory.device_uuid} is none of the {torch.cuda.device_count()} that this process sees")
