"""Every shipped recipe: loads, is short, and the ones with public data run on a small file in its schema."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from architectures import write_model

from echelon.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if not path.stem.startswith("prepare_"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_loads_and_is_short(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echelon.validate.check_machine", lambda config: None)
    recipe = load_recipe(path)
    assert recipe.config.group_size >= 2
    assert len(path.read_text().splitlines()) <= 60


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_script_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_chain_sum_problems_are_right_and_seeded() -> None:
    script = load_script("prepare_chain_sum")
    assert script.solution([3, 5, 8]) == "3+5=8;8+8=16;#16"
    problems = script.draw_problems(random.Random(1), 200, set())
    assert problems == script.draw_problems(random.Random(1), 200, set())
    assert len({problem["prompt"] for problem in problems}) == 200
    for problem in problems:
        operands = [int(word) for word in problem["prompt"].rstrip("=").split("+")]
        assert 2 <= len(operands) <= 14
        assert problem["answer"] == str(sum(operands)) and problem["solution"].endswith(f"#{sum(operands)}")


@pytest.mark.parametrize(
    ("completion", "truncated", "answer", "steps"),
    [
        ("3+5=8;8+4=12;#12", False, 1.0, 0.5),
        ("#12", False, 1.0, 0.0),
        ("12", False, 1.0, 0.0),
        ("3+5=8;8+4=13;#13", False, 0.0, 0.25),
        ("3+5=9;8+4=12;#12", False, 1.0, 0.0),
        ("3+5=8;8+4=12;12+1=13;#13", False, 0.0, 0.5),
        ("3+5=8;8+4=12;#12", True, 0.0, 0.5),
        ("3+5=8", True, 0.0, 0.0),  # cut: its step may not be whole
        ("", False, 0.0, 0.0),
    ],
)
def test_chain_sum_reward(completion: str, truncated: bool, answer: float, steps: float) -> None:
    from rewards.sample import Sample

    recipe = load_script("grpo_chain_sum")
    problem = {"prompt": "3+5+4=", "answer": "12"}
    sample = Sample(prompt="3+5+4=", completion=completion, problem=problem, num_tokens=3, truncated=truncated)
    assert recipe.chain_sum_reward(sample) == {"answer": answer, "steps": steps}


TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}#{% endif %}"
SMALL = (
    "rollout.engine=small", "rollout.dtype=float32", "rollout.max_sequences=16", "rollout.context_tokens=512",
    "rollout.max_tokens=8", "learner.dtype=float32", "learner.steps=2", "learner.lr=1e-4", "learner.minibatches=1",
    "learner.microbatch_tokens=4096", "group_size=2", "batch_groups=2", "data.max_train=12", "wandb.mode=disabled",
    "bus.heartbeat_s=0.2",  # which bring the figures of scoring
)  # fmt: skip
EVALUATION = ("data.max_eval=4", "eval.every=2")

Rows = list[dict[str, Any]]


def run_recipe(
    name: str, tiny_model: Path, folder: Path, *settings: str, rows: Rows | None = None
) -> tuple[Rows, Rows]:
    """The real recipe for two steps with a tiny model; only model, sizes and `rows` are other ones.

    Returns: rows of metrics.jsonl; the training prompts.
    """
    model = shutil.copytree(tiny_model, folder / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    data = folder / f"{name}.jsonl"
    if rows is not None:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = (f"data.train={data}", *settings)
    if rows is not None and "eval.every=2" in settings:
        settings = (f"data.eval={data}", *settings)
    run_dir = folder / "run"
    words = [f"recipes/{name}.py", "--run-dir", str(run_dir), f"model={model}", *SMALL, *settings]
    command = [sys.executable, "-m", "echelon", "run", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert result.returncode == 0 and not result.stderr, result.stdout + result.stderr
    metrics, prompts = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (run_dir / "metrics.jsonl", run_dir / "prompts" / "train.jsonl")
    )
    assert [row["step"] for row in metrics if "loss/policy" in row] == [0, 1]
    return metrics, prompts


def merged(metrics: Rows) -> dict[str, Any]:
    """Of every metric the last value."""
    return {name: value for row in metrics for name, value in row.items()}


@pytest.mark.slow
def test_gsm8k_runs_on_a_file_in_its_schema(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"Tom has {n} apples and buys {n + 1} more. How many?", "answer": f"{n}+{n + 1}\n#### {2 * n + 1}"}
        for n in range(12)
    ]
    metrics, prompts = run_recipe("grpo_gsm8k", tiny_model, tmp_path, *EVALUATION, rows=rows)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert len(prompts) == 12
    assert prompts[0]["prompt"].endswith("\\boxed{}.\n#") and "Tom has 0 apples" in prompts[0]["prompt"]
    assert prompts[0]["problem"]["answer"].endswith("#### 1")
    assert merged(metrics)["scoring/math_s"] > 0 and merged(metrics)["scoring/math_failure_rate"] == 0


def dapo_rows() -> Rows:
    return [
        {
            "data_source": "math_dapo",
            "prompt": [
                {"content": f"Solve it. The last line is Answer: $Answer.\n\nWhat is {n} - {n - 1}?", "role": "user"}
            ],
            "ability": "MATH",
            "reward_model": {"ground_truth": "1", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{n}"},
        }
        for n in range(12)
    ]


@pytest.mark.slow
def test_dapo_math_runs_on_a_file_in_its_schema(tiny_model: Path, tmp_path: Path) -> None:
    settings = ("learner.advantage.overlong_tokens=8", "learner.advantage.overlong_cache_tokens=4", "group_size=8")
    metrics, prompts = run_recipe("dapo_math", tiny_model, tmp_path, *settings, rows=dapo_rows())
    assert prompts[3]["prompt"].endswith("What is 3 - 2?\n#")
    assert all(0 < row["reward/mean"] < 1 for row in metrics[:2])  # groups of equal rewards are left out


@pytest.mark.slow
def test_gspo_moe_runs_on_a_file_in_its_schema(tiny_model: Path, tmp_path: Path) -> None:
    """With a mixture of four experts. The second step's answers are of the version that the first one made."""
    mixture = shutil.copytree(tiny_model, tmp_path / "mixture")
    write_model("qwen3-moe", mixture)
    settings = (
        "learner.ranks=1", "rollout.workers=1", "rollout.context_tokens=128", "learner.minibatches=2",
        "max_staleness=0",
    )  # fmt: skip
    metrics, _ = run_recipe("gspo_moe", mixture, tmp_path, *settings, rows=dapo_rows())
    assert metrics[1]["staleness/max_versions"] == 0 < metrics[1]["weights/sync_s"]
    assert max(row["mismatch/kl"] for row in metrics) < 1e-4, "the engine serves what the learner trains"


