"""The real roles under the real supervisor: each is killed once, and the run ends as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
STEPS, GROUPS = 24, 4


def test_every_role_is_killed_once(write_recipe, start_run, tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(2**32)))
    print(f"CHAOS_SEED={seed}")  # noqa: T201  pytest shows it where the test fails
    draw = random.Random(seed)
    roles = ["broker", "worker", "learner"]
    draw.shuffle(roles)
    settings = (f"learner.steps={STEPS}", "learner.checkpoint_every=3", "eval.every=0")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *settings)
    for role in roles:
        steps = len(run.rows()) + draw.randint(1, 4)
        run.wait_for(lambda steps=steps: len(run.rows()) >= steps)
        os.kill(run.role(f"echelon.roles.{role}").pid, signal.SIGKILL)
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    assert stdout.count("starting it again") == len(roles), stdout
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert rows[-1]["ledger/trained_groups"] == STEPS * GROUPS
    assert run.survivors() == []
    audit = subprocess.run(
        [sys.executable, "-m", "echelon", "audit", str(run.folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert audit.returncode == 0, audit.stdout + audit.stderr
