"""Turns on an NVIDIA GPU: each side leaves the other its memory, and comes back to the bit."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_script import learner_run, make_groups
from transformers import AutoModelForCausalLM

from databus.messages import Sampling
from learner.config import LearnerConfig
from learner.off_turn import HostState, state_of
from learner.run import build_train_step, process_group
from rollout.config import RolloutConfig
from rollout.engine.base import Completion, GenerateRequest
from rollout.engine.vllm_engine import VllmEngine

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

MIB = 1 << 20


def test_the_learner_leaves_its_memory_and_steps_on_the_same(tiny_model: Path, tmp_path: Path) -> None:
    outcomes: list[Any] = []
    for away in (False, True):
        with process_group("cuda", timeout_s=60.0):
            config = LearnerConfig(device="cuda", lr=1e-2)
            policy, train_step = build_train_step(config, learner_run(tiny_model, tmp_path), 0)
            host = HostState(state_of("all", [policy], train_step.optimizer), "cuda")
            metrics = []
            for step in range(3):
                if away:
                    held = torch.cuda.memory_allocated()
                    host.to_host()
                    assert host.num_bytes > 0 and torch.cuda.memory_allocated() <= held - host.num_bytes
                    assert all(buffer.is_pinned() for _, buffer in host._moved)
                    host.to_device()
                metrics.append(train_step(make_groups(step), step))
            outcomes.append([each["loss/policy"] for each in metrics])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5)


@pytest.mark.parametrize("off_turn", ["sleep", "pause"])
def test_vllm_sleeps_with_requests_in_flight(tiny_model: Path, tmp_path: Path, off_turn: Any) -> None:
    config = RolloutConfig(
        device="cuda", context_tokens=400, max_sequences=64, gpu_memory_fraction=0.3, off_turn=off_turn
    )
    sampling = Sampling(max_tokens=380, temperature=1.0)
    request = GenerateRequest(group_id="a", prompt_ids=(6, 13, 8, 14), group_size=32, sampling=sampling)

    async def scenario() -> list[Completion]:
        engine = VllmEngine(config, str(tiny_model), seed=0, version=3, turns=tmp_path)
        await engine.start()
        try:
            group = asyncio.ensure_future(engine.generate(request))
            await asyncio.sleep(0.3)
            free, total = torch.cuda.mem_get_info()
            await engine.sleep()
            freed = torch.cuda.mem_get_info()[0] - free
            assert freed > 0.2 * total if off_turn == "sleep" else abs(freed) < 64 * MIB
            await engine.wake()
            return await group
        finally:
            await engine.close()

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for completion in asyncio.run(asyncio.wait_for(scenario(), 400)):
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids.tolist()]])
        with torch.no_grad():
            every = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
        expected = every[len(request.prompt_ids) - 1 :].numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)
        assert (completion.versions == 3).all()
