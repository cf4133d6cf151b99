"""A generated and scored group as the columns of a `Completed` message."""

from collections.abc import Sequence

import numpy as np

from databus.codec import Frame
from databus.groups import Group, encode_group, run_lengths
from databus.messages import Completed
from rollout.engine.base import Completion


def completed_message(
    group_id: str,
    prompt_ids: Sequence[int],
    completions: Sequence[Completion],
    parts: Sequence[dict[str, float]],
    *,
    generate_s: float,
    score_s: float,
) -> tuple[Completed, list[Frame]]:
    """The message and its frames. `parts`: of each completion's reward, in order; a part that one lacks is 0."""
    names = tuple(dict.fromkeys(name for each in parts for name in each))
    group = make_group(prompt_ids, completions, parts, names)
    columns, frames = encode_group(group)
    message = Completed(group_id=group_id, columns=columns, reward_names=names, generate_s=generate_s, score_s=score_s)
    return message, frames


def make_group(
    prompt_ids: Sequence[int],
    completions: Sequence[Completion],
    parts: Sequence[dict[str, float]],
    names: Sequence[str],
) -> Group:
    """Columns as `databus.groups.GROUP_COLUMNS`; tokens bear loss unless they were forced."""
    lengths = np.array([len(completion.token_ids) for completion in completions], np.int32)
    versions = np.concatenate([completion.versions for completion in completions])
    logprobs = np.concatenate([completion.logprobs for completion in completions])
    version_values, version_lengths = run_lengths(versions)
    reward_parts = np.array([[each.get(name, 0.0) for name in names] for each in parts], np.float32)
    return Group(
        prompt_ids=np.array(prompt_ids, np.int32),
        lengths=lengths,
        token_ids=np.concatenate([completion.token_ids for completion in completions]),
        logprobs=np.minimum(logprobs, np.float32(0.0)),  # rounding may leave a certain token a hair above 0
        loss_mask=np.concatenate([completion.sampled() for completion in completions]),
        version_values=version_values,
        version_lengths=version_lengths,
        rewards=np.array([sum(each.values()) for each in parts], np.float32),
        reward_parts=reward_parts.reshape(len(completions), len(names)),
        truncated=np.array([completion.truncated for completion in completions], np.uint8),
    )
