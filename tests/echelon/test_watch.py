"""`echelon watch` from elsewhere, through the broker."""

import subprocess
import sys
from pathlib import Path

import pytest

from echelon.files import NumberedRows
from echelon.metrics import RowWriter
from echelon.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def test_numbered_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    rows = NumberedRows(file)
    assert rows.read(0, 9) == []
    writer = RowWriter(file)
    for step in range(5):
        writer.write({"step": step})
    with file.open("ab") as torn:
        torn.write(b'{"step": 5')
    assert rows.read(0, 2) == ['{"step":0}', '{"step":1}']
    assert rows.read(3, 9) == ['{"step":3}', '{"step":4}']
    assert rows.read(5, 9) == rows.read(99, 9) == []
    with file.open("ab") as rest:
        rest.write(b"}\n")
    assert rows.read(5, 9) == ['{"step": 5}']
    file.write_bytes(b'{"step":7}\n')  # by a resumed run
    assert rows.read(0, 9) == ['{"step":7}']


@pytest.mark.slow
def test_a_run_is_watched_over_tcp_by_whoever_has_its_keys(write_recipe, start_run, tmp_path: Path) -> None:
    settings = ("bus.address=tcp://127.0.0.1:*", "learner.steps=40")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 2)
    bus = RunFolder(run.folder).bus()
    assert bus is not None
    watching = subprocess.Popen(
        [sys.executable, "-m", "echelon", "watch", bus.address, "--keys", str(run.folder / "keys")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        refused = subprocess.run(
            [sys.executable, "-m", "echelon", "watch", bus.address, "--keys", str(tmp_path / "none")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.finish()[0] == 0, run.logs()
        stdout, stderr = watching.communicate(timeout=60)
    finally:
        watching.kill()
    assert refused.returncode != 0 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert (watching.returncode, stderr) == (0, "")
    steps = [line.split()[1] for line in stdout.splitlines() if line.startswith("step ")]
    assert steps[:6] == [f"{step}/40" for step in range(6)]  # its first steps were over before it was watched
    assert "of 40 steps" in stdout
