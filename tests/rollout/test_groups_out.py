import numpy as np

from databus.groups import decode_group
from rollout.engine.base import Completion
from rollout.groups_out import completed_message


def completion(tokens: list[int], versions: list[int], truncated: bool = False) -> Completion:
    return Completion(
        token_ids=np.array(tokens, np.int32),
        logprobs=np.linspace(-1.0, 1e-7, len(tokens), dtype=np.float32),
        versions=np.array(versions, np.int32),
        truncated=truncated,
    )


def test_a_group_survives_the_wire() -> None:
    message, frames = completed_message(
        "g",
        (1, 2, 3),
        [completion([5, 6, 2], [0, 0, 1]), completion([7], [1], truncated=True)],
        [{"answer": 1.0, "format": 0.5}, {"length": -0.25}],
        generate_s=1.5,
        score_s=0.5,
    )
    assert message.reward_names == ("answer", "format", "length")
    group = decode_group(message.columns, frames)
    assert group.prompt_ids.tolist() == [1, 2, 3]
    assert group.lengths.tolist() == [3, 1]
    assert group.token_ids.tolist() == [5, 6, 2, 7]
    assert group.token_versions().tolist() == [0, 0, 1, 1]
    assert group.version_values.tolist() == [0, 1]
    assert group.logprobs.max() == 0.0, "what rounding left above 0 is brought to 0"
    assert group.loss_mask.tolist() == [1, 1, 1, 1]
    assert group.rewards.tolist() == [1.5, -0.25]
    assert group.reward_parts.tolist() == [[1.0, 0.5, 0.0], [0.0, 0.0, -0.25]]
    assert group.truncated.tolist() == [0, 1]
