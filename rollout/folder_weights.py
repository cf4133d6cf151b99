"""A model's folder as a version that an engine can be updated to."""

from pathlib import Path

from databus.messages import Manifest
from rollout.base_weights import BaseWeights
from rollout.engine.base import Snapshot
from rollout.merging import write_weights

CHUNK_BYTES = 1 << 20


def snapshot_of(folder: Path, version: int, dtype: str) -> Snapshot:
    """Its weights, cast to `dtype`, in shared memory; whoever gets it closes it. Blocks for as long as they are read.

    Raises: ValueError, one line, for a folder without a configuration, or without weights as safetensors.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    try:
        base = BaseWeights(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is no model's folder: {' '.join(str(error).split())}") from None
    empty = Manifest(version=version, num_bytes=0, chunk_bytes=CHUNK_BYTES, tensors=())
    try:
        manifest, fd = write_weights(((name, base[name]) for name in base.names), empty, dtype)
    finally:
        base.close()
    return Snapshot(version=version, manifest=manifest, fd=fd)
