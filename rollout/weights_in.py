"""Pulls policy versions from the learner into anonymous shared memory: what differs, where an earlier one is held."""

import logging
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from databus.codec import MalformedMessage
from databus.keys import ClientKeys
from databus.messages import Delta, Manifest
from databus.version_hash import changed_tensors, same_layout, version_hash
from rollout.engine.base import Snapshot
from rollout.engine.tensors import first_mismatch
from rollout.receiver import Receiver
from rollout.weight_source import DamagedError, PullLimits, VersionGoneError, WeightSource, open_source

logger = logging.getLogger(__name__)

READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
COPY_BYTES = 1 << 28
"""At a time: between two of these a copy can be given up."""
WORD_DTYPES = {"float32": np.dtype("<u4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2")}


def pull_snapshot(
    address: str,
    version: int,
    num_bytes: int,
    stop: threading.Event,
    limits: PullLimits | None = None,
    keys: ClientKeys | None = None,
) -> Snapshot:
    """One version, by one who holds none; as `Puller`."""
    puller = Puller(limits, keys)
    try:
        return puller(address, version, num_bytes, stop)
    finally:
        puller.close()


class _Buffer:
    """A version's bytes in anonymous shared memory: a descriptor, and all of its pages mapped."""

    def __init__(self, fd: int, num_bytes: int, access: int) -> None:
        """Takes the descriptor over, and closes it where this raises. Raises: OSError."""
        self.fd = fd
        try:
            # All pages at once: one by one they would take as long as what is done with them.
            self.map = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, access)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """The map goes with the last array that has it: closed by hand it would object to one in a traceback."""
        os.close(self.fd)
        del self.map


@dataclass(frozen=True)
class _Held:
    """A version that was pulled, and found to be what its manifest says; never written again."""

    manifest: Manifest
    buffer: _Buffer

    @property
    def version(self) -> int:
        return self.manifest.version


