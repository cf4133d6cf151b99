"""The fixed texts that learner and engines compare themselves by: the ends of the run's own first prompts."""

from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import msgspec

from echelon.prompt_files import StoredPrompt
from rollout.config import PROBE_SEQUENCES, PROBE_TOKENS, RolloutConfig

Text = tuple[int, ...]


def probe_texts(train_prompts: Path, config: RolloutConfig) -> tuple[Text, ...]:
    """Token ids; none where there is no mismatch gate. Prompts may begin alike, with a chat template's words, but end
    differently; short ones are joined."""
    tokens = min(PROBE_TOKENS, config.context_tokens - 1)
    if not config.gate.is_on or tokens < 2:
        return ()
    with train_prompts.open("rb") as lines:
        prompts = (msgspec.json.decode(line, type=StoredPrompt).prompt_ids for line in cycle(lines))
        return tuple(islice(_texts(prompts, tokens), PROBE_SEQUENCES))


def _texts(prompts: Iterable[Text], tokens: int) -> Iterator[Text]:
    """Texts of so many tokens, from prompts end to end."""
    text: Text = ()
    for prompt in prompts:
        text += prompt[-tokens:]
        if len(text) >= tokens:
            yield text[:tokens]
            text = ()
