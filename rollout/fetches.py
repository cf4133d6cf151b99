"""What a worker and the process that takes versions into a GPU's memory for it say to each other."""

from msgspec import Struct

from databus.transfers import DeviceMemory, Offer


class DeviceCopy(Struct, frozen=True, kw_only=True):
    """A version in a GPU's memory, beside the same in the host's, whose checksums are compared.

    memory: where it lies, until the next version is pulled. word_sum: `rollout.cuda_memory.word_sum` of it, by which
    whoever maps it can tell that it is this.
    """

    memory: DeviceMemory
    word_sum: int


class Fetch(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> receiver: take this into the GPU's memory, and copy it from there into the file at `path`, which has
    `num_bytes`. host: where the learner is. timeout_s: for each thing that may wait."""

    offer: Offer
    host: str
    path: str
    num_bytes: int
    timeout_s: float


class Ready(Struct, frozen=True, kw_only=True, tag=True):
    """Receiver -> worker: it sees its GPU, and waits for the first thing to do."""


class Fetched(Struct, frozen=True, kw_only=True, tag=True):
    """Receiver -> worker: it is in both; nothing is checked."""

    copy: DeviceCopy


class FetchFailed(Struct, frozen=True, kw_only=True, tag=True):
    """Receiver -> worker: in one line; it ends now."""

    error: str
