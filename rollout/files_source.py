"""Fetches a version from files in a folder that learner and workers share."""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from databus.codec import Frame, MalformedMessage, decode_header
from databus.messages import Delta, Manifest
from databus.weight_files import open_file, path_of, read_delta, read_safetensors
from rollout.weight_source import PullError, VersionGoneError

MAX_MANIFEST_BYTES = 1 << 27

_decoder = msgspec.msgpack.Decoder(Manifest)


@contextlib.contextmanager
def files_source(address: str, stop: threading.Event) -> "Iterator[FilesSource]":
    """As `open_source`."""
    path = Path(address.removeprefix("file://"))
    if not path.is_absolute():
        raise ValueError(f"{address} is not allowed: expected file:///FOLDER")
    yield FilesSource(path, stop)


class FilesSource:
    """A `WeightSource`. A file that has gone was of an old version."""

    def __init__(self, folder: Path, stop: threading.Event) -> None:
        self.received_bytes = 0
        self.device_copy = None
        self._folder = folder
        self._stop = stop

    def manifest(self, version: int) -> Manifest:
        with self._opened(version, "manifest") as descriptor:
            size = os.fstat(descriptor).st_size
            if size > MAX_MANIFEST_BYTES:
                raise MalformedMessage(f"a manifest of {size} bytes")
            manifest = decode_header(os.pread(descriptor, size, 0), _decoder)
        if manifest.version != version:
            raise MalformedMessage(f"the manifest is of version {manifest.version}")
        return manifest

    def whole(self, manifest: Manifest) -> int:
        fd = os.memfd_create(f"weights-{manifest.version}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, manifest.num_bytes)
            with self._opened(manifest.whole_version, "safetensors") as file:
                # The map goes with its last view: closed by hand it would object to one in a traceback.
                read_safetensors(file, manifest, memoryview(mmap.mmap(fd, manifest.num_bytes)))
        except BaseException:
            os.close(fd)
            raise
        self.received_bytes += manifest.num_bytes
        return fd

    def is_private(self) -> bool:
        return True

    def fall_back(self) -> bool:
        return False

    def chunks(self, delta: Delta) -> Iterator[Frame]:
        with self._opened(delta.version, "delta") as descriptor:
            for chunk in read_delta(descriptor):
                if self._stop.is_set():
                    raise PullError(f"version {delta.version}: given up")
                self.received_bytes += len(chunk)
                yield chunk

    @contextlib.contextmanager
    def _opened(self, version: int, suffix: str) -> Iterator[int]:
        if self._stop.is_set():
            raise PullError(f"version {version}: given up")
        path = path_of(self._folder, version, suffix)
        try:
            descriptor = open_file(path)
        except FileNotFoundError:
            raise VersionGoneError(f"version {version} is not kept by the learner: there is no {path}") from None
        except OSError as error:
            raise PullError(f"version {version}: {path} cannot be read: {error.strerror}") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)