class _Spare:
    """A copy of what is held, made ahead in a thread: the next delta is put into it at once.

    Two versions are held from one pull to the next, where without it there were two at a pull's end alone; and a third
    while an engine still has the one before. That memory is taken, given back and mapped takes longer than what is
    done with it, and so is done here, too.
    """

    def __init__(self, held: _Held, before: _Held | None) -> None:
        """Args: before: what was held until now; it is closed."""
        self._buffer: _Buffer | None = None
        self._stop = threading.Event()
        fd = os.dup(held.buffer.fd)
        self._thread = threading.Thread(
            target=self._make, args=(fd, held.manifest, before), name="weights-spare", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def take(self) -> _Buffer | None:
        """None where it could not be made. Waits for it; once."""
        self._thread.join()
        buffer, self._buffer = self._buffer, None
        return buffer

    def close(self) -> None:
        self._stop.set()
        buffer = self.take()
        if buffer is not None:
            buffer.close()

    def _make(self, fd: int, manifest: Manifest, before: _Held | None) -> None:
        try:
            if before is not None:
                before.buffer.close()
            self._buffer = _Buffer(_copied(fd, manifest, self._stop), manifest.num_bytes, READ_WRITE)
        except (OSError, DamagedError) as error:  # as where there is no room: then it is tried again, in the pull
            logger.warning("no copy of version %d was made ahead: %s", manifest.version, error)
        finally:
            os.close(fd)


class Puller:
    """A `Pull` that keeps the version that it pulled last, and asks only for what differs from it.

    What is pulled is put together beside what is served, never in its place; a delta that does not fit, for whatever
    reason, is followed by the whole version.
    """

    def __init__(
        self, limits: PullLimits | None = None, keys: ClientKeys | None = None, receiver: Receiver | None = None
    ) -> None:
        """Args: keys: None for plain text. receiver: of versions from GPU to GPU."""
        self._limits = limits or PullLimits()
        self._keys = keys
        self._receiver = receiver or Receiver()
        self._held: _Held | None = None
        self._spare: _Spare | None = None
        self._lock = threading.Lock()

    def __call__(self, address: str, version: int, num_bytes: int, stop: threading.Event) -> Snapshot:
        """Fetch `version`, check every tensor's xxh3, and return it; whoever gets it closes it. Blocks for seconds.

        Args: num_bytes: its size as it was announced. stop: once set, the pull ends within a moment.
        Raises: VersionGoneError; PullError for silence, a wrong answer, or a checksum that does not match; ValueError
            for an address that may not be used.
        """
        with self._lock:  # a pull that was given up may still be ending in its thread
            try:
                return self._pull(address, version, num_bytes, stop)
            except MalformedMessage as error:
                raise DamagedError(f"version {version}: the learner sent something malformed: {error}") from error

    def settle(self) -> None:
        """Wait until what is made ahead for the next pull is there."""
        with self._lock:
            if self._spare is not None:
                self._spare.wait()

    def close(self) -> None:
        """Forget what is held. Harmless when called again."""
        with self._lock:
            self._drop()
            self._receiver.close()

    def _drop(self) -> None:
        self._drop_spare()
        if self._held is not None:
            self._held.buffer.close()
        self._held = None

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.close()
        self._spare = None

    def _pull(self, address: str, version: int, num_bytes: int, stop: threading.Event) -> Snapshot:
        with open_source(address, stop, self._limits, self._keys, self._receiver) as source:
            manifest = source.manifest(version)
            _check(manifest, num_bytes)
            buffer = self._fetch_from_held(source, manifest)
            by_delta = buffer is not None
            if buffer is None:
                buffer = _fetch_whole(source, manifest)
            received_bytes, device_copy = source.received_bytes, source.device_copy
        if device_copy is not None:
            self._receiver.matched(True)
        before, self._held = self._held, _Held(manifest, buffer)
        snapshot = Snapshot(
            version=version,
            manifest=manifest,
            fd=os.dup(buffer.fd),
            received_bytes=received_bytes,
            device_copy=device_copy,
        )
        if by_delta:  # and so, most likely, is the next one
            self._spare = _Spare(self._held, before)
        elif before is not None:
            before.buffer.close()
        base = None if before is None else before.manifest
        return snapshot if base is None or not same_layout(base, manifest) else _with_base(snapshot, base)

    def _fetch_from_held(self, source: WeightSource, manifest: Manifest) -> _Buffer | None:
        """The version, checked. None where what is held is no base of it, or that came to nothing: then nothing is held
        any more. Raises: PullError."""
        held = self._held
        deltas = None if held is None else _from_base(manifest, held.manifest)
        if held is None or deltas is None:
            self._drop_spare()
            return None
        spare, self._spare = self._spare, None
        try:
            buffer = None if spare is None else spare.take()
            if buffer is None:
                buffer = _Buffer(_copied(held.buffer.fd, manifest), manifest.num_bytes, READ_WRITE)
            return _completed(source, manifest, deltas, buffer)
        except (DamagedError, MalformedMessage, VersionGoneError) as error:
            logger.warning(
                "version %d, from version %d: %s; pulling it in whole", manifest.version, held.version, error
            )
            self._drop()
            return None


def _with_base(snapshot: Snapshot, base: Manifest) -> Snapshot:
    return replace(snapshot, base_version=base.version, changed=changed_tensors(base, snapshot.manifest))


def _fetch_whole(source: WeightSource, manifest: Manifest) -> _Buffer:
    """The version, checked. Raises: PullError, MalformedMessage."""
    while True:
        try:
            return _fetch_whole_once(source, manifest)
        except DamagedError as error:
            if not source.fall_back():
                raise
            logger.warning("%s: the learner may have put the next one there; over the bus", error)


def _fetch_whole_once(source: WeightSource, manifest: Manifest) -> _Buffer:
    deltas = [delta for delta in manifest.deltas if 0 <= manifest.whole_version <= delta.base_version]
    fd = source.whole(manifest) if source.is_private() or not deltas else _copied_whole(source, manifest)
    access = READ_WRITE if deltas else mmap.PROT_READ
    return _completed(source, manifest, deltas, _Buffer(fd, manifest.num_bytes, access))


def _completed(source: WeightSource, manifest: Manifest, deltas: Sequence[Delta], buffer: _Buffer) -> _Buffer:
    """`buffer` itself, once what it lacks is in it, and it is what the manifest says; where it is not, it is closed."""
    try:
        _put_in(source, manifest, deltas, buffer.map)
        wrong = first_mismatch(manifest, buffer.map)  # of all: it takes a small part of the time that copying takes
        if wrong:
            raise DamagedError(f"version {manifest.version}: tensor {wrong!r} does not match its checksum")
    except BaseException:
        buffer.close()
        raise
    return buffer


def _from_base(manifest: Manifest, base: Manifest) -> list[Delta] | None:
    """The deltas from `base` to the version; None where there are none, or the whole is less to fetch."""
    if not base.hash or not same_layout(base, manifest):
        return None
    if base.hash == manifest.hash:
        return []
    for index, delta in enumerate(manifest.deltas):
        if (delta.base_version, delta.base_hash) == (base.version, base.hash):
            way = list(manifest.deltas[index:])
            is_less = sum(step.num_bytes for step in way) < _bytes_from_whole(manifest)
            return way if is_less else None
    return None


def _bytes_from_whole(manifest: Manifest) -> int:
    later = [delta.num_bytes for delta in manifest.deltas if delta.base_version >= manifest.whole_version]
    return manifest.num_bytes + sum(later if manifest.whole_version >= 0 else [])


def _copied_whole(source: WeightSource, manifest: Manifest) -> int:
    shared = source.whole(manifest)
    try:
        return _copied(shared, manifest)
    finally:
        os.close(shared)


def _copied(fd: int, manifest: Manifest, stop: threading.Event | None = None) -> int:
    """A copy that may be written to. Raises: OSError; DamagedError, also once `stop` is set."""
    copy = os.memfd_create(f"weights-{manifest.version}", os.MFD_CLOEXEC)
    try:
        done = 0
        while done < manifest.num_bytes:  # the kernel need not clear the pages first
            if stop is not None and stop.is_set():
                raise DamagedError("given up")
            count = os.sendfile(copy, fd, done, min(COPY_BYTES, manifest.num_bytes - done))
            if not count:
                raise DamagedError(f"version {manifest.version}: its base is cut short")
            done += count
    except BaseException:
        os.close(copy)
        raise
    return copy


def _put_in(source: WeightSource, manifest: Manifest, deltas: Sequence[Delta], buffer: mmap.mmap) -> None:
    """Overwrite what differs. Raises: PullError, MalformedMessage."""
    if not deltas:
        return
    # Numba is not to be in the process before vLLM's engine has started there, which takes its dispatcher apart.
    from databus.delta import apply_chunk

    dtypes = {spec.dtype for spec in manifest.tensors}
    if len(dtypes) != 1 or not dtypes <= WORD_DTYPES.keys():
        raise MalformedMessage(f"a delta between tensors of {', '.join(sorted(dtypes))}")
    word = WORD_DTYPES[dtypes.pop()]
    words = np.frombuffer(buffer, word, manifest.num_bytes // word.itemsize)
    for delta in deltas:
        for chunk in source.chunks(delta):
            apply_chunk(chunk, words)


def _check(manifest: Manifest, num_bytes: int) -> None:
    if manifest.num_bytes != num_bytes:
        raise MalformedMessage(f"a manifest of {manifest.num_bytes} bytes, {num_bytes} were announced")
    if manifest.num_bytes < 1 or manifest.chunk_bytes < 1:
        raise MalformedMessage(f"a manifest of {manifest.num_bytes} bytes in chunks of {manifest.chunk_bytes}")
    for spec in manifest.tensors:
        if spec.offset < 0 or spec.num_bytes < 0 or spec.offset + spec.num_bytes > manifest.num_bytes:
            raise MalformedMessage(f"tensor {spec.name!r} lies outside the manifest's {manifest.num_bytes} bytes")
    if manifest.hash and manifest.hash != version_hash(manifest.tensors):
        raise MalformedMessage("a manifest whose tensors are not those that its hash is of")
    for one, other in zip(manifest.deltas, manifest.deltas[1:], strict=False):
        if one.version != other.base_version:
            raise MalformedMessage(f"a delta of version {other.base_version} after one to {one.version}")
    if manifest.deltas and manifest.deltas[-1].version != manifest.version:
        raise MalformedMessage(f"deltas to version {manifest.deltas[-1].version}")
