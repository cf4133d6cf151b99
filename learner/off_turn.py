"""A learner's state in host memory while engines have its device (`learner.off_turn`), and back, to the bit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from learner.config import OffTurn
from learner.model import PolicyModel, reshard

Tensors = Callable[[], Iterable[Tensor]]


class HostState:
    """Moves the memory of tensors, not the tensors: whoever refers to them, as FSDP and optimizers do, need not know.

    In between the tensors are empty and must not be touched. Buffers in host memory are pinned, and used again.
    """

    def __init__(self, tensors: Tensors, device: str) -> None:
        """Args: tensors: those to move, asked for at each turn, as an optimizer may make new ones. device: what lies
        elsewhere stays."""
        self._tensors = tensors
        self._device = device
        self._moved: list[tuple[UntypedStorage, Tensor]] = []
        self._buffers: dict[int, list[Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """In host memory now."""
        return sum(buffer.numel() for _, buffer in self._moved)

    @torch.no_grad()
    def to_host(self) -> None:
        assert not self._moved
        for storage in self._storages():
            buffer = self._buffer(storage.nbytes())
            buffer.copy_(_bytes(storage), non_blocking=True)
            self._moved.append((storage, buffer))
        self._synchronize()
        for storage, _ in self._moved:
            storage.resize_(0)
        if self._device == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for itself no other process can have

    @torch.no_grad()
    def to_device(self) -> None:
        for storage, buffer in self._moved:
            storage.resize_(buffer.numel())
            _bytes(storage).copy_(buffer, non_blocking=True)
        self._synchronize()
        for _, buffer in self._moved:
            self._buffers.setdefault(buffer.numel(), []).append(buffer)
        self._moved.clear()

    def _storages(self) -> Iterable[UntypedStorage]:
        """Each once: a tied weight is one storage, and so are views."""
        found = {}
        for tensor in self._tensors():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            if local.device.type == self._device and storage.nbytes():
                found[storage.data_ptr()] = storage
        return found.values()

    def _buffer(self, num_bytes: int) -> Tensor:
        free = self._buffers.get(num_bytes)
        if free:
            return free.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device == "cuda")

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def state_of(kind: OffTurn, models: Iterable[PolicyModel], optimizer: Optimizer) -> Tensors:
    """What leaves the device. Args: models: the policy, and the reference model where there is one."""

    def tensors() -> Iterable[Tensor]:
        if kind == "none":
            return
        yield from _tensors_in(list(optimizer.state.values()))
        if kind == "all":
            for model in models:
                reshard(model)
                yield from model.parameters()
                yield from model.buffers()

    return tensors


def _tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)


def _bytes(storage: UntypedStorage) -> Tensor:
    """[bytes] uint8: all of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
