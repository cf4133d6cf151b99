"""Twenty steps of chain-sum, sampled by the small engine's decoder and trained by the learner: the losses of old.

The curve lies in golden_curve.json. What is meant to change it says so in docs/decisions, and writes it anew:
`PYTHONPATH=. python tests/learner/test_golden_curve.py tests/conftest.py`. Tolerance: relative 1e-3, absolute 1e-5;
float32 sums in another order stay far below that, as long as no sampled token flips.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from databus.groups import Group
from databus.messages import Sampling
from learner.config import LearnerConfig, LossConfig
from learner.model import ModelOptions, PolicyModel, build_model, load_causal_lm
from learner.optimizer import build_optimizer
from learner.run import process_group
from learner.train_step import TrainStep
from rollout.engine.base import GenerateRequest
from rollout.engine.small_group import RunningGroup
from rollout.groups_out import make_group

CURVE = Path(__file__).parent / "golden_curve.json"
STEPS, GROUP_SIZE, MAX_TOKENS, SERVED_STEPS = 20, 4, 12, 2
KEYS = ("loss/policy", "loss/entropy", "learner/grad_norm", "mismatch/kl", "mismatch/ess")
PROBLEMS = ("3+5=", "1+2+3=", "7+8=", "4+4+1=")
CHARACTERS, FIRST_CHARACTER, EOS = "0123456789+=;#", 3, 2


def reward(token_ids: list[int]) -> float:
    """Share of the completion's characters that only answers have: a model that knows nothing yet can learn that."""
    return sum(CHARACTERS[token - FIRST_CHARACTER] in "=;#" for token in token_ids if is_character(token)) / MAX_TOKENS


def is_character(token: int) -> bool:
    return 0 <= token - FIRST_CHARACTER < len(CHARACTERS)


def golden_run(model: Path) -> list[dict[str, float]]:
    """The metrics of each step. New weights are served every second step, so that lags are 0 and 1."""
    config = LearnerConfig(
        steps=STEPS, lr=2e-3, warmup_steps=2, microbatch_tokens=128, loss=LossConfig(aggregation="sequence")
    )
    policy = build_model(model, ModelOptions())
    train_step = TrainStep(policy, *build_optimizer(policy.parameters(), config), config)
    served = load_causal_lm(model).eval()
    rows: list[dict[str, float]] = []
    for step in range(STEPS):
        if step % SERVED_STEPS == 0:
            serve(policy, served)
        version = step - step % SERVED_STEPS
        problems = enumerate(PROBLEMS, start=step * len(PROBLEMS))
        groups = [sample(served, problem, cursor, version) for cursor, problem in problems]
        metrics = train_step(groups, step)
        rows.append({key: metrics[key] for key in KEYS})
    return rows


def serve(policy: PolicyModel, served: torch.nn.Module) -> None:
    state = {name: tensor.full_tensor() for name, tensor in policy.causal_lm.state_dict().items()}
    served.load_state_dict(state)


def sample(served: torch.nn.Module, problem: str, cursor: int, version: int) -> Group:
    prompt = tuple(FIRST_CHARACTER + CHARACTERS.index(character) for character in problem)
    request = GenerateRequest(
        group_id=f"g{cursor}",
        prompt_ids=prompt,
        group_size=GROUP_SIZE,
        sampling=Sampling(max_tokens=MAX_TOKENS),
        cursor=cursor,
    )
    running = RunningGroup(request, served, [EOS], 0, 64)
    while not running.finished:
        running.step(version)
    completions = running.completions()
    parts = [{"reward": reward(completion.token_ids.tolist())} for completion in completions]
    return make_group(prompt, completions, parts, ("reward",))


def test_losses_are_those_on_record(single_rank: None, tiny_model: Path) -> None:
    expected = json.loads(CURVE.read_text())
    rows = golden_run(tiny_model)
    assert len(rows) == len(expected) == STEPS
    for step, (row, recorded) in enumerate(zip(rows, expected, strict=True)):
        assert row == pytest.approx(recorded, rel=1e-3, abs=1e-5), f"step {step}"


def test_the_curve_is_of_a_policy_that_learns() -> None:
    """A record of a run in which nothing happens would show nothing."""
    expected = json.loads(CURVE.read_text())
    assert all(row["learner/grad_norm"] > 0 for row in expected)
    assert max(row["mismatch/kl"] for row in expected) > 1e-4
    entropies = [row["loss/entropy"] for row in expected]
    assert abs(np.mean(entropies[-3:]) - np.mean(entropies[:3])) > 0.05


def main(conftest: str) -> None:
    spec = importlib.util.spec_from_file_location("tiny_model", conftest)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, process_group("cpu", timeout_s=30.0):
        module.write_tiny_model(Path(folder))
        rows = golden_run(Path(folder))
    CURVE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
