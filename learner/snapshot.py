"""A policy version as one flat buffer of checked tensors in the serving dtype."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from databus.codec import Array
from databus.messages import Manifest, Probe, TensorSpec

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
        self._shapes = stored_shapes(causal_lm)
        self._dtype = dtype
        self._rank = rank
        self._chunk_bytes = chunk_bytes

    @torch.no_grad()
    def take(self, version: int, probe: Probe | None = None) -> Snapshot | None:
        """The current weights as `version`, and what they say of fixed texts; None on ranks other than 0.

        Tensors have the names that they have in a checkpoint of transformers'; a tied output embedding is left out. One
        whole parameter exists at a time.
        """
        offsets, num_bytes = self._layout()
        data = np.empty(num_bytes if self._rank == 0 else 0, np.uint8)
        specs: list[TensorSpec] = []
        for name, parameter in self._causal_lm.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self._rank == 0:
                stored = as_stored(self._causal_lm, name, whole)
                specs += [self._write(data, part, tensor, offsets[part]) for part, tensor in stored.items()]
        if self._rank != 0:
            return None
        manifest = Manifest(
            version=version, num_bytes=num_bytes, chunk_bytes=self._chunk_bytes, tensors=tuple(specs), probe=probe
        )
        return Snapshot(manifest, data)

    def _layout(self) -> tuple[dict[str, int], int]:
        """(where each tensor begins, bytes of all)."""
        offsets: dict[str, int] = {}
        end = 0
        for stored in self._shapes.values():
            for name, shape in stored.items():
                offsets[name] = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                end = offsets[name] + math.prod(shape) * SERVING_DTYPES[self._dtype].itemsize
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
