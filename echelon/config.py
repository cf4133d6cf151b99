"""The configuration of a run: what a recipe builds, what overrides change, what child processes read."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from databus.config import BusConfig, JournalConfig, StalePolicy, WeightsConfig
from echelon.launch.config import RayConfig, SlurmConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rollout.config import DraftConfig, RolloutConfig, SchedulingConfig

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]


class DataConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Problems to train on and to evaluate on.

    train, eval: a JSONL or Parquet file, a data set's id on the hub, or `reasoning_gym:TASK,TASK`, rows of which are
        generated. eval "" : no evaluation.
    subset, train_split, eval_split: configuration name and splits of a hub data set.
    prompt: template of the prompt, filled with a row's fields: "{question}".
    chat: wrap the prompt as a user's message in the tokenizer's chat template; `system` goes before it.
    max_train, max_eval: use only the first so many rows; 0: all.
    shuffle: order of an epoch drawn anew from (seed, epoch).
    """

    train: str
    eval: str = ""
    subset: str = ""
    train_split: str = "train"
    eval_split: str = "test"
    prompt: str = "{prompt}"
    chat: bool = False
    system: str = ""
    max_train: NonNegativeInt = 0
    max_eval: NonNegativeInt = 0
    shuffle: bool = True


class EvalConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Greedy accuracy on held-out problems, through the workers, at version 0, every `every` versions and
    the last one. A problem counts as solved when its reward is at least `threshold`. every 0: never."""

    every: NonNegativeInt = 0
    max_tokens: NonNegativeInt = 0  # 0: as in training
    threshold: float = 1.0
    timeout_s: Annotated[float, Meta(gt=0)] = 600.0


class WandbConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights & Biases. `online` falls back to `offline` where no API key is found."""

    mode: Literal["disabled", "offline", "online"] = "online"
    project: str = "echelon"
    name: str = ""
    samples_every: NonNegativeInt = 10


class TracesConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """OpenTelemetry spans of groups, from lease to loss.

    endpoint: of a collector that takes OTLP over HTTP, as "http://localhost:4318/v1/traces"; "": no traces. Headers and
        certificates are OpenTelemetry's own variables, as OTEL_EXPORTER_OTLP_HEADERS.
    share: of the groups that are traced.
    """

    endpoint: Annotated[str, Meta(pattern=r"^(https?://\S+)?$")] = ""
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0


class RunConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run.

    model: a folder or hub id that transformers can load as a causal language model.
    max_staleness: no loss-bearing token is older than this many versions when it is trained; 0 is on-policy.
    stale_policy: what a batch cut does with a group that has older tokens: `drop` it, `mask` those
        tokens, or `requeue` its prompt.
    group_size, batch_groups: completions a prompt, prompts a batch.
    placement: `separate`: learner and engines have devices of their own. `colocated`: they take turns on one device, or
        on one machine's CPU; see `learner.off_turn`, `rollout.off_turn`.
    journal.keep: the broker's journal keeps all batches of the run, not only those since the oldest kept checkpoint.
    watchdog_s: a run without progress for so long is ended, with the first cause and every role's stack.
    """

    model: str
    data: DataConfig
    seed: NonNegativeInt = 0
    max_staleness: NonNegativeInt = 2
    stale_policy: StalePolicy = "drop"
    group_size: Annotated[int, Meta(ge=2)] = 8
    batch_groups: PositiveInt = 16
    placement: Literal["separate", "colocated"] = "separate"
    watchdog_s: Annotated[float, Meta(gt=0)] = 900.0
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    draft: DraftConfig = DraftConfig()
    scheduling: SchedulingConfig = SchedulingConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    bus: BusConfig = BusConfig()
    journal: JournalConfig = JournalConfig()
    weights: WeightsConfig = WeightsConfig()
    wandb: WandbConfig = WandbConfig()
    traces: TracesConfig = TracesConfig()
    ray: RayConfig = RayConfig()
    slurm: SlurmConfig = SlurmConfig()
