"""Whole runs on a Ray cluster of several nodes, all on this machine."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    # Ray 2.60: nodes that a test stops leave pipes and processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).resolve().parents[3]
STEPS, GROUPS = 24, 4
SLOW_REWARD = """
import time

def reward(sample):
    time.sleep(0.06)
    return float(sample.completion.count("1"))
"""
"""About a second a step and worker, so that the run is still under way when Ray has noticed that a node is lost."""
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


class LocalCluster:
    """Nodes with a CPU each, as Ray counts them."""

    def __init__(self, private: Path) -> None:
        """Args: private: where the actors' private folders are."""
        from ray.cluster_utils import Cluster

        self.private = private
        self._cluster = Cluster()
        self._head = self._cluster.add_node(include_dashboard=False, include_log_monitor=False, **NODE, **free_ports())
        self._others: list[Any] = []
        for _ in range(3):
            self.add_node()

    @property
    def address(self) -> str:
        return self._cluster.address

    def add_node(self) -> None:
        self._others.append(self._cluster.add_node(**NODE, **free_ports()))

    def kill_node_of(self, role: str) -> str:
        """SIGKILL to a node, besides the head, that runs `role` alone; the name of the role's process."""
        for node in self._others:
            for words in (words_of(process).split() for process in below(raylet_pid(node))):
                if f"echelon.roles.{role}" in words:
                    name = words[words.index("--name") + 1] if "--name" in words else role
                    self._others.remove(node)
                    self._cluster.remove_node(node, allow_graceful=False)
                    return name
        raise AssertionError(f"no node runs {role}")

    def roles(self) -> list[str]:
        """Command lines of roles that Ray has started; no part of a role is left once this is empty."""
        nodes = [self._head, *self._others]
        words = [words_of(process) for node in nodes for process in below(raylet_pid(node))]
        return [line for line in words if "echelon.roles." in line]

    def kill_head(self) -> None:
        """SIGKILL to the process that knows the cluster; its machine's raylet stays."""
        process = self._head.all_processes["gcs_server"][0].process
        process.kill()
        process.wait()

    def close(self) -> None:
        self._cluster.shutdown()


