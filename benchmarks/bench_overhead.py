"""What do metrics, the terminal's view, `watch`, traces and wandb cost a run?

    python benchmarks/bench_overhead.py --json benchmarks/results/bench_overhead.json

The demo's recipe runs with all of it on: every group traced to a collector, wandb offline, and `echelon watch` beside
it. py-spy looks at the thread of each process that has the interpreter: how often it meets code that is there for
people to see says how long that ran, imports apart. With what processes take that are there for that alone, and over
the CPU time of all, this is the cost. The run keeps both cores busy, so a share of the processor is a share of its
tokens a second. Runs with and without all of it, in turns, differ by more from one to the next than by what is looked
for.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from common import Bar, hardware, write_result
from demo_run import ECHELON, RECIPE, ROOT, prepare

LOOKS_PER_S = 100
RUN_S, START_S, TICK_S = 900.0, 5.0, 0.5
BOUND = 0.01
SEEING = {
    "metrics": (
        "databus/step_metrics.py",
        "databus/draft_metrics.py",
        "databus/episode_metrics.py",
        "databus/scoring_metrics.py",
        "databus/worker_counters.py",
        "echelon/metrics.py",
        "learner/loss_sums.py",
        "rollout/scheduling/report.py",
    ),
    "view": ("echelon/view.py", "echelon/progress.py", "/rich/"),
    "traces": ("echelon/traces.py", "/opentelemetry/"),
    "wandb": ("echelon/wandb_sink.py", "/wandb/"),
}
"""What a stack has in it while a process works for people to see. The first that fits counts."""
IMPORT = "importlib._bootstrap"
"""In the stack of what is imported: once a run, and no part of what a step costs."""
ALONE = ("wandb-core", "gpu_stats")
"""Processes that are there for that alone; py-spy does not look into them."""


class Collector(BaseHTTPRequestHandler):
    """Takes traces, and forgets them."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def run(folder: Path, steps: int, collector: str) -> dict[str, Any]:
    """One run, looked at; seconds of CPU time by what they were for."""
    task, run_dir, stacks = prepare(0), folder / "run", folder / "stacks.txt"
    settings = [f"model={task / 'model'}", *(f"data.{split}={task / split}.jsonl" for split in ("train", "eval"))]
    settings += [f"learner.steps={steps}", f"traces.endpoint={collector}", "wandb.mode=offline"]
    spy = [str(ECHELON.with_name("py-spy")), "record", "--subprocesses", "--gil", "--full-filenames", "--format", "raw"]
    spy += ["--rate", str(LOOKS_PER_S), "--output", str(stacks), "--"]
    words = [*spy, sys.executable, str(ECHELON), "run", RECIPE, "--run-dir", str(run_dir), *settings]
    with (folder / "run.log").open("w") as log:
        began = time.monotonic()
        running = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        watching = Watching(run_dir, folder)
        used: dict[int, tuple[str, float]] = {}
        while running.poll() is None:
            if time.monotonic() - began > RUN_S:
                raise SystemExit(f"the run took longer than {RUN_S:g} s: {folder / 'run.log'}")
            watching.tick()
            used |= cpu_s_below(running.pid)
            time.sleep(TICK_S)
        watch_s = watching.stop()
    if running.returncode != 0:
        raise SystemExit(f"the run ended with {running.returncode}:\n{(folder / 'run.log').read_text()[-2000:]}")
    return {
        "wall_s": time.monotonic() - began,
        "all_s": sum(cpu_s for _, cpu_s in used.values()),
        "watch_s": watch_s,
        "alone_s": sum(cpu_s for name, cpu_s in used.values() if name.startswith(ALONE)),
        **by_purpose(stacks),
    }


class Watching:
    """`echelon watch` on a terminal's device, from the moment that there is a run to watch."""

    def __init__(self, run_dir: Path, folder: Path) -> None:
        self._run_dir, self._log = run_dir, folder / "watch.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._terminal = -1
        self._started_at = 0.0
        self._start_s: float | None = None

    def tick(self) -> None:
        """To be called again and again."""
        if self._process is None and (self._run_dir / "run.json").exists():
            self._start()
        elif self._process is not None and self._start_s is None and time.monotonic() - self._started_at > START_S:
            times = psutil.Process(self._process.pid).cpu_times()
            self._start_s = times.user + times.system

    def _start(self) -> None:
        terminal, self._terminal = os.openpty()[::-1]
        words = [str(ECHELON), "watch", str(self._run_dir)]
        self._process = subprocess.Popen(words, cwd=ROOT, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL)
        os.close(terminal)
        self._started_at = time.monotonic()
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        try:
            while os.read(self._terminal, 65536):
                pass
        except OSError:  # the other end is closed
            pass

    def stop(self) -> float:
        """Its CPU time, without what it took to start."""
        if self._process is None or self._start_s is None:
            raise SystemExit(f"there was nothing to watch in {self._run_dir}, or not for {START_S:g} s")
        _, code, used = os.wait4(self._process.pid, 0)
        if code != 0:
            raise SystemExit(f"watch ended with {os.waitstatus_to_exitcode(code)}")
        return used.ru_utime + used.ru_stime - self._start_s


def cpu_s_below(pid: int) -> dict[int, tuple[str, float]]:
    """Name and CPU seconds by pid of the processes below `pid`."""
    used = {}
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used[process.pid] = process.name(), times.user + times.system
    return used


def by_purpose(stacks: Path) -> dict[str, float]:
    """Seconds of py-spy's stacks, by what they were for; those of imports are apart."""
    looks = Counter[str]()
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        if not count.isdecimal():  # the first line of a command of several, which the stack of its process begins with
            continue
        if IMPORT in stack:
            looks["import"] += int(count)
            continue
        purpose = next((name for name, marks in SEEING.items() if any(mark in stack for mark in marks)), None)
        if purpose is not None:
            looks[purpose] += int(count)
    return {f"{name}_s": looks[name] / LOOKS_PER_S for name in ("import", *SEEING)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder:
        seen = run(Path(folder), args.steps, f"http://127.0.0.1:{collector.server_port}/v1/traces")
    collector.shutdown()
    parts = {name: seen[f"{name}_s"] for name in (*SEEING, "watch", "alone")}
    overhead = sum(parts.values()) / (seen["all_s"] + seen["watch_s"])
    write_result(
        args.json,
        question="What do metrics, the terminal's view, watch, traces and wandb cost a run?",
        figures={**seen, "share": overhead, "steps": args.steps},
        peers={},
        bars=[Bar("share of the processor", overhead, BOUND, "at most")],
        device=hardware(),
    )


if __name__ == "__main__":
    main()
