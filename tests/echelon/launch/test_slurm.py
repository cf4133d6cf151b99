"""A run as a Slurm job, with Slurm's programs replaced by ones that start everything here."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_slurm import install

from echelon.config import DataConfig, RunConfig
from echelon.launch.allocation import step_options
from echelon.launch.config import SlurmConfig
from echelon.launch.slurm_job import end, job_parameters, num_nodes
from learner.config import LearnerConfig
from rollout.config import RolloutConfig

ROOT = Path(__file__).resolve().parents[3]
STEPS, LONG = 16, 60


def config(**slurm: Any) -> RunConfig:
    return RunConfig(
        model="org/name",
        data=DataConfig(train="org/data"),
        rollout=RolloutConfig(workers=5, spares=1),
        learner=LearnerConfig(ranks=4, nodes=2),
        slurm=SlurmConfig(**slurm),
    )


def test_the_learner_has_its_nodes_and_workers_share_the_others() -> None:
    assert num_nodes(config()) == 2 + 6
    assert num_nodes(config(workers_per_node=4)) == 2 + 2


def test_what_is_not_set_is_left_to_the_cluster() -> None:
    bare = job_parameters(config(), "recipe")
    assert not {"partition", "account", "qos", "constraint", "gpus_per_node", "mem", "setup"} & bare.keys()
    assert bare["additional_parameters"] == {"requeue": True, "signal": "B:USR2@120"}


@pytest.mark.parametrize(("ignores", "code"), [(False, -signal.SIGTERM), (True, -signal.SIGKILL)])
def test_a_signal_s_handler_ends_what_the_program_waits_for(ignores: bool, code: int) -> None:
    action = "SIG_IGN" if ignores else "SIG_DFL"
    words = f"import signal, time; signal.signal(15, signal.{action}); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    before = signal.signal(signal.SIGALRM, lambda *_: end(process.pid, 1.0))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        started = time.monotonic()
        assert process.wait() == code
        assert time.monotonic() - started < 10
    finally:
        signal.signal(signal.SIGALRM, before)
        process.stdout.close()


def test_steps_on_one_node_share_its_memory() -> None:
    assert "--mem=4096M" in step_options(["a"], 2, 0, 4096)
    assert not [word for word in step_options(["a"], 2, 0, 0) if word.startswith("--mem")]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Path]:
    """The folder of the programs; whatever a job has left is ended."""
    folder = tmp_path / "bin"
    install(folder)
    yield folder
    if (folder / "job.pid").exists():
        for process in family(folder):
            process.kill()


def family(folder: Path) -> list[psutil.Process]:
    """All that is left of a job: its shell begins a session, and so do the roles, but all have its variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_JOB_ID") == "4242" and str(folder) in process.environ()["PATH"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def echelon(folder: Path | None, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = "/usr/bin:/bin" if folder is None else f"{folder}:/usr/bin:/bin"
    return subprocess.run(
        [sys.executable, "-m", "echelon", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def wait_for(condition: Callable[[], Any], folder: Path, run_dir: Path, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, said(run_dir)
        time.sleep(0.1)


def said(run_dir: Path) -> str:
    files = [*run_dir.parent.glob("run-slurm/*.out"), *run_dir.glob("logs/*")]
    return "\n".join(f"--- {file.name}\n{file.read_text()[-8000:]}" for file in files)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_job_is_submitted_runs_on_three_nodes_and_ends(slurm, write_recipe, tmp_path: Path) -> None:
    """Two nodes have a rank of the learner each, one has two workers, of which one is killed."""
    run_dir = tmp_path / "run"
    settings = ("learner.nodes=2", "learner.ranks=2", "rollout.workers=2", "slurm.workers_per_node=2")
    settings += ("slurm.partition=long", "slurm.mem_gb=8", "slurm.time_min=90", "slurm.setup=export MODULES=yes")
    settings += (f"learner.steps={STEPS}", "eval.every=0", "learner.checkpoint_every=4")
    submitted = echelon(slurm, "run", write_recipe(tmp_path), "--on", "slurm", "--run-dir", run_dir, *settings)
    assert (submitted.returncode, submitted.stderr) == (0, ""), submitted.stderr
    assert "job 4242 is queued" in submitted.stdout and str(run_dir) in submitted.stdout

    script = (slurm / "job.sh").read_text()
    for line in ("--partition=long", "--nodes=3", "--ntasks-per-node=2", "--mem=8GB", "--time=90", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --signal=B:USR2@120\n" in script
    assert "\nexport MODULES=yes\n" in script and "\nexec " in script and "\nsrun" not in script

    rows = run_dir / "metrics.jsonl"
    wait_for(lambda: rows.exists() and len(rows.read_text().splitlines()) >= 2, slurm, run_dir)
    words = [process for process in family(slurm) if "echelon.roles.worker" in process.cmdline()[2:3]]
    os.kill(words[0].pid, signal.SIGKILL)
    wait_for(lambda: not family(slurm), slurm, run_dir)
    assert len(rows.read_text().splitlines()) == STEPS, said(run_dir)
    assert "was killed by SIGKILL" in said(run_dir)
    assert "did not end with the run" not in said(run_dir)
    steps = (slurm / "srun.log").read_text()
    assert "--nodelist 127.0.0.2,127.0.0.3" in steps and "--nodelist 127.0.0.4" in steps
    assert "--mem=4096M" in steps
    audit = echelon(slurm, "audit", run_dir)
    assert audit.returncode == 0, audit.stdout + audit.stderr


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_job_whose_time_is_nearly_over_stops_and_goes_on_when_it_is_queued_again(
    slurm, write_recipe, tmp_path: Path
) -> None:
    run_dir, recipe = tmp_path / "run", write_recipe(tmp_path)
    settings = (f"learner.steps={LONG}", "eval.every=0", "learner.checkpoint_every=5")
    submitted = echelon(slurm, "run", recipe, "--on", "slurm", "--run-dir", run_dir, *settings)
    assert submitted.returncode == 0, submitted.stderr
    rows = run_dir / "metrics.jsonl"
    wait_for(lambda: rows.exists() and len(rows.read_text().splitlines()) >= 7, slurm, run_dir)
    os.kill(int((slurm / "job.pid").read_text()), signal.SIGUSR2)  # as `--signal=B:USR2@120` has Slurm do
    wait_for(lambda: not family(slurm), slurm, run_dir)
    assert (slurm / "requeued").read_text() == "4242", said(run_dir)
    assert "stopped at step" in said(run_dir)
    assert 7 <= len(rows.read_text().splitlines()) < LONG

    again = {"PATH": f"{slurm}:/usr/bin:/bin", "SLURM_RESTART_COUNT": "1"}
    subprocess.run([slurm / "sbatch", slurm / "job.sh"], env=os.environ | again, timeout=60, check=True)
    wait_for(lambda: not family(slurm), slurm, run_dir)
    assert [json.loads(row)["step"] for row in rows.read_text().splitlines()] == list(range(LONG)), said(run_dir)
    audit = echelon(slurm, "audit", run_dir)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_without_slurm_a_line_says_so(write_recipe, tmp_path: Path) -> None:
    result = echelon(None, "run", write_recipe(tmp_path), "--on", "slurm", "--run-dir", tmp_path / "run")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--on slurm needs sbatch, which is not on this machine" in result.stderr


def test_an_allocation_is_a_job(write_recipe, tmp_path: Path) -> None:
    result = echelon(None, "run", write_recipe(tmp_path), "--on", "allocation")
    assert result.returncode == 2
    assert "--on allocation is for the inside of a Slurm job" in result.stderr


def test_more_workers_than_the_job_has_nodes(slurm, write_recipe, tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "127.0.0.2,127.0.0.3"}
    words = ("run", write_recipe(tmp_path), "--on", "allocation", "rollout.workers=3")
    result = echelon(slurm, *words, **variables)
    assert result.returncode == 2
    assert "the run wants 4 nodes, and Slurm job 4242 has 2" in result.stderr


def test_several_nodes_need_a_cluster(write_recipe, tmp_path: Path) -> None:
    result = echelon(None, "run", write_recipe(tmp_path), "learner.nodes=2", "learner.ranks=2")
    assert result.returncode == 2
    assert "learner.nodes is 2: several machines take --on ray or --on slurm" in result.stderr
