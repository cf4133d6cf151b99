"""Named tensors over a snapshot's flat buffer, without a copy."""

import warnings
from collections.abc import Container, Iterator, Mapping
from mmap import mmap

import torch
import xxhash

from databus.messages import Manifest, TensorSpec

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


HostSource = tuple[Manifest, mmap]
"""A snapshot: what is in its buffer, and the buffer."""
Source = tuple[Manifest, mmap | torch.Tensor]
"""The same, where the buffer may be a tensor, uint8, which may be a GPU's."""


def tensors(manifest: Manifest, buffer: mmap | memoryview | torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor that views the buffer), in order. The tensors must not be written to.

    Raises: ValueError for a dtype that is not served, a tensor outside the buffer, or a size that is not its shape's.
    """
    view = buffer if isinstance(buffer, torch.Tensor) else memoryview(buffer)
    for spec in manifest.tensors:
        yield spec.name, _tensor(spec, view)


def first_mismatch(manifest: Manifest, buffer: mmap | memoryview, names: Container[str] | None = None) -> str:
    """The name of the first tensor whose xxh3-64 is not the manifest's; "" where all agree.

    Args: names: of those to look at; None: all.
    """
    view = memoryview(buffer)
    for spec in manifest.tensors:
        if names is not None and spec.name not in names:
            continue
        if xxhash.xxh3_64_intdigest(view[spec.offset : spec.offset + spec.num_bytes]) != spec.xxh3:
            return spec.name
    return ""


def _tensor(spec: TensorSpec, view: memoryview | torch.Tensor) -> torch.Tensor:
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise ValueError(f"tensor {spec.name!r} has dtype {spec.dtype!r}; allowed: {', '.join(DTYPES)}")
    count = 1
    for size in spec.shape:
        count *= size
    if spec.num_bytes != count * dtype.itemsize or spec.offset < 0 or spec.offset + spec.num_bytes > len(view):
        raise ValueError(f"tensor {spec.name!r}: {spec.num_bytes} bytes at {spec.offset} do not hold {spec.shape}")
    if isinstance(view, torch.Tensor):
        return view[spec.offset : spec.offset + spec.num_bytes].view(dtype).view(spec.shape)
    if not count:
        return torch.empty(spec.shape, dtype=dtype)
    with warnings.catch_warnings():  # torch warns that the buffer is read-only; we never write
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view, dtype=dtype, count=count, offset=spec.offset).view(spec.shape)
