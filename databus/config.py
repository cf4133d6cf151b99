"""Settings of the bus and of the broker."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

PositiveFloat = Annotated[float, Meta(gt=0)]
PositiveInt = Annotated[int, Meta(ge=1)]

StalePolicy = Literal["drop", "mask", "requeue"]


class BusConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sockets, deadlines and limits.

    address: where the broker listens; "auto" is an ipc socket of the run, `tcp://HOST:PORT` serves other machines.
    keys: folder of the CURVE keys that tcp sockets use (`echelon keys new`); "auto": the run makes its own.
    plain: no keys and no encryption on tcp, which is then allowed on loopback alone.
    slow_fraction, slow_s: a worker that, while it has work, stays below this share of the others' median tokens/s for
        so long is sent away, and replaced where the supervisor started it. 0: none is.
    heartbeat_s: how often every peer is heard.
    peer_timeout_s: silence after which a peer is taken for dead and loses its leases.
    lease_s: time a worker has for one group.
    reconnect_s: time for which peers wait for a broker that is away; then they end.
    max_attempts: leases of one cursor before its group counts as failed.
    max_message_bytes: larger messages are refused.
    """

    address: str = "auto"
    heartbeat_s: PositiveFloat = 2.0
    peer_timeout_s: PositiveFloat = 30.0
    lease_s: PositiveFloat = 600.0
    reconnect_s: PositiveFloat = 120.0
    max_attempts: PositiveInt = 3
    max_message_bytes: PositiveInt = 1 << 28
    keys: Annotated[str, Meta(min_length=1)] = "auto"
    plain: bool = False
    slow_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.3
    slow_s: PositiveFloat = 120.0

    @property
    def encrypted(self) -> bool:
        """Do the run's sockets use keys? On ipc, the permissions of files say who may connect."""
        return self.address.startswith("tcp://") and not self.plain


class JournalConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The broker's journal. keep: all of it; else what is needed to go on from the checkpoints that are kept."""

    keep: bool = False


class WeightsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How policy versions get from the learner to the workers; see docs/guide/weights.md.

    backend: `bus`: over the learner's own socket; `file`: through a folder that all machines share; `shm`: through
        shared memory, where all are on one machine; from GPU to GPU, and over the socket where that fails: `nccl`:
        of any machines; `ipc`: of one machine.
    encoding: `delta`: as what differs from the version before, where that is less than half of the whole; `dense`:
        whole; `auto`: deltas over the bus and in files, dense elsewhere.
    full_every: with deltas, versions from a whole one that is kept to the next: a worker that joins takes it, and the
        deltas since.
    folder: of `file`; "": the run's own.
    zstd_level: of deltas; higher ones are smaller, and take the learner's machine longer.
    """

    backend: Literal["bus", "file", "shm", "nccl", "ipc"] = "bus"
    encoding: Literal["auto", "delta", "dense"] = "auto"
    full_every: PositiveInt = 8
    folder: str = ""
    zstd_level: Annotated[int, Meta(ge=1, le=19)] = 1

    @property
    def has_deltas(self) -> bool:
        return self.encoding == "delta" or (self.encoding == "auto" and self.backend in ("bus", "file"))

    @property
    def between_gpus(self) -> bool:
        return self.backend in ("nccl", "ipc")


class HistoryConfig(Struct, frozen=True, kw_only=True):
    """How much the broker remembers of earlier completions, to send it with leases (`databus.history`).

    tokens: of one problem. window_versions: completions sampled more than so many policy versions before the newest
    one are forgotten. total_tokens: of all problems together; beyond, the least recently used are forgotten.
    """

    tokens: int
    window_versions: int
    total_tokens: int


class BrokerConfig(Struct, frozen=True, kw_only=True):
    """What the broker needs of a run; `echelon` derives it from the run's configuration.

    history: None sends none. keep_journal: as `JournalConfig.keep`.
    """

    run_id: str
    address: str
    steps: int
    start_step: int
    group_size: int
    batch_groups: int
    max_staleness: int
    stale_policy: StalePolicy
    max_tokens: int
    temperature: float
    eval_every: int
    eval_max_tokens: int
    eval_timeout_s: float
    max_reward_failures: int
    bus: BusConfig
    eval_threshold: float = 1.0
    config_json: bytes = b""
    run_dir: str = ""
    max_filtered: int = 1000
    history: HistoryConfig | None = None
    keep_journal: bool = False
