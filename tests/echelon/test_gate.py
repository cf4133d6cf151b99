"""Whole runs in which what is published is not what the learner has scored, whatever the checksums say."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 6
ALTERED = """
import sys
if "echelon.roles.learner" in sys.orig_argv:
    from learner.publisher import DeltaPublisher
    from learner.shards import LocalShards
    publish, write = DeltaPublisher.publish, LocalShards._write
    def remember(self, version, probe):
        LocalShards.version = version
        publish(self, version, probe)
    def alter(self, name, tensor):
        altered = self.version in {versions} and name == "model.norm.weight"
        write(self, name, 1.5 * tensor if altered else tensor)
    DeltaPublisher.publish, LocalShards._write = remember, alter
"""


def altering(folder: Path, versions: str) -> Path:
    """A folder from which the learner takes a scaled tensor into these versions."""
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text(ALTERED.format(versions=versions))
    return folder / "path"


def test_a_refused_version_is_said_and_the_run_goes_on(write_recipe, start_run, tmp_path: Path) -> None:
    recipe, path = write_recipe(tmp_path), altering(tmp_path, "{2}")
    # Evaluations come one after another, so that no version is overtaken before it is tried.
    run = start_run(recipe, tmp_path / "run", "max_staleness=1", "eval.every=1", python_path=path)
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    rows = run.rows()
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 1, 3, 4, 5, 6]
    rows = [row for row in rows if "loss/policy" in row]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert max(row["staleness/max_versions"] for row in rows) <= 1
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert not any(2 in sample["versions"] for sample in samples)
    assert stdout.count("version 2 refused by worker-0, which serves version 1 still: mismatch gate: ") == 1
    assert rows[-1]["gate/refused_versions"] == 1
    assert max(row["gate/kl"] for row in rows) > 0.02
    assert sorted(row["gate/kl"] for row in rows)[-2] < 1e-8


def test_a_run_of_which_every_version_is_refused_ends_with_the_gates_words(
    write_recipe, start_run, tmp_path: Path
) -> None:
    recipe, path = write_recipe(tmp_path), altering(tmp_path, "range(1, 99)")
    run = start_run(recipe, tmp_path / "run", "max_staleness=0", "eval.every=1", python_path=path)
    code, _, stderr = run.finish()
    assert code == 1, run.logs()
    assert len(stderr.splitlines()) == 1
    assert "version 1 was refused, and max_staleness=0 leaves nothing to train on without: mismatch gate: " in stderr
    assert run.survivors() == []
