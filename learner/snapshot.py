"""A policy version as one flat buffer of checked tensors in the serving dtype."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from databus.codec import Array
from databus.messages import Delta, Manifest, Probe, TensorSpec
from databus.version_hash import version_hash

ALIGNMENT_BYTES = 64
CHUNK_BYTES = 1 << 20
SERVING_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def as_stored(causal_lm: nn.Module, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter as the tensors that transformers makes of it in a checkpoint, by name: experts that it keeps in one
    tensor, for example, are one matrix each there, which is what engines load."""
    return revert_weight_conversion(causal_lm, {name: parameter})  # type: ignore[arg-type]


def stored_shapes(causal_lm: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of each parameter, named once where it is shared: what it is stored as, and the shapes."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in causal_lm.named_parameters():
        stored = as_stored(causal_lm, name, torch.empty(parameter.shape, device="meta"))
        shapes[name] = {part: tuple(tensor.shape) for part, tensor in stored.items()}
    return shapes


@dataclass(frozen=True)
class EncodedDelta:
    """What differs from the version before, as `databus.delta` encodes it."""

    delta: Delta
    chunks: tuple[bytes, ...]


@dataclass(frozen=True)
class Snapshot:
    """manifest: what a worker is told. data: uint8 [manifest.num_bytes], never written again; None where the version
    is only published as a delta."""

    manifest: Manifest
    data: Array | None
    delta: EncodedDelta | None = None

    def chunk(self, index: int) -> memoryview | None:
        """Bytes of one chunk of the whole, without a copy; None if there is none of this index."""
        start = index * self.manifest.chunk_bytes
        if self.data is None or index < 0 or start >= self.manifest.num_bytes:
            return None
        return self.data.data[start : start + self.manifest.chunk_bytes]

    def delta_chunk(self, index: int) -> bytes | None:
        """A chunk of the delta; None if there is none of this index."""
        if self.delta is None or not 0 <= index < len(self.delta.chunks):
            return None
        return self.delta.chunks[index]


@dataclass(frozen=True)
class Layout:
    """Where each stored tensor of a model lies in a version's flat buffer of `num_bytes`.

    stored: of each parameter, what it is stored as, and the shapes. offsets: of each of these, in bytes.
    """

    dtype: Literal["float32", "bfloat16"]
    stored: dict[str, dict[str, tuple[int, ...]]]
    offsets: dict[str, int]
    num_bytes: int

    @classmethod
    def of(cls, causal_lm: nn.Module, dtype: Literal["float32", "bfloat16"]) -> "Layout":
        stored = stored_shapes(causal_lm)
        offsets: dict[str, int] = {}
        end = 0
        for shapes in stored.values():
            for name, shape in shapes.items():
                offsets[name] = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                end = offsets[name] + math.prod(shape) * SERVING_DTYPES[dtype].itemsize
        return cls(dtype, stored, offsets, end)

    def spec(self, name: str, shape: tuple[int, ...], data: Array) -> TensorSpec:
        """Of one stored tensor, as it is in `data`, uint8 [num_bytes]."""
        part = self.part(name, shape, data)
        return TensorSpec(
            name=name,
            dtype=self.dtype,
            shape=shape,
            offset=self.offsets[name],
            num_bytes=part.nbytes,
            xxh3=xxhash.xxh3_64_intdigest(part.data),
        )

    def part(self, name: str, shape: tuple[int, ...], data: Array) -> Array:
        """The bytes of one stored tensor, without a copy."""
        num_bytes = math.prod(shape) * SERVING_DTYPES[self.dtype].itemsize
        return data[self.offsets[name] : self.offsets[name] + num_bytes]


class Snapshotter:
    """Takes snapshots of a sharded causal language model; all ranks take part, rank 0 keeps the result."""

    def __init__(
        self, causal_lm: nn.Module, dtype: Literal["float32", "bfloat16"], rank: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.causal_lm = causal_lm
        self.layout = Layout.of(causal_lm, dtype)
        self.chunk_bytes = chunk_bytes
        self._rank = rank

    @torch.no_grad()
    def take(self, version: int, probe: Probe | None = None) -> Snapshot | None:
        """The current weights as `version`, and what they say of fixed texts; None on ranks other than 0.

        Tensors have the names that they have in a checkpoint of transformers'; a tied output embedding is left out. One
        whole parameter exists at a time.
        """
        layout = self.layout
        data = np.zeros(layout.num_bytes if self._rank == 0 else 0, np.uint8)
        specs: list[TensorSpec] = []
        for name, parameter in self.causal_lm.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self._rank == 0:
                stored = as_stored(self.causal_lm, name, whole)
                specs += [self._write(data, part, tensor) for part, tensor in stored.items()]
        if self._rank != 0:
            return None
        return Snapshot(self.manifest(version, specs, probe), data)

    def manifest(self, version: int, specs: Sequence[TensorSpec], probe: Probe | None) -> Manifest:
        return Manifest(
            version=version,
            num_bytes=self.layout.num_bytes,
            chunk_bytes=self.chunk_bytes,
            tensors=tuple(specs),
            probe=probe,
            hash=version_hash(specs),
        )

    def _write(self, data: Array, name: str, whole: Tensor) -> TensorSpec:
        shape = tuple(whole.shape)
        write_bits(self.layout.part(name, shape, data), self.layout.dtype, whole)
        return self.layout.spec(name, shape, data)


def write_bits(target: Array, dtype: Literal["float32", "bfloat16"], tensor: Tensor) -> None:
    """Cast to what is served. Args: target: uint8, as many bytes as that takes."""
    torch.from_numpy(target).view(SERVING_DTYPES[dtype]).view(tensor.shape).copy_(tensor)
