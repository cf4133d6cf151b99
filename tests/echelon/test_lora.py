"""A whole run with adapters: small versions, the gate at float noise, audited, replayed, resumed and exported."""

import json
from pathlib import Path
from typing import Any

import pytest

from echelon.audit.run import audit_run
from echelon.cli import main
from echelon.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 4
SETTINGS = (
    "learner.lora.rank=4",
    "learner.lora.target_modules=q_proj,down_proj",
    "learner.lr=1e-2",
    "learner.loss.kl_coef=0.01",
    "learner.checkpoint_every=2",
    "journal.keep=true",
    "eval.every=0",
    "max_staleness=0",
)


@pytest.fixture(scope="module")
def run(write_recipe, start_run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of four steps, the last two after it was resumed."""
    path = tmp_path_factory.mktemp("lora")
    recipe = write_recipe(path)
    for words in ((), ("--resume",)):
        steps = STEPS if words else STEPS - 2
        run = start_run(recipe, path / "run", *SETTINGS, f"learner.steps={steps}", *words)
        code, _, stderr = run.finish()
        assert (code, stderr) == (0, ""), run.logs()
    return run


def test_versions_are_small_and_pass_the_gate_at_float_noise(run: Any) -> None:
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert row["mismatch/kl"] < 1e-4  # nothing was sampled with one version and trained with another
    updated = [row for row in rows if row["weights/sent_bytes"]]
    assert len(updated) >= STEPS - 2
    for row in updated:
        assert row["weights/sent_bytes"] == 4 * row["learner/num_trainable"]
        assert row["gate/kl"] < 1e-8
    assert rows[-1]["loss/reference_kl"] > rows[0]["loss/reference_kl"]


def test_audit_and_replay(run: Any, capsys: pytest.CaptureFixture) -> None:
    report = audit_run(RunFolder(run.folder))
    assert [violation.line() for violation in report.violations] == []
    assert main(["replay", str(run.folder)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith(f"{STEPS} steps came out the same\n")


def test_export_is_a_model_and_an_adapter(run: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(["export", str(run.folder), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (4, ["down_proj", "q_proj"])
    base = json.loads((run.folder / "config.json").read_text())["model"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapted: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / "adapter")
    unmerged = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    for name, parameter in adapted.merge_and_unload().named_parameters():
        assert (parameter - merged.get_parameter(name)).abs().max() < 1e-6, name
        changed = (parameter != unmerged[name]).any()
        assert changed == name.endswith(("q_proj.weight", "down_proj.weight")), name