@pytest.mark.slow
def test_elastic_math_runs_on_a_file_in_its_schema(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"problem": f"What is ${n} - {n - 1}$?", "answer": "1", "solution": "It is $\\boxed{1}$."} for n in range(12)
    ]
    settings = (
        "rollout.reasoning.thinking_tokens=4", "rollout.reasoning.solution_tokens=3", "rollout.reasoning.end=;#",
        "rollout.max_tokens=9",
    )  # fmt: skip
    metrics, prompts = run_recipe("elastic_math", tiny_model, tmp_path, *settings, *EVALUATION, rows=rows)
    assert "What is $3 - 2$?" in prompts[3]["prompt"]
    assert metrics[0]["rollout/length_max"] <= 9
    assert any(row.get("rollout/masked_fraction", 0) > 0 for row in metrics), "an end of thinking was forced"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("no \\boxed{2} </think> so \\boxed{1}", 1.0),
        ("it is \\boxed{1} </think> so \\boxed{2}", 0.0),
        ("I never stopped to think: \\boxed{1}", 1.0),
        ("it is \\boxed{1} </think>", 0.0),
    ],
)
def test_elastic_math_rewards_the_solution_alone(
    completion: str, reward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rewards.sample import Sample

    monkeypatch.setattr("rewards.math.STEP_TIMEOUT_S", 60)  # a busy machine needs more
    sample = Sample(prompt="", completion=completion, problem={"answer": "1"}, num_tokens=3, truncated=False)
    assert load_script("elastic_math").solution_reward(sample) == reward


@pytest.mark.slow
def test_code_runs_on_a_file_in_its_schema(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {
            "task_id": n,
            "text": f"Write a function to add {n}.",
            "code": f"def add(x):\r\n  return x + {n}",
            "test_list": [f"assert add(1) == {n + 1}", f"assert add(2) == {n + 2}"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for n in range(12)
    ]
    metrics, prompts = run_recipe("grpo_code", tiny_model, tmp_path, *EVALUATION, rows=rows)
    assert prompts[0]["prompt"].endswith("It has to pass:\nassert add(1) == 1\n#")
    assert metrics[0]["reward/mean"] == 0.0 and merged(metrics)["scoring/code_failure_rate"] == 0.0
    assert metrics[-1]["eval/accuracy"] == 0.0


@pytest.mark.slow
def test_reasoning_gym_runs_on_what_it_generates(tiny_model: Path, tmp_path: Path) -> None:
    metrics, prompts = run_recipe("grpo_reasoning_gym", tiny_model, tmp_path, *EVALUATION)
    tasks = [prompt["problem"]["metadata"]["source_dataset"] for prompt in prompts]
    assert tasks == ["chain_sum", "leg_counting", "spell_backward", "simple_equations"] * 3
    row = merged(metrics)
    assert {"reward/reasoning_gym", "reward/format", "scoring/reasoning_gym_s", "scoring/format_s"} <= row.keys()
    assert row["reward/reasoning_gym"] + row["reward/format"] == pytest.approx(row["reward/mean"], abs=1e-6)


@pytest.mark.slow
def test_lora_runs_two_steps(tiny_model: Path, tmp_path: Path) -> None:
    """The real recipe with the demo's reward; the model is the tests', whose tokenizer knows sums."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+{n}=", "answer": str(2 * n)}) + "\n" for n in range(1, 9)))
    run_dir = tmp_path / "run"
    settings = [
        f"model={tiny_model}", f"data.train={data}", f"data.eval={data}", "rollout.engine=small",
        "rollout.max_sequences=16", "rollout.context_tokens=64", "rollout.max_tokens=8", "learner.steps=2",
        "group_size=2", "batch_groups=2", "eval.every=2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "echelon", "run", "recipes/grpo_lora.py", "--run-dir", str(run_dir), *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert metrics[0]["learner/num_trainable"] > 0
    assert "eval/accuracy" in metrics[-1]
