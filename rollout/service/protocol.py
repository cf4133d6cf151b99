"""What service and client say to each other, as JSON."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from rollout.service.errors import ErrorFields

PositiveInt = Annotated[int, Meta(ge=1)]

# ---------------------------------------------------------------- POST /v1/rollouts


class Prompt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of three: text, a chat's messages, for which the model needs a chat template, or token ids.

    problem: what the reward function sees as `Sample.problem`, such as {"answer": "8"}.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    problem: dict[str, Any] = {}


class SamplingFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As `databus.messages.Sampling`: what is recorded is the log-probability under the temperature alone."""

    max_tokens: PositiveInt
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0


class RolloutRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Each prompt is completed `group_size` times.

    reward: name of what scores the completions; None: nothing does. timeout_s: for one group, from when it is begun.
    """

    prompts: Annotated[list[Prompt], Meta(min_length=1, max_length=65536)]
    sampling: SamplingFields
    group_size: Annotated[int, Meta(ge=1, le=4096)] = 1
    reward: str | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=86400)] = 600.0


class VersionSpan(Struct, frozen=True, kw_only=True):
    """Tokens from `start` to before `stop` were sampled with weights of `version`."""

    version: int
    start: int
    stop: int


class ScoredCompletion(Struct, frozen=True, kw_only=True):
    """token_ids, logprobs: of t tokens, the end token included; as `rollout.engine.base.Completion`.

    text: without special tokens. reward: the sum of its parts; None, and no parts, where nothing scores.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    versions: list[VersionSpan]
    truncated: bool
    reward: float | None = None
    parts: dict[str, float] = {}


class ScoredGroup(Struct, frozen=True, kw_only=True, tag="group"):
    """Service -> client: prompt `index` of the request is done. Seconds: to generate and to score."""

    index: int
    prompt_ids: list[int]
    completions: list[ScoredCompletion]
    generate_s: float
    score_s: float


class FailedGroup(Struct, frozen=True, kw_only=True, tag="failed"):
    """Service -> client: prompt `index` came to nothing; the others go on."""

    index: int
    error: ErrorFields


class Finished(Struct, frozen=True, kw_only=True, tag="finished"):
    """Service -> client: the last line. An answer that ends without it was cut off."""

    groups: int
    failed: int


RolloutLine = ScoredGroup | FailedGroup | Finished

# ---------------------------------------------------------------- /v1/weights


class LoadRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """path: of an exported folder, a run's folder (its newest checkpoint) or one of its checkpoints, where the service
    is. version: what it is to be called; None: the checkpoint's step, or else one more than what is served."""

    path: str
    version: Annotated[int, Meta(ge=0)] | None = None


class FollowRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """run: its folder, or its bus address. keys: folder of the run's keys, for an address on tcp."""

    run: str
    keys: str | None = None


class Weights(Struct, frozen=True, kw_only=True):
    """What is served, and where it came from. following: the run whose versions are taken up as they come; None: none.

    newest: version that this run has published last. updates: applied since the start. refused: versions that were
    not, with `problem` the newest reason, or why a run is followed no longer. pause_s: all updates together.
    """

    version: int
    source: str
    following: str | None = None
    newest: int | None = None
    updates: int = 0
    refused: int = 0
    pause_s: float = 0.0
    problem: str = ""
