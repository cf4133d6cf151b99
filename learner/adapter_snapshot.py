"""A policy version as its adapters alone: what workers merge with the model that they started from."""

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from databus.messages import Manifest, Probe, TensorSpec
from learner.lora import LoraLayers
from learner.snapshot import CHUNK_BYTES, Snapshot


class AdapterSnapshotter:
    """As `Snapshotter`, of a model with adapters; they are published as they are trained, in fp32."""

    def __init__(self, lora: LoraLayers, rank: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._lora = lora
        self._rank = rank
        self._chunk_bytes = chunk_bytes

    @torch.no_grad()
    def take(self, version: int, probe: Probe | None = None) -> Snapshot | None:
        """The current adapters as `version`, and what the model with them says of fixed texts; None on ranks other than
        0. All ranks take part."""
        wholes = {name: _whole(factor) for name, factor in self._lora.factors()}
        if self._rank != 0:
            return None
        specs: list[TensorSpec] = []
        offset = 0
        for name, whole in wholes.items():
            specs.append(_spec(name, whole, offset))
            offset += specs[-1].num_bytes
        manifest = Manifest(
            version=version,
            num_bytes=offset,
            chunk_bytes=self._chunk_bytes,
            tensors=tuple(specs),
            probe=probe,
            adapter=self._lora.adapter,
        )
        return Snapshot(
            manifest, np.concatenate([whole.numpy().reshape(-1) for whole in wholes.values()]).view(np.uint8)
        )


def _whole(factor: Tensor) -> Tensor:
    """On the host, contiguous."""
    return (factor.full_tensor() if isinstance(factor, DTensor) else factor).float().cpu().contiguous()


def _spec(name: str, whole: Tensor, offset: int) -> TensorSpec:
    return TensorSpec(
        name=name,
        dtype="float32",
        shape=tuple(whole.shape),
        offset=offset,
        num_bytes=whole.nbytes,
        xxh3=xxhash.xxh3_64_intdigest(whole.numpy().data),
    )
