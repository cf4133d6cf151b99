"""An engine whose weights are broken, through the real path of a lease."""

import asyncio
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from databus.messages import Lease, Sampling
from rewards.sample import Sample
from rollout.config import RolloutConfig
from rollout.engine.base import EngineDead
from rollout.engine.small_engine import SmallEngine
from rollout.lease_work import LeaseWork

LEASE = Lease(
    group_id="g",
    cursor=0,
    attempt=0,
    purpose="train",
    prompt="1+2=",
    prompt_ids=(4, 13, 5, 14),
    problem=b"{}",
    group_size=4,
    sampling=Sampling(max_tokens=4),
    lease_s=30.0,
)


class NeverAsked:
    async def score(self, samples: list[Sample]) -> list[dict[str, float]]:
        raise AssertionError("what was not sampled from the policy is not scored")


def test_log_probabilities_that_are_no_numbers_end_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, model / "model.safetensors", {"format": "pt"})

    async def scenario() -> None:
        engine = SmallEngine(RolloutConfig(engine="small", context_tokens=32), str(model), seed=0, version=0)
        await engine.start()
        try:
            await LeaseWork(engine, NeverAsked(), str).run(LEASE, generated=lambda: None)
        finally:
            await engine.close()

    with pytest.raises(
        EngineDead, match=r"the engine gave the log-probability nan \(token 0 of a completion of group g"
    ):
        asyncio.run(asyncio.wait_for(scenario(), 60))
