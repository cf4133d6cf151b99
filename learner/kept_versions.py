"""Which versions a learner still has for its workers, and how each can be had."""

from collections import OrderedDict

import msgspec

from databus.messages import Delta, Manifest
from learner.snapshot import Snapshot


class KeptVersions:
    """The newest `keep` versions can be had: each in whole, or as deltas from one that is. Not safe among threads."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._snapshots: OrderedDict[int, Snapshot] = OrderedDict()
        self._manifests: dict[int, Manifest] = {}

    @property
    def newest(self) -> int | None:
        return next(reversed(self._snapshots), None)

    def add(self, snapshot: Snapshot) -> list[Snapshot]:
        """One more version. Returns: those that nobody will need any more.

        Raises: AssertionError for a version that can be had neither in whole nor from one that is.
        """
        version = snapshot.manifest.version
        self._snapshots[version] = snapshot
        self._manifests[version] = self._planned(snapshot)
        while len(self._manifests) > self._keep:
            del self._manifests[min(self._manifests)]
        needed = min(manifest.whole_version for manifest in self._manifests.values())
        return [self._snapshots.pop(old) for old in list(self._snapshots) if old < needed]

    def manifest(self, version: int) -> Manifest | None:
        """With every way to it; None if it is not to be had."""
        return self._manifests.get(version)

    def get(self, version: int) -> Snapshot | None:
        """None if nobody needs it any more."""
        return self._snapshots.get(version)

    def _planned(self, snapshot: Snapshot) -> Manifest:
        deltas: list[Delta] = []
        whole = -1
        at: Snapshot | None = snapshot
        while at is not None:
            if at.data is not None and whole < 0:
                whole = at.manifest.version
            if at.delta is None:
                break
            deltas.insert(0, at.delta.delta)
            base = self._snapshots.get(at.delta.delta.base_version)
            at = base if base is not None and base.manifest.hash == at.delta.delta.base_hash else None
        assert whole >= 0, f"version {snapshot.manifest.version} is published as a delta of nothing that is kept"
        return msgspec.structs.replace(snapshot.manifest, whole_version=whole, deltas=tuple(deltas))
