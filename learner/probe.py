"""What the learner says of the fixed texts that every version is published with."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager

import numpy as np

from databus.messages import Probe
from learner.model import PolicyModel
from learner.scoring import score
from learner.sequences import Sequence


def score_probe(policy: PolicyModel, texts: Items[tuple[int, ...]], max_tokens: int) -> Probe:
    """The same on every rank, which all take part. By the forward pass that training uses, in its dtype: what an engine
    is compared with is what its tokens will be trained by.

    Args: texts: token ids, at least two each. max_tokens: as `plan_microbatches`.
    """
    with at_temperature_one(policy):
        logprobs = score(policy, list(_sequences(texts)), max_tokens)
    return Probe(sequences=tuple(texts), logprobs=tuple(tuple(values.tolist()) for values in logprobs))


@contextmanager
def at_temperature_one(policy: PolicyModel) -> Iterator[None]:
    """Engines score prompts by the model's own distribution."""
    temperature, policy.temperature = policy.temperature, 1.0
    try:
        yield
    finally:
        policy.temperature = temperature


def _sequences(texts: Items[tuple[int, ...]]) -> Iterator[Sequence]:
    start = 0
    for text in texts:
        yield Sequence(
            token_ids=np.array(text, np.int64),
            targets=np.arange(1, len(text)),
            logprobs=np.zeros(len(text) - 1, np.float32),
            lag=0,
            start=start,
            advantages=np.ones(len(text) - 1, np.float32),  # so that all are packed together
        )
        start += len(text) - 1
