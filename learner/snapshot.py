"""A policy version as one flat buffer of checked tensors in the serving dtype."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from databus.codec import Array
from databus.messages import Manifest, TensorSpec

ALIGNMENT_BYTES = 64
CHUNK_BYTES = 1 << 20
SERVING_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Snapshot:
    """manifest: what a worker is told. data: uint8 [manifest.num_bytes], never written again."""

    manifest: Manifest
    data: Array

    def chunk(self, index: int) -> memoryview | None:
        """Bytes of one chunk, without a copy; None if the index is out of range."""
        start = index * self.manifest.chunk_bytes
        if index < 0 or start >= self.manifest.num_bytes:
            return None
        return self.data.data[start : start + self.manifest.chunk_bytes]


class Snapshotter:
    """Takes snapshots of a sharded causal language model; all ranks take part, rank 0 keeps the result."""

    def __init__(
        self, causal_lm: nn.Module, dtype: Literal["float32", "bfloat16"], rank: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._causal_lm = causal_lm
        self._dtype = dtype
        self._rank = rank
        self._chunk_bytes = chunk_bytes

    @torch.no_grad()
    def take(self, version: int) -> Snapshot | None:
        """The current weights as `version`; None on ranks other than 0.

        Tensors have the names that transformers gives them; a tied output embedding is left out. One whole tensor
        exists at a time.
        """
        # Shared parameters are named once: that leaves tied weights out.
        parameters = list(self._causal_lm.named_parameters())
        offsets, num_bytes = self._layout([parameter for _, parameter in parameters])
        data = np.empty(num_bytes if self._rank == 0 else 0, np.uint8)
        specs: list[TensorSpec] = []
        for (name, parameter), offset in zip(parameters, offsets, strict=True):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self._rank == 0:
                specs.append(self._write(data, name, whole, offset))
        if self._rank != 0:
            return None
        manifest = Manifest(version=version, num_bytes=num_bytes, chunk_bytes=self._chunk_bytes, tensors=tuple(specs))
        return Snapshot(manifest, data)

    def _layout(self, parameters: list[nn.Parameter]) -> tuple[list[int], int]:
        offsets: list[int] = []
        end = 0
        for parameter in parameters:
            offsets.append(-(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
            end = offsets[-1] + parameter.numel() * SERVING_DTYPES[self._dtype].itemsize
        return offsets, end

    def _write(self, data: Array, name: str, whole: Tensor, offset: int) -> TensorSpec:
        dtype = SERVING_DTYPES[self._dtype]
        part = data[offset : offset + whole.numel() * dtype.itemsize]
        torch.from_numpy(part).view(dtype).view(whole.shape).copy_(whole)
        return TensorSpec(
            name=name,
            dtype=self._dtype,
            shape=tuple(whole.shape),
            offset=offset,
            num_bytes=part.nbytes,
            xxh3=xxhash.xxh3_64_intdigest(part.data),
        )
