"""Settings of scoring."""

from typing import Annotated

from msgspec import Meta, Struct


class RewardConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How completions are scored.

    function: `math`, or `PATH.py:FUNCTION`: a function of one `rewards.Sample` that returns a number, or
        a dict of parts whose sum is the reward.
    processes: size of a worker's scoring pool.
    timeout_s: time for one completion; a function that takes longer is killed and its group fails.
    max_failures: failed groups in a row, because of the reward, that stop the run.
    """

    function: str = "math"
    processes: Annotated[int, Meta(ge=1)] = 1
    timeout_s: Annotated[float, Meta(gt=0)] = 10.0
    max_failures: Annotated[int, Meta(ge=1)] = 5
