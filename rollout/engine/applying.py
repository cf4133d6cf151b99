"""What an engine tells its processes of a version to be loaded, and what they answer."""

from msgspec import Struct

from databus.messages import Manifest
from rollout.fetches import DeviceCopy


class Apply(Struct, frozen=True, kw_only=True):
    """path: of the snapshot's buffer, a memfd under /proc. changed: tensors that differ from the version served,
    which is `base_version`; None, as `base_version` is then: not known, any may. device_copy: the same buffer in the
    GPU's memory; None: there is none."""

    manifest: Manifest
    path: str
    base_version: int | None = None
    changed: tuple[str, ...] | None = None
    device_copy: DeviceCopy | None = None


class Applied(Struct, frozen=True, kw_only=True):
    """refused: why it is not loaded, and what was served before is; "" where it is.

    load_s: of checking, loading and reading back. tensors, num_bytes: loaded. read_bytes: of these, what was read back
    from where the engine computes with it; the rest lies there packed.
    """

    refused: str = ""
    load_s: float = 0.0
    tensors: int = 0
    num_bytes: int = 0
    read_bytes: int = 0
