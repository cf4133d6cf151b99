"""Versions as files in a folder that all machines share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from databus.codec import encode_header
from databus.weight_files import delta_parts, path_of, safetensors_parts, write_file
from learner.kept_versions import KeptVersions
from learner.snapshot import Snapshot

PREFIX = "learner-"


class FilesOut:
    """An `Outlet`. Each learner has a folder of its own within the run's, so that a reader never meets another's files;
    what an earlier learner of the run has left there goes."""

    scheme = "file"
    whole_suffix = "safetensors"

    def __init__(self, folder: Path, keep: int) -> None:
        """Args: folder: no other run may use it. keep: newest versions that can be had. Raises: OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.glob(f"{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder.resolve()))  # mode 0700
        self._versions = KeptVersions(keep)
        self.address = f"{self.scheme}://{self._folder}"
        self.keeps_data = False

    def publish(self, snapshot: Snapshot) -> None:
        """Raises: RuntimeError, in one line, where there is no room for it."""
        version = snapshot.manifest.version
        if snapshot.data is not None:
            self._write(version, self.whole_suffix, self._whole_parts(snapshot, snapshot.data.data))
        if snapshot.delta is not None:
            self._write(version, "delta", delta_parts(snapshot.delta.chunks))
        unneeded = self._versions.add(snapshot)
        manifest = self._versions.manifest(version)
        assert manifest is not None
        self._write(version, "manifest", iter((encode_header(manifest),)))
        for old in unneeded:
            self._remove(old.manifest.version)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _whole_parts(self, snapshot: Snapshot, data: memoryview) -> Iterator[bytes | memoryview]:
        return safetensors_parts(snapshot.manifest, data)

    def _write(self, version: int, suffix: str, parts: Iterator[bytes | memoryview]) -> None:
        path = path_of(self._folder, version, suffix)
        try:
            write_file(path, list(parts))
        except OSError as error:
            raise RuntimeError(f"version {version} cannot be published: {path}: {error.strerror}") from error

    def _remove(self, version: int) -> None:
        for suffix in ("manifest", "delta", self.whole_suffix):
            path_of(self._folder, version, suffix).unlink(missing_ok=True)
