"""What a rollout worker asks of an inference engine.

EngineError            one request failed; the engine goes on
├── UpdateFailed       new weights were refused; the old version serves on
│   └── GateRefused    they were loaded whole, and do not say what the learner says
└── EngineDead         the engine can serve nothing any more
"""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from databus.codec import Array
from databus.messages import Manifest, Mismatch, Sampling
from rollout.config import GateConfig
from rollout.fetches import DeviceCopy


class EngineError(Exception):
    """One line for a person."""


class UpdateFailed(EngineError):
    """The new weights could not be loaded; the version served before is served still, unmixed."""


class GateRefused(UpdateFailed):
    """Trying again would give the same; the next version may pass."""

    def __init__(self, version: int, mismatch: Mismatch, allowed: GateConfig) -> None:
        self.mismatch = mismatch
        self.reason = (
            "mismatch gate: engine and learner differ on the probe by "
            f"KL {mismatch.kl:.2g} nats a token (rollout.gate.max_kl={allowed.max_kl:g}), at most "
            f"{mismatch.difference:.2g} (rollout.gate.max_difference={allowed.max_difference:g})"
        )
        super().__init__(f"version {version} refused: {self.reason}")


class EngineDead(EngineError):
    """The engine's process is gone, or holds weights of which nobody knows the version."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt to complete `group_size` times.

    cursor: the prompt's place in the run, by which an engine samples the same again if it can. The rest changes nothing
    of what is sampled. problem: key of the prompt (`databus.history.problem_key`; 0: not known). history: earlier
    completions of the problem, to draft from, as (oldest policy version in it, int32 [t] token ids), newest last.
    Completions that this engine generated itself may be among them; history_ids has an identity for each
    (`databus.history.completion_id`), by which it can tell. predicted_tokens: expected length of a completion, by which
    an engine may choose what to begin first (0: unknown).
    first_sample: place in the group of the first completion asked for, where a group is asked for in parts. prefix:
    tokens that the completions begin with already; they are not part of what is returned, nor of `max_tokens`.
    """

    group_id: str
    prompt_ids: tuple[int, ...]
    group_size: int
    sampling: Sampling
    cursor: int = 0
    problem: int = 0
    history: tuple[tuple[int, Array], ...] = ()
    history_ids: tuple[int, ...] = ()
    predicted_tokens: int = 0
    first_sample: int = 0
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion of t tokens, its end token included.

    token_ids: int32 [t]. logprobs: float32 [t], of the distribution sampled from, after the temperature (greedy: of
    the model's own). versions: int32 [t], the policy version that sampled each token. truncated: it ended for want
    of room, not with an end token. loss_mask: uint8 [t], 0 for tokens that were forced, not sampled: their logprob is
    0 and their version the one served then; None: all were sampled.
    """

    token_ids: Array
    logprobs: Array
    versions: Array
    truncated: bool
    loss_mask: Array | None = None

    def sampled(self) -> Array:
        """uint8 [t]: 1 where a token was sampled, 0 where it was forced."""
        return np.ones(len(self.token_ids), np.uint8) if self.loss_mask is None else self.loss_mask


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Checked weights of one version: the manifest, and its flat buffer in anonymous shared memory (`fd`).

    Whoever pulled it closes it, once the engine has taken it over. changed: names of the tensors whose bits differ from
    those of `base_version`; None, as `base_version` is then: not known, any may. received_bytes: what had to be fetched
    for it; None: all of it. device_copy: the same buffer in the memory of the worker's GPU, until the next pull; None:
    there is none.
    """

    version: int
    manifest: Manifest
    fd: int
    base_version: int | None = None
    changed: frozenset[str] | None = None
    received_bytes: int | None = None
    device_copy: DeviceCopy | None = None

    def map(self) -> mmap.mmap:
        """The buffer, read-only."""
        return mmap.mmap(self.fd, self.manifest.num_bytes, prot=mmap.PROT_READ)

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """pause_s: how long no token was generated, from the engine's word that it stands still. mismatch: None where the
    version came without a probe.

    load_s: of the pause, checking, loading and reading back. loaded_bytes, loaded_tensors: of the snapshot.
    """

    pause_s: float
    mismatch: Mismatch | None = None
    load_s: float = 0.0
    loaded_bytes: int = 0
    loaded_tensors: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """running_sequences is of this moment; the others count since the start.

    drafting: `rollout.drafting.counters.FIELDS`, empty where nothing is drafted.
    """

    running_sequences: int = 0
    generated_tokens: int = 0
    drafting: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Cancelling the task that awaits `generate` aborts its requests."""

    @property
    def version(self) -> int:
        """The policy version that new tokens are sampled with."""
        ...

    async def start(self) -> None:
        """Load the model. Raises: ValueError for a setting that cannot work; EngineDead where it does not come up."""
        ...

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        """All completions of the group. Raises: EngineError; EngineDead."""
        ...

    async def drain(self) -> None:
        """Let no request begin from here on, and wait until none is in flight, or for `rollout.update.drain_s`; the
        `update` that must follow lets them begin again. Raises: EngineDead."""
        ...

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        """Serve `snapshot` from the next token on; requests in flight go on, as `rollout.update.kv` says.

        Raises: UpdateFailed; GateRefused; EngineDead. After the first two the old weights serve on, bit for bit.
        """
        ...

    async def sleep(self) -> None:
        """Compute nothing from here on, and let go of what device memory can be had, until `wake`.

        Requests are taken still, and go on when it wakes. No `update` may be under way. Raises: EngineDead.
        """
        ...

    async def wake(self) -> None:
        """Raises: EngineDead."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """End every process and thread of the engine, whatever its state."""
        ...
