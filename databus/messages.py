"""Every message of the bus, grouped by receiver; each says who sends it to whom. Those about weights that move between
GPUs are in `databus.transfers`.

A message is one msgpack header (a tagged struct of this module) followed by raw little-endian
column frames (see `databus.codec`). Nothing that arrives is ever unpickled or evaluated. New
fields go last, with defaults, so that an older peer can still decode.
"""

from typing import Literal

from msgspec import Struct

from databus.transfers import CollectiveOffer, MappedOffer, NoTransfer, TransferRequest

PROTOCOL = 1

Role = Literal["worker", "learner", "observer"]
Purpose = Literal["train", "eval"]
Standing = Literal["working", "spare", "leaving"]


class Column(Struct, frozen=True):
    """One raw frame that follows the header: its name, dtype (numpy, little-endian) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Sampling(Struct, frozen=True, kw_only=True):
    """How a completion is drawn. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0


# ---------------------------------------------------------------- any peer -> broker


class Hello(Struct, frozen=True, kw_only=True, tag=True):
    """First message of every connection, repeated after a reconnection; answered by `Welcome` or `Refused`.

    `version` is the policy version the peer holds: the one a worker's engine serves, or the
    one the learner starts from. `max_sequences` is how many sequences a worker's engine runs at once.
    `spare`: a worker that is leased nothing until it stands in for one that was lost. `joining` counts how often the
    peer has lost the broker and come back: its credits count anew each time.
    """

    role: Role
    name: str
    run_id: str = ""
    protocol: int = PROTOCOL
    version: int = 0
    max_sequences: int = 0
    pid: int = 0
    host: str = ""
    spare: bool = False
    joining: int = 0


class Heartbeat(Struct, frozen=True, kw_only=True, tag=True):
    """Any peer -> broker, every `heartbeat_s`; answered by `HeartbeatReply`. Counters are cumulative.

    `drafting`: counters of the drafter by name; see `databus.draft_metrics`. `scoring`: of the reward's parts; see
    `databus.scoring_metrics`. `episodes`: of episodes of several turns; see `databus.episode_metrics`.
    """

    running_sequences: int = 0
    generated_tokens: int = 0
    drafting: dict[str, float] = {}
    scoring: dict[str, float] = {}
    episodes: dict[str, float] = {}


class Goodbye(Struct, frozen=True, kw_only=True, tag=True):
    """Any peer -> broker: it leaves in good order; leases it still holds go back at once."""

    reason: str = ""


# ---------------------------------------------------------------- worker -> broker


