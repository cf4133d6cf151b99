"""Publishes policy versions beside training: a step waits for a copy of the weights, a thread does the rest."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from databus.codec import Array
from databus.config import WeightsConfig
from databus.delta import DeltaEncoder, apply_chunk, touched
from databus.messages import Delta, Manifest, Probe, TensorSpec, VersionPublished
from learner.outlet import Outlet
from learner.shards import LocalShards
from learner.snapshot import EncodedDelta, Snapshot, Snapshotter

logger = logging.getLogger(__name__)

MAX_SHARE = 0.5
"""A delta that is larger than this share of the whole saves too little for what it takes to put it in."""

Say = Callable[[VersionPublished], None]


class Publisher(Protocol):
    """All ranks have one, and call it alike."""

    def publish(self, version: int, probe: Probe | None) -> None:
        """The weights as they are now; they may change when this returns. Waits for the version before."""
        ...

    def wait(self) -> None:
        """Until workers can fetch all that was published. Raises: RuntimeError and others where one could not be."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the last version that was published; empty on ranks other than 0."""
        ...

    def close(self) -> None: ...


class TakesSnapshots(Protocol):
    def take(self, version: int, probe: Probe | None = None) -> Snapshot | None: ...


class WholePublisher:
    """Every version in whole, at once: for what is small, such as adapters."""

    def __init__(self, snapshotter: TakesSnapshots, outlet: Outlet | None, say: Say) -> None:
        """Args: outlet: None on ranks other than 0. say: tells the broker."""
        self._snapshotter = snapshotter
        self._outlet = outlet
        self._say = say
        self._metrics: dict[str, float] = {}

    def publish(self, version: int, probe: Probe | None) -> None:
        began = time.perf_counter()
        snapshot = self._snapshotter.take(version, probe)
        if self._outlet is None or snapshot is None:
            return
        self._outlet.publish(snapshot)
        self._metrics = _metrics(snapshot, time.perf_counter() - began)
        self._say(_published(snapshot.manifest, self._outlet))

    def wait(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def close(self) -> None:
        pass


class DeltaPublisher:
    """Each rank compares its own shards with those of the version before; only what differs travels to rank 0."""

    def __init__(
        self,
        snapshotter: Snapshotter,
        config: WeightsConfig,
        outlet: Outlet | None,
        say: Say,
        timeout_s: float,
    ) -> None:
        """Called by all ranks of the process group. Args: outlet: None on ranks other than 0. say: tells the broker,
        from a thread. timeout_s: how long a rank waits for the others."""
        # Of its own: what is said between ranks here must not mix with what a step says.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._snapshotter = snapshotter
        self._config = config
        self._outlet = outlet
        self._say = say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishing: Future[None] | None = None
        self._shards = LocalShards(snapshotter.causal_lm, snapshotter.layout, self._rank, self._world_size)
        self._old = np.empty(0, np.uint8)
        """The version before: on rank 0 all of it, on others what they hold."""
        word_bytes = self._shards.words(self._old).itemsize
        self._encoder = DeltaEncoder(word_bytes, config.zstd_level)
        self._starts = _starts(snapshotter, word_bytes)
        self._manifest: Manifest | None = None
        self._last_whole = 0
        self._metrics: dict[str, float] = {}

    def publish(self, version: int, probe: Probe | None) -> None:
        self.wait()
        if not len(self._old):
            self._publish_first(version, probe)
            return
        self._shards.copy()
        self._publishing = self._thread.submit(self._publish_next, version, probe)

    def wait(self) -> None:
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.result()

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def close(self) -> None:
        """Wait for what is being published; what ends the run otherwise is the cause that counts."""
        self._thread.shutdown()
        try:
            self.wait()
        except Exception:
            logger.exception("the last version could not be published")

    def _publish_first(self, version: int, probe: Probe | None) -> None:
        began = time.perf_counter()
        snapshot = self._snapshotter.take(version, probe)
        self._shards.copy()  # on all ranks: some parameters are gathered
        if snapshot is None or snapshot.data is None:
            self._old = self._shards.bits.copy()
            return
        self._put_out(snapshot, began)
        assert self._outlet is not None
        self._old = snapshot.data.copy() if self._outlet.keeps_data else snapshot.data

    def _publish_next(self, version: int, probe: Probe | None) -> None:
        began = time.perf_counter()
        if self._world_size == 1 and not self._config.has_deltas:
            self._old, self._shards.bits = self._shards.bits, self._old
            every = set(range(len(self._starts)))
            self._put_out(self._snapshot(self._snapshotter.manifest(version, self._specs(every), probe), []), began)
            return
        chunks = list(self._encode())
        tables = self._encoder.take_tables()
        if self._rank != 0:
            self._send(chunks)
            return
        changed = set[int]().union(*(touched(table, self._starts) for table in tables))
        for rank in range(1, self._world_size):
            others = self._receive(rank)
            changed |= self._put_in(others)
            chunks += others
        manifest = self._snapshotter.manifest(version, self._specs(changed), probe)
        self._put_out(self._snapshot(manifest, chunks), began)

    def _encode(self) -> Iterator[bytes]:
        """This rank's chunks; `_old` becomes what was copied."""
        new, old = self._shards.words(self._shards.bits), self._shards.words(self._old)
        for region in self._shards.regions:
            begin = region.first if self._rank == 0 else region.own
            own = slice(region.own, region.own + region.length)
            yield from self._encoder.encode(old[begin : begin + region.length], new[own], region.first)
        yield from self._encoder.flush()

    def _put_in(self, chunks: list[bytes]) -> set[int]:
        """Into `_old`. Returns: places in the manifest of the tensors that they may have changed."""
        words = self._shards.words(self._old)
        return set[int]().union(*(touched(apply_chunk(chunk, words), self._starts) for chunk in chunks))

    def _specs(self, changed: set[int]) -> list[TensorSpec]:
        assert self._manifest is not None
        layout = self._snapshotter.layout
        return [
            layout.spec(spec.name, spec.shape, self._old) if index in changed else spec
            for index, spec in enumerate(self._manifest.tensors)
        ]

    def _snapshot(self, manifest: Manifest, chunks: list[bytes]) -> Snapshot:
        """As a delta where that is worth it; in whole where it is not, and now and then for those who join."""
        assert self._manifest is not None and self._outlet is not None
        delta = Delta(
            version=manifest.version,
            base_version=self._manifest.version,
            base_hash=self._manifest.hash,
            num_chunks=len(chunks),
            num_bytes=sum(map(len, chunks)),
        )
        is_worth_it = self._config.has_deltas and delta.num_bytes <= MAX_SHARE * manifest.num_bytes
        encoded = EncodedDelta(delta, tuple(chunks)) if is_worth_it else None
        data = None
        if encoded is None or manifest.version - self._last_whole >= self._config.full_every:
            data = self._old.copy() if self._outlet.keeps_data else self._old
        return Snapshot(manifest, data, encoded)

    def _put_out(self, snapshot: Snapshot, began: float) -> None:
        assert self._outlet is not None
        self._outlet.publish(snapshot)
        self._manifest = snapshot.manifest
        if snapshot.data is not None:
            self._last_whole = snapshot.manifest.version
        self._metrics = _metrics(snapshot, time.perf_counter() - began)
        self._say(_published(snapshot.manifest, self._outlet))

    def _send(self, chunks: list[bytes]) -> None:
        sizes = torch.tensor([len(chunks), *map(len, chunks)])
        dist.send(torch.tensor([len(sizes)]), 0, self._group)
        dist.send(sizes, 0, self._group)
        if chunks:
            dist.send(torch.from_numpy(np.frombuffer(b"".join(chunks), np.uint8).copy()), 0, self._group)

    def _receive(self, rank: int) -> list[bytes]:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, rank, self._group)
        sizes = torch.zeros(int(length), dtype=torch.int64)
        dist.recv(sizes, rank, self._group)
        ends = sizes[1:].cumsum(0).tolist()
        if not ends:
            return []
        packed = torch.empty(ends[-1], dtype=torch.uint8)
        dist.recv(packed, rank, self._group)
        data = packed.numpy().tobytes()
        return [data[end - size : end] for size, end in zip(sizes[1:].tolist(), ends, strict=True)]


def make_publisher(
    causal_lm: nn.Module,
    dtype: Literal["float32", "bfloat16"],
    config: WeightsConfig,
    outlet: Outlet | None,
    say: Say,
    timeout_s: float,
) -> DeltaPublisher:
    """Of a model whose own parameters are trained."""
    return DeltaPublisher(Snapshotter(causal_lm, dtype, dist.get_rank()), config, outlet, say, timeout_s)


def _starts(snapshotter: Snapshotter, word_bytes: int) -> Array:
    """int64: the first word of each tensor of the manifest, in its order."""
    return np.array(list(snapshotter.layout.offsets.values()), np.int64) // word_bytes


def _published(manifest: Manifest, outlet: Outlet) -> VersionPublished:
    return VersionPublished(version=manifest.version, address=outlet.address, num_bytes=manifest.num_bytes)


def _metrics(snapshot: Snapshot, publish_s: float) -> dict[str, float]:
    """Bytes: what a worker that follows has to fetch."""
    size = snapshot.manifest.num_bytes if snapshot.delta is None else snapshot.delta.delta.num_bytes
    return {"weights/published_bytes": size, "weights/publish_s": publish_s}
