"""Where the tensors of a checkpoint end up in vLLM's model: noted while vLLM's own loaders put them there."""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Region(NamedTuple):
    """Elements of a tensor: `torch.as_strided`, from the tensor's first element."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


class Piece(NamedTuple):
    """Where elements of a checkpoint tensor lie in a parameter of `shape` of a layer of vLLM's."""

    source: Region
    layer: Any
    parameter: str
    shape: tuple[int, ...]
    target: Region


@dataclass
class Places:
    """What the loaders did with a whole snapshot.

    names: of a layer's tensors. layers: that have a tensor. pieces: of a tensor. elements: that a layer was given.
    strangers: layers that were given something that is no part of the snapshot. packed: layers whose parameters keep
    their shape and not their order: experts, for some kernels.
    """

    names: dict[Any, set[str]] = field(default_factory=lambda: defaultdict(set))
    layers: dict[str, set[Any]] = field(default_factory=lambda: defaultdict(set))
    pieces: dict[str, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    elements: dict[Any, int] = field(default_factory=dict)
    strangers: set[Any] = field(default_factory=set)
    packed: set[Any] = field(default_factory=set)

    def closure(self, changed: Iterable[str]) -> tuple[set[str], set[Any]] | None:
        """All tensors that must be loaded with `changed`, and their layers; None where that is not known."""
        names: set[str] = set()
        layers: set[Any] = set()
        ahead = list(changed)
        while ahead:
            name = ahead.pop()
            if name in names:
                continue
            names.add(name)
            if not self.layers.get(name) or self.layers[name] & self.strangers:
                return None
            for layer in self.layers[name] - layers:
                layers.add(layer)
                ahead += self.names[layer]
        return names, layers


class Addresses:
    """Which tensor of the snapshot lies at an address. All of them lie on one device."""

    def __init__(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._device = weights[0][1].device if weights else torch.device("cpu")
        spans = sorted((tensor.data_ptr(), tensor.nbytes, name) for name, tensor in weights if tensor.numel())
        self._starts = [start for start, *_ in spans]
        self._spans = spans

    def find(self, tensor: Any) -> tuple[str, int] | None:
        """(name, bytes from its begin); None for what lies elsewhere."""
        if not isinstance(tensor, torch.Tensor) or tensor.device != self._device or not tensor.numel():
            return None
        address = tensor.data_ptr()
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._starts[index] + self._spans[index][1]:
            return None
        return self._spans[index][2], address - self._starts[index]

    def name_of(self, tensor: Any) -> str | None:
        found = self.find(tensor)
        return found[0] if found else None


class Copies(TorchDispatchMode):
    """Notes every copy from the snapshot into a parameter of a layer that is being filled."""

    def __init__(self, layer: Any, addresses: Addresses, places: Places) -> None:
        super().__init__()
        self._layer = layer
        self._addresses = addresses
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, target: torch.Tensor, source: torch.Tensor) -> None:
        found = self._addresses.find(source)
        if found is None or target.shape != source.shape or target.is_meta:
            return
        name, start = found
        for parameter, tensor in self._layer._parameters.items():
            if tensor is not None and _storage(tensor) == _storage(target):
                piece = Piece(
                    source=Region(tuple(source.shape), source.stride(), start // source.element_size()),
                    layer=self._layer,
                    parameter=parameter,
                    shape=tuple(tensor.shape),
                    target=Region(tuple(target.shape), target.stride(), int(target.storage_offset())),
                )
                self._places.pieces[name].append(piece)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
