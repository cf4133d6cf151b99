"""`grpo_tools`: its data, its reward, and two steps with a tiny model that calls the calculator."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from echelon.rollout_record import read_rollouts
from rewards.python_file import import_file
from rewards.sample import Sample
from rollout.environments.calculator import calculate

ROOT = Path(__file__).resolve().parents[2]
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "3+4"}}</tool_call>'
BAD_CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "3+"}}</tool_call>'
TEMPLATE = (
    "{% for tool in tools or [] %}{{ '1' if tool.function.name == 'calculator' else '0' }}{% endfor %}"
    "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>={% endif %}"
)


def test_problems_have_the_answers_that_the_calculator_gives() -> None:
    script = import_file(ROOT / "recipes" / "prepare_tools.py")
    problems = script.draw_problems(random.Random(0), 300, set())
    assert problems == script.draw_problems(random.Random(0), 300, set())
    assert len({problem["question"] for problem in problems}) == 300
    assert len(Counter(problem["expression"].count("/") for problem in problems)) > 1
    for problem in problems:
        assert calculate(problem["expression"]) == problem["answer"]
        assert int(problem["answer"]) >= 0


@pytest.mark.parametrize(
    ("completion", "truncated", "reward"),
    [
        ("so \\boxed{1} no, \\boxed{1,234}", False, 1.0),
        ("\\boxed{1234} or \\boxed{5}", False, 0.0),
        ("1234", False, 0.0),
        ("\\boxed{1234}", True, 0.0),
    ],
)
def test_the_reward(completion: str, truncated: bool, reward: float) -> None:
    recipe = import_file(ROOT / "recipes" / "grpo_tools.py")
    sample = Sample(prompt="", completion=completion, problem={"answer": "1234"}, num_tokens=3, truncated=truncated)
    assert recipe.answer_reward(sample) == {"answer": reward}


def with_calls(tiny_model: Path, folder: Path) -> Path:
    """The tiny model, whose spare tokens say whole calls: a random model makes many."""
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([CALL, BAD_CALL])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    return model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_two_steps_in_which_tools_are_called(tiny_model: Path, tmp_path: Path) -> None:
    model, run_dir = with_calls(tiny_model, tmp_path / "model"), tmp_path / "run"
    command = [sys.executable, "recipes/prepare_tools.py", "--out", str(tmp_path), "--train", "12", "--eval", "4"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    settings = [
        f"model={model}", f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/eval.jsonl",
        "rollout.engine=small", "rollout.dtype=float32", "rollout.max_sequences=16", "rollout.context_tokens=440",
        "rollout.max_tokens=100", "rollout.environment.max_turns=3", "learner.dtype=float32", "learner.steps=2",
        "learner.lr=1e-4", "group_size=4", "batch_groups=2", "eval.every=2", "bus.heartbeat_s=0.2",
        "draft.record=true", "wandb.mode=disabled",
    ]  # fmt: skip
    command = [sys.executable, "-m", "echelon", "run", "recipes/grpo_tools.py", "--run-dir", str(run_dir), *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    totals = Counter(
        {name: sum(row.get(name, 0) for row in rows) for name in rows[0] if name.startswith("environment/")}
    )
    assert totals["environment/episodes"] >= 16
    assert totals["environment/tool_calls"] > totals["environment/tool_errors"] > 0
    assert totals["environment/truncated_episodes"] > 0
    assert totals["environment/tool_s"] > 0
    assert max(row.get("environment/turns_mean", 0) for row in rows) > 1
    prompts = [json.loads(line) for line in (run_dir / "prompts" / "train.jsonl").read_text().splitlines()]
    assert prompts[0]["prompt"].startswith("1<bos>"), "the chat template was told of the calculator"
    records = list(read_rollouts(run_dir / "rollouts.bin"))
    assert any(has_answer(completion.tolist()) for record in records for completion in record.completions())


def has_answer(token_ids: list[int]) -> bool:
    """Is there a turn that has ended, and a 7 between the template's tokens?"""
    return any(token_ids[start : start + 6] == [2, 1, 10, 2, 1, 14] for start in range(len(token_ids)))