def raylet_pid(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def words_of(process: psutil.Process) -> str:
    """Its command line; "" where it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def free_ports() -> dict[str, int]:
    """Ray 2.60's raylet gives its agents 15 seconds to say which ports they have, unless it is told."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for each in sockets:
            each.bind(("", 0))
        return {name: each.getsockname()[1] for name, each in zip(PORTS, sockets, strict=True)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    import ray
    from ray._private.node import Node

    temporary, private = (Path(tempfile.mkdtemp(prefix=prefix)) for prefix in ("ray-", "roles-"))
    start_raylet = Node.start_raylet

    def start_with_port(node: Any, *args: Any, **kwargs: Any) -> Any:
        """Of the four ports, this one cannot be given to the raylet but by the file that it waits for."""
        port = node._ray_params.dashboard_agent_listen_port
        Path(node._session_dir, f"dashboard_agent_listen_port_{node._node_id}").write_text(str(port))
        return start_raylet(node, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # a process for each CPU, for which the driver waits
        patch.setenv("RAY_worker_register_timeout_seconds", "600")  # 60, which a busy machine needs to import Ray
        patch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")  # 60
        patch.setenv("RAY_health_check_period_ms", "1000")  # 3000; a node is lost after five that went wrong
        patch.setenv("RAY_worker_niceness", "0")  # 15, which gets them nothing of a machine that has other work
        patch.setenv("RAY_TMPDIR", str(temporary))
        patch.setenv("TMPDIR", str(private))
        patch.setattr(Node, "start_raylet", start_with_port)
        patch.setattr(tempfile, "tempdir", None)
        local = LocalCluster(private)
        try:
            yield local
        finally:
            local.close()
            ray.shutdown()
            for folder in (temporary, private):
                shutil.rmtree(folder, ignore_errors=True)


def left(found: Any, within_s: float = 60.0) -> list[Any]:
    """What `found()` still has when it ought to be empty."""
    deadline = time.monotonic() + within_s
    while (rest := found()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return rest


def all_is_trained_and_nobody_left(run: Any, cluster: LocalCluster) -> None:
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert rows[-1]["ledger/trained_groups"] == STEPS * GROUPS
    nobody_is_left(run, cluster)
    audit = [sys.executable, "-m", "echelon", "audit", str(run.folder)]
    result = subprocess.run(audit, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def nobody_is_left(run: Any, cluster: LocalCluster) -> None:
    assert run.survivors() == []
    assert left(cluster.roles) == []
    assert left(lambda: list(cluster.private.glob("echelon-role-*"))) == []  # keys are among what is in there


@pytest.mark.cluster
def test_run_on_four_nodes_goes_on_when_one_is_killed(cluster, write_recipe, start_run, tmp_path: Path) -> None:
    """Two nodes have a rank of the learner each, two a worker."""
    settings = ("--on", "ray", f"ray.address={cluster.address}", "learner.nodes=2", "learner.ranks=2")
    settings += (f"learner.steps={STEPS}", "eval.every=0", "rollout.workers=2", "learner.checkpoint_every=8")
    run = start_run(write_recipe(tmp_path, SLOW_REWARD), tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 2, 600)
    assert len([line for line in cluster.roles() if "-m echelon.roles.learner" in line and "torch" not in line]) == 2
    lost = cluster.kill_node_of("worker")
    code, stdout, stderr = run.finish(600)
    assert (code, stderr) == (0, ""), (stdout, run.logs())
    assert f"{lost} was lost with its node or its actor" in stdout
    assert "worker-0 INFO" in (run.folder / "logs" / "worker-0.log").read_text()
    all_is_trained_and_nobody_left(run, cluster)


@pytest.mark.cluster
def test_the_learner_goes_on_on_a_node_that_is_added(cluster, write_recipe, start_run, tmp_path: Path) -> None:
    """One of its two nodes is lost: the rank on the other fails of that, which is no reason of its own."""
    settings = ("--on", "ray", f"ray.address={cluster.address}", "learner.nodes=2", "learner.ranks=2")
    settings += (f"learner.steps={STEPS}", "eval.every=0", "learner.checkpoint_every=4")
    run = start_run(write_recipe(tmp_path, SLOW_REWARD), tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 6, 600)
    assert cluster.kill_node_of("learner") == "learner"
    cluster.add_node()
    code, stdout, stderr = run.finish(600)
    assert (code, stderr) == (0, ""), (stdout, run.logs())
    assert "learner was lost with its node or its actor" in stdout
    all_is_trained_and_nobody_left(run, cluster)


@pytest.mark.cluster
def test_more_workers_than_places(cluster, write_recipe, start_run, tmp_path: Path) -> None:
    settings = ("--on", "ray", f"ray.address={cluster.address}", "rollout.workers=9", "rollout.start_timeout_s=8")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *settings)
    code, _, stderr = run.finish(600)
    assert code == 1, run.logs()
    assert re.search(r"got no place within 8 s: it wants 1 CPU; free are 0 of (\d) CPUs on \1 nodes", stderr)
    assert stderr.count("\n") == 1, stderr
    nobody_is_left(run, cluster)


def test_no_cluster(write_recipe, start_run, tmp_path: Path) -> None:
    run = start_run(write_recipe(tmp_path), tmp_path / "run", "--on", "ray", "ray.address=127.0.0.1:1")
    code, _, stderr = run.finish(600)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "ray.address is 127.0.0.1:1, and nothing answers there" in stderr
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.cluster
def test_a_killed_supervisor_leaves_nobody(cluster, write_recipe, start_run, tmp_path: Path) -> None:
    settings = ("--on", "ray", f"ray.address={cluster.address}", "learner.steps=10000", "eval.every=0")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 2, 600)
    assert len(cluster.roles()) == 2
    run.process.kill()
    nobody_is_left(run, cluster)


@pytest.mark.cluster
def test_the_head_is_lost(cluster, write_recipe, start_run, tmp_path: Path) -> None:
    """The last test of the cluster."""
    settings = ("--on", "ray", f"ray.address={cluster.address}", "learner.steps=10000", "eval.every=0")
    run = start_run(write_recipe(tmp_path, SLOW_REWARD), tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 2, 600)
    cluster.kill_head()
    code, stdout, stderr = run.finish(120)
    assert (code, stderr.count("\n")) == (1, 1), stderr
    assert f"echelon: the Ray cluster's head {cluster.address} has not answered for 10 s" in stderr
    assert "go on from" in stdout
    nobody_is_left(run, cluster)
