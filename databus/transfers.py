"""How a worker and the learner agree to move a version between GPUs, beside the bus that says what the version is.

Worker -> weight server: `TransferRequest`. Weight server -> worker: one of `MappedOffer` (`weights.backend=ipc`),
`CollectiveOffer` (`nccl`) and `NoTransfer`. What moves is the version's flat buffer, whole; the manifest, and the
checksums in it, come over the bus.
"""

from msgspec import Struct

COLLECTIVE_BYTES = 1 << 28
"""That both ends move in one collective."""
SLOWEST_BYTES_S = 1 << 30
"""A transfer that is slower for long is given up: the bus is as fast."""
JOINED = "joined"
"""Set in the store, below a group's name, by the worker that has come."""
COLLECTIVES = {"cuda": "nccl", "cpu": "gloo"}
"""What moves it, by where both ends have it. Only tests have it in host memory."""
MAX_HANDLE_BYTES = 1024
SCHEMES = {"nccl": "nccl+", "ipc": "ipc+"}
"""Of the addresses that learners announce, before that of the weight server, by backend."""


class DeviceMemory(Struct, frozen=True, kw_only=True):
    """Memory of a GPU that other processes of the machine can map. None of it is ever unpickled: it is what torch's
    storages tell of themselves (`UntypedStorage._share_cuda_`), field by field.

    device_uuid: of the GPU. num_bytes: of the storage. handle: the driver's, of the allocation that it lies in, at
    offset_bytes. counter, counter_offset: by which torch counts who has it mapped. event: the driver's, which whoever
    maps it waits for if has_event.
    """

    device_uuid: str
    num_bytes: int
    handle: bytes
    offset_bytes: int
    counter: bytes
    counter_offset: int
    event: bytes
    has_event: bool

    @classmethod
    def of(cls, device_uuid: str, shared: "tuple[int, bytes, int, int, bytes, int, bytes, bool]") -> "DeviceMemory":
        """Args: shared: what `_share_cuda_` returns; the number that the device has in this process says nothing to
        others."""
        _, handle, num_bytes, offset_bytes, counter, counter_offset, event, has_event = shared
        return cls(
            device_uuid=device_uuid,
            num_bytes=num_bytes,
            handle=handle,
            offset_bytes=offset_bytes,
            counter=counter,
            counter_offset=counter_offset,
            event=event,
            has_event=has_event,
        )

    def arguments(self, device: int) -> "tuple[int, bytes, int, int, bytes, int, bytes, bool]":
        """For torch's `UntypedStorage._new_shared_cuda`. Args: device: number of the GPU in this process.

        Raises: ValueError for sizes that no memory has.
        """
        if max(len(self.handle), len(self.counter), len(self.event)) > MAX_HANDLE_BYTES:
            raise ValueError("a handle of a GPU's memory that is too long")
        if self.num_bytes < 1 or self.offset_bytes < 0 or self.counter_offset < 0:
            raise ValueError(f"{self.num_bytes} bytes of a GPU's memory, {self.offset_bytes} from its begin")
        return (
            device,
            self.handle,
            self.num_bytes,
            self.offset_bytes,
            self.counter,
            self.counter_offset,
            self.event,
            self.has_event,
        )


class TransferRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> weight server: I can take the whole of `version` into a GPU's memory, now."""

    version: int


class MappedOffer(Struct, frozen=True, kw_only=True, tag=True):
    """Weight server -> worker: it lies here; copy it. The learner waits for nobody, and may overwrite it meanwhile:
    checksums tell.

    visible: what CUDA_VISIBLE_DEVICES calls the GPU, by which a process that does not see it can be started so that it
    does; "" where the learner sees all.
    """

    version: int
    memory: DeviceMemory
    visible: str = ""


class CollectiveOffer(Struct, frozen=True, kw_only=True, tag=True):
    """Weight server -> worker: be rank 1 of 2 of a group that meets, as `name`, at a store on `port` of the learner's
    machine; rank 0 then broadcasts the version in parts of `COLLECTIVE_BYTES`."""

    version: int
    port: int
    name: str


class NoTransfer(Struct, frozen=True, kw_only=True, tag=True):
    """Weight server -> worker: not now, if `is_busy`; else take it over the bus. reason: one line for a person."""

    version: int
    reason: str
    is_busy: bool = False


Offer = MappedOffer | CollectiveOffer


def split_scheme(address: str) -> tuple[str, str]:
    """(what goes before the weight server's own address, "" where nothing does; that address)."""
    scheme = next((scheme for scheme in SCHEMES.values() if address.startswith(scheme)), "")
    return scheme, address.removeprefix(scheme)
