"""What a version is, beyond its number: a hash of all of its tensors."""

from collections.abc import Sequence

import xxhash

from databus.messages import Manifest, TensorSpec


def version_hash(tensors: Sequence[TensorSpec]) -> int:
    """xxh3-64 of all that a manifest says of its tensors, each tensor's own hash among it; never 0."""
    digest = xxhash.xxh3_64()
    for spec in tensors:
        said = (spec.name, spec.dtype, spec.shape, spec.offset, spec.num_bytes, spec.xxh3)
        digest.update(f"{said!r}\n".encode())
    return digest.intdigest() or 1


def changed_tensors(old: Manifest, new: Manifest) -> frozenset[str]:
    """Names of the tensors of `new` that `old` has not, bit for bit."""
    before = {spec.name: (spec.dtype, spec.shape, spec.xxh3) for spec in old.tensors}
    return frozenset(spec.name for spec in new.tensors if before.get(spec.name) != (spec.dtype, spec.shape, spec.xxh3))


def same_layout(one: Manifest, other: Manifest) -> bool:
    """Do both have the same tensors in the same places?"""
    return one.num_bytes == other.num_bytes and list(map(_place, one.tensors)) == list(map(_place, other.tensors))


def _place(spec: TensorSpec) -> tuple[str, str, tuple[int, ...], int, int]:
    return spec.name, spec.dtype, spec.shape, spec.offset, spec.num_bytes
