"""A rank's part of a version: the bits that it holds of the parameters, as they are served, and where they belong."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from databus.codec import Array
from databus.delta import WORDS
from learner.snapshot import ALIGNMENT_BYTES, SERVING_DTYPES, Layout, as_stored, write_bits


@dataclass(frozen=True)
class Region:
    """A stretch of a version that one rank holds, in words: where in the version, where among its own, how long."""

    first: int
    own: int
    length: int


class LocalShards:
    """What one rank copies of each version. A parameter that is stored as it is travels shard by shard. One that
    transformers stores as several, as it does with experts, is gathered, one at a time, and is rank 0's."""

    def __init__(self, causal_lm: nn.Module, layout: Layout, rank: int, world_size: int) -> None:
        self._causal_lm = causal_lm
        self._layout = layout
        self._rank = rank
        self._world_size = world_size
        self._word_bytes = SERVING_DTYPES[layout.dtype].itemsize
        self._places: dict[str, tuple[int, int]] = {}
        """Of each stored tensor that this rank copies: where among its own bytes, and how many."""
        self.regions: tuple[Region, ...] = tuple(self._lay_out())
        self.bits = self.new_buffer()
        """uint8: what was copied last."""

    def new_buffer(self) -> Array:
        """uint8, zero: as long as what this rank holds."""
        ends = [region.own + region.length for region in self.regions]
        return np.zeros(max(ends, default=0) * self._word_bytes, np.uint8)

    def words(self, buffer: Array) -> Array:
        """The same memory as the words that are compared."""
        return buffer.view(WORDS[self._word_bytes])

    @torch.no_grad()
    def copy(self) -> None:
        """The parameters as they are now. All ranks take part."""
        for name, parameter in self._causal_lm.named_parameters():
            if self._travels_in_shards(name, parameter):
                self._write(name, _local(parameter))
                continue
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self._rank == 0:
                for part, tensor in as_stored(self._causal_lm, name, whole).items():
                    self._write(part, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        start, num_bytes = self._places.get(name, (0, 0))
        if num_bytes:
            write_bits(self.bits[start : start + num_bytes], self._layout.dtype, tensor)

    def _lay_out(self) -> Iterator[Region]:
        if self._world_size == 1:  # all of it, as it lies in the version
            for name, shape in self._stored():
                self._places[name] = (self._layout.offsets[name], math.prod(shape) * self._word_bytes)
            yield Region(0, 0, self._layout.num_bytes // self._word_bytes)
            return
        end = 0
        for name, offset, length in self._held():
            own = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            end = own + length * self._word_bytes
            self._places[name] = (own, end - own)
            if length:
                yield Region(offset, own // self._word_bytes, length)

    def _held(self) -> Iterator[tuple[str, int, int]]:
        """(name, first word in the version, number of words) of what this rank copies."""
        offsets = {name: offset // self._word_bytes for name, offset in self._layout.offsets.items()}
        for name, parameter in self._causal_lm.named_parameters():
            if self._travels_in_shards(name, parameter):
                yield name, offsets[name] + _first_element(parameter, self._rank), _local(parameter).numel()
            elif self._rank == 0:
                for part, shape in self._layout.stored[name].items():
                    yield part, offsets[part], math.prod(shape)

    def _stored(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for stored in self._layout.stored.values():
            yield from stored.items()

    def _travels_in_shards(self, name: str, parameter: Tensor) -> bool:
        stored = self._layout.stored[name]
        is_split = isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
        return is_split and stored == {name: tuple(parameter.shape)}


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def _first_element(parameter: Tensor, rank: int) -> int:
    """Of this rank's shard, in the whole: FSDP2 gives every rank ⌈rows / ranks⌉ rows, as far as they go."""
    assert isinstance(parameter, DTensor)
    rows = parameter.shape[0] if parameter.ndim else 1
    begin = min(rank * -(-rows // parameter.device_mesh.size()), rows)
    return begin * (parameter.numel() // rows if rows else 0)
