"""Reading back what vLLM's model serves."""

from collections.abc import Iterator
from typing import Any

import torch
import xxhash

from rollout.engine.tensors import Source, tensors
from rollout.engine.vllm_places import Piece, Places


def first_wrong(places: Places, source: Source, names: set[str] | None = None) -> tuple[str, int]:
    """(the first tensor that does not lie in the model bit for bit, "" if all do; bytes that were compared).

    Args: names: to look at; None: all. Packed weights are not compared; see `read_back`.
    """
    compared = 0
    for name, tensor in tensors(*source):
        for piece in places.pieces.get(name, ()) if names is None or name in names else ():
            there = _plain(places, piece)
            if there is not None:
                there = piece.target.of(there)
                if not _same_bits(there, piece.source.of(tensor).to(there.dtype)):
                    return name, compared
                compared += there.nbytes
    return "", compared


def note_packed(places: Places, source: Source) -> None:
    """Of experts, whose layout is the kernel's own: layers whose tensors do not lie there as they were sent."""
    for name, tensor in tensors(*source):
        for piece in places.pieces.get(name, ()):
            there = _plain(places, piece) if has_experts(piece.layer) else None
            if there is not None and not _same_bits(piece.target.of(there), piece.source.of(tensor).to(there.dtype)):
                places.packed.add(piece.layer)


def read_back(places: Places, source: Source) -> Iterator[tuple[str, int, int]]:
    """(tensor, xxh3-64 of it as it is served, elements read) for all tensors. For checks, not for every update.

    Packed linear weights are read by multiplying the unit matrix with them. What cannot be read, as packed experts, or
    lies with other ranks, is taken from the snapshot: there are fewer elements read then.
    """
    for name, tensor in tensors(*source):
        served, count = tensor.clone(), 0
        for piece in places.pieces.get(name, ()):
            there = _plain(places, piece)
            there = _multiplied(piece) if there is None else there
            if there is not None:
                piece.source.of(served).copy_(piece.target.of(there))
                count += piece.target.of(there).numel()
        yield name, xxhash.xxh3_64_intdigest(_bits(served).numpy().data), count


def has_experts(layer: Any) -> bool:
    return getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None


def _plain(places: Places, piece: Piece) -> torch.Tensor | None:
    """The parameter, where it lies as the loaders filled it; None where it is packed."""
    tensor = piece.layer._parameters.get(piece.parameter)
    if tensor is None or tuple(tensor.shape) != piece.shape or not tensor.is_contiguous():
        return None
    return None if piece.layer in places.packed else tensor.data


def _multiplied(piece: Piece) -> torch.Tensor | None:
    """A packed weight [out, in], by what it makes of the unit matrix: sums of one weight and zeros, which are exact."""
    layer = piece.layer
    if piece.parameter != "weight" or len(piece.shape) != 2 or not hasattr(layer, "cpu_linear"):
        return None
    unit = torch.eye(piece.shape[1], dtype=layer.weight.dtype)
    return layer.quant_method.apply(layer, unit, None).t().contiguous()


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compared where `one` lies."""
    return torch.equal(_bits(one), _bits(other.to(one.device)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
