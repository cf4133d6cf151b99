"""Whole runs in bfloat16, their versions by each of the ways from learner to worker."""

from pathlib import Path

import pytest

from echelon.audit.run import audit_run
from echelon.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 4
SETTINGS = (f"learner.steps={STEPS}", "learner.lr=1e-5", "rollout.dtype=bfloat16", "max_staleness=0", "eval.every=0")
SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.parametrize("backend", ["bus", "file", "shm"])
def test_a_run_gets_its_versions(backend: str, write_recipe, start_run, tmp_path: Path) -> None:
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *SETTINGS, f"weights.backend={backend}")
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(STEPS))
    whole = rows[0]["weights/published_bytes"]
    for row in rows[1:]:
        assert row["gate/kl"] < 0.02
        assert row["weights/publish_s"] > 0
        if backend == "shm":
            assert row["weights/published_bytes"] == whole
        else:
            assert row["weights/published_bytes"] < whole / 4, "a delta"
    assert sum(row["weights/sent_bytes"] for row in rows) > whole
    assert not audit_run(RunFolder(run.folder)).violations
    assert run.survivors() == []
    assert not list((run.folder / "weights").glob("*"))
    run_id = RunFolder(run.folder).record().run_id
    assert not list(SHARED_MEMORY.glob(f"echelon-{run_id}-*"))
