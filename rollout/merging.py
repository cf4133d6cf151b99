"""From a version that came as an adapter to whole weights: those of the model's folder, and scale · B · A.

A version is always merged with the folder's weights, never with what is served: nothing adds up.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping

import msgspec
import torch
import xxhash
from torch import Tensor

from databus.messages import Adapter, Manifest, TensorSpec
from rollout.base_weights import BaseWeights
from rollout.engine.base import Snapshot
from rollout.engine.tensors import DTYPES, tensors
from rollout.versions import Pull
from rollout.weight_source import PullError

logger = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
BLOCK_ELEMENTS = 1 << 18
"""Of a matrix, merged at one time: 2 MiB in float64."""
MANTISSA_BITS = 53
EXPONENT_BIAS, EXPONENT_SHIFT = 1023, 52


def merge(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """base + scale · b · a, in float32: the same bits on every machine, whatever it multiplies matrices with.

    Rows of b and columns of a are rounded to whole numbers of as many bits as leave every sum of their products below
    2^53, times a power of two each. In float64 these sums are exact, in any order. What is rounded away is below
    2^-21 of a row's or column's largest element at a rank of 1,024, and 2^-24, as in float32, at one of 32. After that
    an element is rounded four times, by operations of which IEEE 754 gives every bit: twice in float64, for scale and
    sum, then to float32, and by whoever casts it to what is served.

    Args: base: [out, in], any dtype. a: float32 [rank, in]. b: float32 [out, rank].
    """
    bits = (MANTISSA_BITS - (a.shape[0] - 1).bit_length()) // 2
    left, left_exponents = _whole_numbers(b, 1, bits)
    right, right_exponents = _whole_numbers(a, 0, bits)
    merged = torch.empty(base.shape, dtype=torch.float32)
    block = max(1, BLOCK_ELEMENTS // base.shape[1])
    for start in range(0, base.shape[0], block):
        rows = slice(start, start + block)
        product = (left[rows] @ right) * _power_of_two(left_exponents[rows] + right_exponents)
        merged[rows] = product.mul_(scale).add_(base[rows].double())
    return merged


def _whole_numbers(matrix: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """(whole numbers of at most `bits` bits in float64, exponents): matrix ≈ numbers · 2^exponents, exponents being one
    for each slice along `dim`."""
    _, exponents = torch.frexp(matrix.abs().amax(dim, keepdim=True))
    exponents = exponents.long() - bits
    return (matrix.double() * _power_of_two(-exponents)).round_(), exponents


def _power_of_two(exponents: Tensor) -> Tensor:
    """By its bits: `torch.ldexp` takes a power in float32."""
    return ((exponents + EXPONENT_BIAS) << EXPONENT_SHIFT).view(torch.float64)


class MergingPull:
    """A `Pull` whose versions are whole weights, however they were published."""

    def __init__(self, pull: Pull, model: str, dtype: str) -> None:
        """Args: model: folder or hub id that adapters are added to. dtype: what is served."""
        self._pull = pull
        self._model = model
        self._dtype = dtype
        self._base: BaseWeights | None = None
        self._merged_version = 0
        self._lock = threading.Lock()

    def __call__(self, address: str, version: int, num_bytes: int, stop: threading.Event) -> Snapshot:
        """Raises: as the `Pull` inside; PullError, in one line, for an adapter of another model."""
        pulled = self._pull(address, version, num_bytes, stop)
        adapter = pulled.manifest.adapter
        if adapter is None:
            return pulled
        try:
            with self._lock:
                return self._merged(pulled, adapter, stop)
        except ValueError as error:
            raise PullError(f"version {version} cannot be merged: {error}") from error
        finally:
            pulled.close()

    def _merged(self, pulled: Snapshot, adapter: Adapter, stop: threading.Event) -> Snapshot:
        if self._base is None:
            self._base = _checked_base(self._model, adapter)
        factors = dict(tensors(pulled.manifest, pulled.map()))
        weights = {weight.name for weight in adapter.weights}
        manifest, fd = write_weights(
            _wholes(self._base, weights, factors, adapter.scale, stop), pulled.manifest, self._dtype
        )
        # Outside of `weights` all versions are alike, the folder's included, which is version 0.
        base_version, self._merged_version = self._merged_version, pulled.version
        return Snapshot(
            version=pulled.version,
            manifest=manifest,
            fd=fd,
            base_version=base_version,
            changed=frozenset(weights),
            received_bytes=pulled.received_bytes,
        )


def _checked_base(model: str, adapter: Adapter) -> BaseWeights:
    """Raises: ValueError, in one line, where it is not the model that the learner adapts."""
    base = BaseWeights(model)
    for weight in adapter.weights:
        if xxhash.xxh3_64_intdigest(base[weight.name].float().contiguous().numpy().data) != weight.base_xxh3:
            base.close()
            raise ValueError(
                f"tensor {weight.name!r} of model={model} is not the one that the learner adapts: all machines need "
                "the same model"
            )
    return base


def _wholes(
    base: BaseWeights, weights: set[str], factors: Mapping[str, Tensor], scale: float, stop: threading.Event
) -> Iterator[tuple[str, Tensor]]:
    for name in base.names:
        if stop.is_set():
            raise PullError("given up")
        whole = base[name]
        if name in weights:
            a, b = (_factor(factors, f"{name}.{factor}") for factor in ("lora_A", "lora_B"))
            if whole.ndim != 2 or whole.shape != (len(b), a.shape[1]) or b.shape[1] != len(a):
                raise ValueError(f"tensor {name!r} is {tuple(whole.shape)}, its adapter {_said(b)} · {_said(a)}")
            whole = merge(whole, a, b, scale)
        yield name, whole


def _factor(factors: Mapping[str, Tensor], name: str) -> Tensor:
    factor = factors.get(name)
    if factor is None or factor.ndim != 2 or factor.dtype != torch.float32 or not factor.numel():
        raise ValueError(f"{name!r} is missing, or no float32 matrix")
    if not factor.isfinite().all():
        raise ValueError(f"{name!r} has numbers that are not finite")
    return factor


def _said(factor: Tensor) -> str:
    return str(tuple(factor.shape))


def write_weights(wholes: Iterator[tuple[str, Tensor]], manifest: Manifest, dtype: str) -> tuple[Manifest, int]:
    """A manifest of the tensors, cast to `dtype`, and the shared memory that they are in, which the caller closes."""
    fd = os.memfd_create(f"merged-{manifest.version}", os.MFD_CLOEXEC)
    try:
        specs: list[TensorSpec] = []
        end = 0
        for name, whole in wholes:
            data = whole.to(DTYPES[dtype]).contiguous().view(-1).view(torch.uint8).numpy().data
            offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            end = offset + data.nbytes
            _write_at(fd, data, offset)
            specs.append(
                TensorSpec(
                    name=name,
                    dtype=dtype,
                    shape=tuple(whole.shape),
                    offset=offset,
                    num_bytes=data.nbytes,
                    xxh3=xxhash.xxh3_64_intdigest(data),
                )
            )
    except BaseException:
        os.close(fd)
        raise
    return msgspec.structs.replace(manifest, num_bytes=end, tensors=tuple(specs), adapter=None), fd


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)  # at most 2 GiB at a time
        data, offset = data[written:], offset + written
