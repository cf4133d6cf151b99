"""A copy of the learner's state in host memory, which a checkpoint is written from while training goes on."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Path = tuple[str | int, ...]


class HostCopy:
    """Memory for one copy. The first `take` claims it, pinned where the state is on a GPU; later ones use it again."""

    def __init__(self) -> None:
        self._buffers: dict[Path, Tensor] = {}

    @torch.no_grad()
    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy nested dictionaries and lists of tensors; sharded ones stay so. Valid until the next `take`."""
        taken = self._copied(state, ())
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory return before they are done
        return taken

    def _copied(self, value: Any, path: Path) -> Any:
        if isinstance(value, Tensor):
            buffer = self._buffer(value, path)
            _local(buffer).copy_(_local(value), non_blocking=True)
            return buffer
        if isinstance(value, dict):
            return {key: self._copied(each, (*path, key)) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._copied(each, (*path, index)) for index, each in enumerate(value)]
        return copy.deepcopy(value)

    def _buffer(self, value: Tensor, path: Path) -> Tensor:
        known = self._buffers.get(path)
        if known is None or (known.shape, known.dtype) != (value.shape, value.dtype):
            pinned = _local(value).is_cuda
            known = self._buffers[path] = torch.empty_like(value, device="cpu", pin_memory=pinned)
        return known


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