class Credits(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> broker: how many training groups it has been willing to take *since it said hello*.

    Cumulative, so that a copy or a late arrival changes nothing: the broker keeps the maximum and
    leases while it has sent fewer. Evaluation leases cost no credit (`Hello.max_sequences` bounds them).
    """

    total: int


class Completed(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> broker: a scored group; columns as `databus.groups.encode_group` makes them. Kept until `Ack`."""

    group_id: str
    columns: tuple[Column, ...]
    reward_names: tuple[str, ...] = ()
    generate_s: float = 0.0
    score_s: float = 0.0


class Holding(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> broker, every few seconds: where it stands, so that whatever was lost on the way is made good.

    group_ids: all leases that it works on or whose result is not acknowledged. credits: as `Credits.total`.
    version: what its engine serves.
    """

    group_ids: tuple[str, ...]
    credits: int
    version: int


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> broker: the group cannot be completed. `cause` names the stage that failed."""

    group_id: str
    cause: Literal["engine", "reward"]
    error: str


class Released(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> broker: leases handed back untouched or unfinished; they are leased again."""

    group_ids: tuple[str, ...]


class Leaving(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> broker: lease me nothing more; what I finish still comes, the rest I hand back, then I say goodbye."""

    reason: str


class Mismatch(Struct, frozen=True, kw_only=True):
    """How far an engine's log-probabilities of a `Probe` are from the learner's; both finite.

    kl: k3 estimate of KL(engine ‖ learner), a mean over its tokens, nats. difference: the largest, nats.
    """

    kl: float
    difference: float


class VersionApplied(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> broker: the engine serves `version` from now on; what the update cost.

    mismatch: None where the version came without a probe. delay_s: that it was put off once it was there; no part of
    sync_s.
    """

    version: int
    pause_s: float = 0.0
    sync_s: float = 0.0
    received_bytes: int = 0
    mismatch: Mismatch | None = None
    delay_s: float = 0.0


class VersionRefused(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> broker: its mismatch gate has refused `version`; what was served before is served on.

    reason: one line for a person. Said again where the version is announced again.
    """

    version: int
    mismatch: Mismatch
    reason: str


# ---------------------------------------------------------------- learner -> broker


class BatchRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Learner -> broker: ready for batch `step`. Asking again for the same step gives the same batch."""

    step: int


class StepDone(Struct, frozen=True, kw_only=True, tag=True):
    """Learner -> broker: optimizer step `step` is taken; `metrics` as `area/name_unit` -> value."""

    step: int
    metrics: dict[str, float]


class VersionPublished(Struct, frozen=True, kw_only=True, tag=True):
    """Learner -> broker: `version` can be pulled from the weight server at `address`."""

    version: int
    address: str
    num_bytes: int


class PositionRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Learner -> broker: where the data stood once steps `0..step-1` were trained; goes into a checkpoint.

    oldest_checkpoint: the step from which the learner may still have to go on, by the checkpoints that are there.
    """

    step: int
    oldest_checkpoint: int = 0


# ---------------------------------------------------------------- observer -> broker


class StatusRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Observer (supervisor, `echelon watch`) -> broker; answered by `Status`. rows_from: and by `Rows` from that number
    on, if there are any; below 0 by none."""

    rows_from: int = -1


# ---------------------------------------------------------------- broker -> any peer


class Welcome(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> peer: accepted. `config_json` is the run's resolved configuration.

    A peer that gets a second one has said hello to a broker that did not know it, any more or yet: what it sent last
    may be lost, and credits count anew. reconnect_s: how long to wait for a broker that has gone.
    """

    run_id: str
    heartbeat_s: float
    peer_timeout_s: float
    config_json: bytes = b""
    run_dir: str = ""
    reconnect_s: float = 0.0


class Refused(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> peer: not accepted, or the last message was wrong; `reason` is one line for a person.

    unknown: the broker does not know the peer, which is to say hello again.
    """

    reason: str
    unknown: bool = False


class HeartbeatReply(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> peer: the broker lives; `version` is the newest published one."""

    version: int


class Stop(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> peer: the run is over; stop and exit. `ok` is False when something failed."""

    reason: str
    ok: bool = True


# ---------------------------------------------------------------- broker -> worker


class Lease(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> worker: generate and score one group.

    `problem` is the data set's row as JSON, for the reward function. `prompt_ids` are token ids of
    the prompt. `predicted_tokens` is the expected completion length (0: unknown). The lease
    returns to the broker `lease_s` seconds after it was sent. `problem_key` is a hash of the prompt
    (0: not reckoned). `history` describes the frames that follow: earlier completions of the same
    problem, columns as `databus.history.HISTORY_COLUMNS`; none with an evaluation.
    """

    group_id: str
    cursor: int
    attempt: int
    purpose: Purpose
    prompt: str
    prompt_ids: tuple[int, ...]
    problem: bytes
    group_size: int
    sampling: Sampling
    lease_s: float
    predicted_tokens: int = 0
    problem_key: int = 0
    history: tuple[Column, ...] = ()


class Cancel(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> worker: these leases have expired or are no longer wanted; stop generating them."""

    group_ids: tuple[str, ...]


class Drain(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> worker: leave in good order, as on SIGTERM; `reason` is one line for a person."""

    reason: str


class Ack(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> worker: the group's result is settled, so the worker may forget it.

    `accepted` is False where the result was dropped (`reason` says why); never send it again either way.
    """

    group_id: str
    accepted: bool
    reason: str = ""


class VersionAnnounced(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> worker: pull `version` from the weight server at `address` and serve it."""

    version: int
    address: str
    num_bytes: int


OneToWorker = Lease | Cancel | Ack | VersionAnnounced | Drain


class Several(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> worker: what it has to say at one time, in its order. num_frames: how many of the frames that follow
    belong to each."""

    messages: tuple[OneToWorker, ...]
    num_frames: tuple[int, ...]


# ---------------------------------------------------------------- broker -> learner


class BatchGroup(Struct, frozen=True, kw_only=True):
    """One group of a `Batch`; its columns are frames `first_frame ..` of the batch message."""

    group_id: str
    columns: tuple[Column, ...]
    first_frame: int


class BatchFrames(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> learner: the frames of a batch that is being made durable; they count once its `Batch` has come.

    id: unlike that of any other batch, other brokers' among them.
    """

    id: int


class Batch(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> learner: the groups that step `step` trains, cut under the staleness bound.

    frames_id: of the `BatchFrames` that came before; 0 where the frames come with this.
    """

    step: int
    max_staleness: int
    groups: tuple[BatchGroup, ...]
    frames_id: int = 0


class Position(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> learner: the data position at `step`; opaque to the learner, kept in its checkpoint.

    `next_cursor` is the first cursor never leased; `pending` are earlier cursors with no trained
    group yet, as (cursor, next attempt), so that a resumed run skips and repeats nothing. `counts` are the
    ledger's totals at that step, so that a resumed run's metrics go on from them. `scheduling` is what the
    broker's scheduler needs to go on; empty where there is none. `accuracies` are those of the versions that were
    evaluated, None where the evaluation is not over, so that the learner can tell which checkpoints are the best.
    """

    step: int
    next_cursor: int
    pending: tuple[tuple[int, int], ...]
    counts: dict[str, int]
    scheduling: bytes = b""
    accuracies: dict[int, float | None] = {}


# ---------------------------------------------------------------- broker -> observer


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """A worker as the broker knows it. `standing`: a spare and one that is leaving get no leases. `joined_s`: since it
    said hello."""

    name: str
    version: int
    leased_groups: int
    running_sequences: int
    tokens_per_s: float
    silent_s: float
    standing: Standing = "working"
    joined_s: float = 0.0


class Status(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> observer: the run at a glance. `phase` is `starting | running | finishing | finished | failed`.

    `last_progress_s` is the age of the newest sign of progress (a group completed, a step done, a
    version applied); `error` is the first cause where the broker ended the run. `drained`: workers that the
    broker has told to leave, and why, until they are back. `training_s`: how long the learner has had the batch that
    it has, 0 where it has none; `requested`: it waits for one; `learner_silent_s`: since it was heard,
    `learner_joined_s`: since it said hello. `disk_full`: why nothing is being acknowledged or handed out. `refusal`:
    the newest version that an engine refused, and why. `batch_groups`: of which a batch is made; `oldest_lease_s`: how
    long the oldest lease has been out. `published`: the newest version and where it can be pulled, None before there is
    one.
    """

    phase: str
    step: int
    steps: int
    version: int
    learner_ready: bool
    workers: tuple[WorkerStatus, ...]
    running_groups: int
    queued_groups: int
    counts: dict[str, int]
    last_progress_s: float
    error: str = ""
    drained: dict[str, str] = {}
    training_s: float = 0.0
    requested: bool = False
    learner_silent_s: float = 0.0
    learner_joined_s: float = 0.0
    disk_full: str = ""
    refusal: str = ""
    batch_groups: int = 0
    oldest_lease_s: float = 0.0
    published: VersionAnnounced | None = None


class Rows(Struct, frozen=True, kw_only=True, tag=True):
    """Broker -> observer: rows of metrics as lines of JSON, counted from 0; more may follow if it asks again."""

    first: int
    rows: tuple[str, ...]


# ---------------------------------------------------------------- worker <-> weight server of the learner


class TensorSpec(Struct, frozen=True, kw_only=True):
    """One tensor of a snapshot: where its bytes lie in the version's flat buffer, and their xxh3-64."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    xxh3: int


class Probe(Struct, frozen=True, kw_only=True):
    """What a version's weights say of fixed texts, by the learner that published them.

    sequences: token ids, at least two each. logprobs: of every token but a sequence's first, at temperature 1, nats.
    """

    sequences: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


class AdaptedWeight(Struct, frozen=True, kw_only=True):
    """A tensor of the model's folder that an adapter changes. base_xxh3: xxh3-64 of it as float32, little-endian."""

    name: str
    base_xxh3: int


class Adapter(Struct, frozen=True, kw_only=True):
    """A version as low-rank updates of the model's folder: to each of `weights` W [out, in] it adds scale · B · A.

    The tensors of its manifest are float32: of every weight, in order, A [rank, in], named `NAME.lora_A`, and
    B [out, rank], named `NAME.lora_B`. All other weights are those of the folder.
    """

    scale: float
    weights: tuple[AdaptedWeight, ...]


class ManifestRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> weight server."""

    version: int


class Delta(Struct, frozen=True, kw_only=True):
    """A version as what differs from another: `num_chunks` chunks (`databus.delta`), `num_bytes` together.

    base_version, base_hash: the other's number, and its `Manifest.hash`: after a learner came back there may be two
    versions of one number.
    """

    version: int
    base_version: int
    base_hash: int
    num_chunks: int
    num_bytes: int


class Manifest(Struct, frozen=True, kw_only=True, tag=True):
    """Weight server -> worker: the tensors of a version, in one flat buffer of `num_bytes`, cut in chunks.

    probe: by which an engine can tell that it serves what was published; None where there is no mismatch gate.
    adapter: how `tensors` make a version with the model's folder; None where they are whole weights.
    hash: `databus.version_hash` of the tensors; 0: not reckoned. whole_version: which version can be had in whole, of
    the same layout; -1: this one. deltas: each with the one before as its base, up to this version; from the whole one,
    or one before it, on.
    """

    version: int
    num_bytes: int
    chunk_bytes: int
    tensors: tuple[TensorSpec, ...]
    probe: Probe | None = None
    adapter: Adapter | None = None
    hash: int = 0
    whole_version: int = -1
    deltas: tuple[Delta, ...] = ()


class ChunkRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Worker -> weight server: one chunk. A worker keeps a few of these outstanding (its credit).

    delta: of the version's delta, not of its whole.
    """

    version: int
    index: int
    delta: bool = False


class Chunk(Struct, frozen=True, kw_only=True, tag=True):
    """Weight server -> worker: bytes `index * chunk_bytes ..` of the version, or chunk `index` of its delta; one raw
    frame follows."""

    version: int
    index: int
    delta: bool = False


class VersionGone(Struct, frozen=True, kw_only=True, tag=True):
    """Weight server -> worker: that version is no longer (or not yet) kept; `newest` is."""

    version: int
    newest: int


PeerHello = Hello | Heartbeat | Goodbye
FromWorker = Credits | Holding | Completed | Failed | Released | VersionApplied | VersionRefused | Leaving
FromLearner = BatchRequest | StepDone | VersionPublished | PositionRequest
ToBroker = PeerHello | FromWorker | FromLearner | StatusRequest

ToAnyPeer = Welcome | Refused | HeartbeatReply | Stop
ToWorker = ToAnyPeer | OneToWorker | Several
ToLearner = ToAnyPeer | BatchFrames | Batch | Position
ToObserver = ToAnyPeer | Status | Rows

ToWeightServer = ManifestRequest | ChunkRequest | TransferRequest
FromWeightServer = Manifest | Chunk | VersionGone | MappedOffer | CollectiveOffer | NoTransfer
