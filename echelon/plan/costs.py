"""What a plan takes for granted: how long everything takes, by fit to a run or by statement."""

from typing import Annotated

from msgspec import Meta, Struct

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Amount = Annotated[float, Meta(ge=0)]


class Costs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds are those of a role that has its cores to itself.

    step_s, sequence_s: of an engine's step, in itself and for each sequence that runs. tokens_per_step: that it gives a
        sequence; above 1 where drafts are accepted.
    score_s: from a group's last token until its result is on its way.
    train_s, train_token_s: of a learner's step, in itself and for each trained token.
    publish_s: from the end of a step until its version can be pulled.
    sync_s, pause_s: from then until an engine serves the version, and how long of that it stands still.
    bus_s: a message's way to the broker, and its answer's way back.
    cores: that all roles share; 0: nobody shares any. worker_cores, learner_cores: that each takes while it is at work.
    length_mean, length_spread: tokens of a completion, and the deviation of their logarithm; half of its square lies
        between problems. problems, prompt_tokens: of the data set. pass_rate: of completions. eval_problems: held out.
        All of this only where no run says more.
    """

    step_s: PositiveFloat = 0.02
    sequence_s: Amount = 0.0001
    tokens_per_step: PositiveFloat = 1.0
    score_s: Amount = 0.05
    train_s: Amount = 0.5
    train_token_s: Amount = 0.0001
    publish_s: Amount = 0.1
    sync_s: Amount = 0.5
    pause_s: Amount = 0.1
    bus_s: Amount = 0.005
    cores: Amount = 0.0
    worker_cores: PositiveFloat = 1.0
    learner_cores: PositiveFloat = 1.0
    length_mean: PositiveFloat = 512.0
    length_spread: Amount = 0.8
    problems: PositiveInt = 1000
    prompt_tokens: PositiveInt = 128
    pass_rate: Annotated[float, Meta(ge=0, le=1)] = 0.5
    eval_problems: Annotated[int, Meta(ge=0)] = 0
