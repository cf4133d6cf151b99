"""Which GPUs each role is given."""

import pytest
from msgspec.structs import replace

from echelon.config import DataConfig, RunConfig
from echelon.devices import VISIBLE, learner_gpus, worker_gpus
from learner.config import LearnerConfig
from rollout.config import RolloutConfig

CONFIG = RunConfig(
    model="org/name",
    data=DataConfig(train="org/data"),
    learner=LearnerConfig(device="cuda", ranks=2),
    rollout=RolloutConfig(device="cuda"),
)


@pytest.mark.parametrize(
    ("placement", "gpus", "workers"),
    [("separate", "0123", "232"), ("colocated", "0123", "010"), ("separate", "0", "000"), ("colocated", "0", "000")],
)
def test_workers_have_the_other_gpus_or_take_turns_on_the_learners(placement, gpus: str, workers: str) -> None:
    config = replace(CONFIG, placement=placement)
    assert learner_gpus(config, list(gpus)) == {VISIBLE: ",".join(gpus[:2])}
    assert [worker_gpus(config, list(gpus), index)[VISIBLE] for index in range(3)] == list(workers)
