"""Settings of rollout workers."""

import re
from typing import Annotated, Literal

from msgspec import Meta, Struct

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]


BIASED_SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
"""Sampling settings that there are not: what is recorded is the log-probability under the temperature alone."""


def why_not_sampling(text: str) -> str:
    """Why there is no such setting, to go on with after an error, where `text` names one of `BIASED_SAMPLING`."""
    named = next((name for name in BIASED_SAMPLING if re.search(rf"\b{name}\b", text)), None)
    if named is None:
        return ""
    return (
        f"; there is no {named}: tokens would be sampled from another distribution than the one that is trained, and "
        "every importance ratio would be wrong (rollout.temperature is taken into account)"
    )


class ReasoningConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Separate budgets for thinking and for the solution (Elastic Reasoning, arXiv:2505.05315).

    thinking_tokens: where thinking has not ended by then, `end` is forced; 0: no budgets, only `max_tokens`.
    solution_tokens: what the solution may take after `end`, however long the thinking was.
    end: text that ends the thinking.
    """

    thinking_tokens: Annotated[int, Meta(ge=0)] = 0
    solution_tokens: PositiveInt = 512
    end: Annotated[str, Meta(min_length=1)] = "</think>"


PROBE_SEQUENCES = 4
PROBE_TOKENS = 64
"""Size of the fixed texts that learner and engine compare themselves by: at most so many, so long."""


class GateConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The mismatch gate: before a version is served, the engine scores the fixed texts that came with it, and compares
    with what the learner says of them. Beyond either bound the version is refused, and the old one serves on.

    max_kl: mean k3 estimate of KL(engine ‖ learner), nats a token; 0: no gate. The default leaves room for bfloat16
        (about 1e-3); in float32, where 1e-11 is usual, 1e-6 tells stale weights from new ones, too.
    max_difference: of any one log-probability, nats.
    """

    max_kl: Annotated[float, Meta(ge=0)] = 0.02
    max_difference: PositiveFloat = 4.0

    @property
    def is_on(self) -> bool:
        return self.max_kl > 0


class UpdateConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What becomes of requests in flight when a new version is served, and when it is.

    kv: `keep`: they go on with the KV cache that the old version computed (fastest; their later tokens are of the new
        version on the old one's context). `recompute`: their cache is dropped, and computed again by the new version:
        every token is of its version's weights alone. `drain`: they end under the old version, others wait meanwhile.
    drain_s: how long `drain` waits; what runs still is then recomputed.
    delay: `none`: a version is served as soon as it is there. `longest`: not before the groups have ended that were
        under way when it came, as far as `max_staleness` allows and while the engine is full.
    delay_s: longest delay.
    """

    kv: Literal["keep", "recompute", "drain"] = "keep"
    drain_s: PositiveFloat = 120.0
    delay: Literal["none", "longest"] = "none"
    delay_s: PositiveFloat = 30.0


class EnvironmentConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Episodes of several turns: after each turn of the model an environment answers, until it is done.

    name: `calculator`, `python` (in the sandbox), or `PATH.py:CLASS`; "": completions are of one turn.
    max_turns: of the model. turn_tokens: that it may sample in one; 0: as many as `max_tokens` leaves.
    output_tokens: of an answer; the rest is cut off, and the model told so.
    episode_s: after so long no new turn is begun. step_s: time for one answer; a tool that takes longer is killed, and
        the model told so. Whatever ends an episode before its environment does, it is truncated.
    processes: that answer, in each worker.
    role: under which an answer stands in the tokenizer's chat template. before, after: text around an answer instead of
        what the chat template has there; special tokens in it are taken as such.
    """

    name: str = ""
    max_turns: PositiveInt = 8
    turn_tokens: Annotated[int, Meta(ge=0)] = 0
    output_tokens: PositiveInt = 512
    episode_s: PositiveFloat = 600.0
    step_s: PositiveFloat = 10.0
    processes: PositiveInt = 2
    role: Literal["tool", "user"] = "tool"
    before: str = ""
    after: str = ""


class RolloutConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rollout workers and their engines.

    workers: how many the supervisor starts; more may join later (`echelon worker --join`).
    spares: started beside them, and given nothing to do until one of the workers is lost or sent away.
    drain_s: how long a worker that is told to leave (SIGTERM) goes on with groups that are nearly done.
    engine: `vllm`, or `small`, a slow deterministic engine on a transformers model for tests.
    device, dtype: where the engine runs and its serving dtype, the one that weights are published in.
    max_sequences: sequences that one engine runs at once; with `group_size` it gives the worker's credit.
    ahead: groups that a worker holds beyond its engine's room, as a share of that room. They wait in the engine, so
        that a sequence which ends makes room at once, not only when the last of its group has; 0 holds none.
    context_tokens: prompt and completion together; a longer prompt is refused before the run starts.
    max_tokens, temperature: sampling of training completions; of an episode of several turns, all tokens together.
        There is no top-p or top-k: they would bias the importance ratio between the sampled and the trained
        distribution.
    gpu_memory_fraction: share of a GPU that vLLM may take. kv_cache_gib: KV cache of a CPU engine.
    off_turn: what an engine does in the learner's turns, with `placement=colocated` on `cuda`: `sleep`, with weights in
        host memory and without a KV cache, which is computed anew for requests in flight; or only `pause`, where device
        memory has room for both sides. On a CPU it pauses.
    enforce_eager: skip vLLM's graph capture and compilation (faster start, slower steps).
    reasoning: budgets within `max_tokens`, which must have room for thinking, its end and the solution.
    gate: how far engine and learner may differ about a version that is to be served.
    update: when a new version is served, and what requests in flight keep of the old one.
    environment: what answers the model between its turns; budgets of reasoning are then those of each turn.
    """

    workers: PositiveInt = 1
    spares: Annotated[int, Meta(ge=0)] = 0
    drain_s: Annotated[float, Meta(ge=0)] = 20.0
    engine: Literal["vllm", "small"] = "vllm"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_sequences: PositiveInt = 256
    ahead: Annotated[float, Meta(ge=0, le=4)] = 1.0
    context_tokens: PositiveInt = 2048
    max_tokens: PositiveInt = 1024
    temperature: PositiveFloat = 1.0
    off_turn: Literal["sleep", "pause"] = "sleep"
    gpu_memory_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.5
    kv_cache_gib: PositiveInt = 1
    enforce_eager: bool = True
    start_timeout_s: PositiveFloat = 600.0
    reasoning: ReasoningConfig = ReasoningConfig()
    gate: GateConfig = GateConfig()
    update: UpdateConfig = UpdateConfig()
    environment: EnvironmentConfig = EnvironmentConfig()


class DraftConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speculative drafting from suffix trees of earlier completions; see `rollout.drafting`.

    policy: how many tokens are drafted for whom. `marginal`: where the expected gain in tokens a second is
        largest, by a latency model fitted online; `logarithmic`: by the logarithm of a request's predicted length
        (arXiv 2511.13841); `off`: no drafting.
    max_tokens: most tokens drafted for one request at a time.
    window_versions: completions sampled more than so many policy versions ago are forgotten.
    history_tokens: newest completions of a problem that travel with its lease, at most so many tokens.
    index_tokens: tokens that an engine's trees hold, all problems together; beyond, the least recently used go.
    record: keep every completed group in RUN_DIR/rollouts.bin, for `echelon bench-draft`; whatever the policy is.
    """

    policy: Literal["off", "marginal", "logarithmic"] = "off"
    max_tokens: Annotated[int, Meta(ge=1, le=64)] = 16
    window_versions: PositiveInt = 16
    history_tokens: Annotated[int, Meta(ge=0)] = 8192
    index_tokens: Annotated[int, Meta(ge=1024)] = 4_000_000
    record: bool = False


class NoCurriculum(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="none"):
    """All problems in every epoch."""


class DropSolved(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="drop_solved"):
    """Skip problems whose pass rate is above `threshold`, as far as `min_completions` tell; each is tried again once
    `retry_epochs` have gone by without it."""

    threshold: Annotated[float, Meta(gt=0, lt=1)] = 0.95
    min_completions: PositiveInt = 8
    retry_epochs: PositiveInt = 4


class PassRateBand(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="pass_rate_band"):
    """Only problems whose pass rate is from `low` to `high`, and those of which less than `min_completions` are known;
    others are tried again once `retry_epochs` have gone by without them."""

    low: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    high: Annotated[float, Meta(gt=0, le=1)] = 0.9
    min_completions: PositiveInt = 8
    retry_epochs: PositiveInt = 4


class LearningProgress(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="learning_progress"):
    """Problems like those whose pass rate changes most, in either direction: ALP-GMM (arXiv 1910.07224).

    exploration: share of problems drawn uniformly. round_problems: problems drawn between two fits.
    window: newest groups that a fit sees. max_components: most Gaussians in the mixture.
    """

    exploration: Annotated[float, Meta(gt=0, le=1)] = 0.2
    round_problems: PositiveInt = 256
    window: Annotated[int, Meta(ge=8)] = 512
    max_components: Annotated[int, Meta(ge=1, le=16)] = 6


CurriculumConfig = NoCurriculum | DropSolved | PassRateBand | LearningProgress


class SchedulingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which problem comes next, and where it goes; see `rollout.scheduling`.

    mixing: each batch a fixed share of problems that are predicted short, medium and long; False: the order of
        `data.shuffle` alone. Needs `data.shuffle`.
    shares: of short, medium and long, thirds of what remains of the epoch; they add up to 1.
    curriculum: which problems an epoch has. All but `none` need `mixing`.
    pass_threshold: a completion counts as passed when its reward is at least this.
    forgetting: what each new group of a problem leaves of the weight of earlier ones; 1 forgets nothing.
    drop_zero_variance: filter out groups whose rewards are all equal (DAPO's dynamic sampling, arXiv 2503.14476).
    max_filtered: groups in a row that are filtered out or have no token to train on, with none kept, that end the run.
    """

    mixing: bool = True
    shares: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    curriculum: CurriculumConfig = NoCurriculum()
    pass_threshold: float = 1.0
    forgetting: Annotated[float, Meta(gt=0, le=1)] = 0.5
    drop_zero_variance: bool = False
    max_filtered: PositiveInt = 1000
