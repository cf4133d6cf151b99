"""The settings of `benchmarks/algorithms.py`: a run takes them, and the guide says the same."""

import importlib.util
from operator import attrgetter
from pathlib import Path

import pytest

from echelon.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "decoupled_ppo": "decoupled PPO",
}
OF_THE_TASK = ("fixed_tokens=128", "overlong_tokens=128", "overlong_cache_tokens=16", "clip_low=0.03", "clip_high=0.04")


def algorithms() -> dict[str, tuple[str, ...]]:
    spec = importlib.util.spec_from_file_location("_algorithms", ROOT / "benchmarks" / "algorithms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ALGORITHMS


@pytest.mark.parametrize("name", ROWS)
def test_a_run_takes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echelon.validate.check_machine", lambda config: None)
    config = load_recipe(ROOT / "recipes" / "grpo_chain_sum.py", algorithms()[name]).config
    for override in algorithms()[name]:
        setting, _, value = override.partition("=")
        taken = attrgetter(setting)(config)
        assert taken == (type(taken)(value) if type(taken) in (int, float, str) else value == "true"), override


@pytest.mark.parametrize("name", ROWS)
def test_the_guide_says_the_same(name: str) -> None:
    guide = (ROOT / "docs" / "guide" / "losses.md").read_text().splitlines()
    table = guide.index("| | `advantage.…` | `loss.…` | and |")
    row = next(line for line in guide[table:] if line.startswith(f"| {ROWS[name]} |"))
    for override in algorithms()[name]:
        setting = override.rpartition("learner.loss.")[2].rpartition("learner.advantage.")[2]
        if setting not in OF_THE_TASK and not setting.startswith("learner.lr"):
            assert setting in row.replace("`", " "), setting
    assert set(ROWS) == set(algorithms())
