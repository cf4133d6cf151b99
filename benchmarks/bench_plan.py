"""Does `echelon plan` foretell what a run then does, and how long does it take for many workers?

    python benchmarks/bench_plan.py --json benchmarks/results/bench_plan.json

Runs the demo's recipe for 1 and 2 workers with max_staleness 0 and 2, fits a plan to one of these runs (1 worker,
max_staleness 2), and compares what it says of all four with what they did: trained tokens a second, and the shares of
time in which the learner and the workers were idle, between the same steps. Nothing is evaluated. On two cores workers
and learner share them. How many each wants is read from /proc while it has them all: in the run of 1 worker with
max_staleness 0, where either works while the other waits. `assume.worker_cores` and `assume.learner_cores` are told
that; all else is fitted. With `--runs DIR` runs that are there are not made again.

Last, 10,000 workers: how long a simulation takes, in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Bar, hardware, write_result
from demo_run import ECHELON, RECIPE, ROOT, prepare, train
from role_cpu import RoleCpu

from databus.codec import Array
from echelon.plan.request import make_basis
from echelon.plan.simulation import Simulation
from echelon.plan.trace import read_trace
from echelon.report.journal_facts import read_journal_facts
from echelon.report.spans import merged
from echelon.run_folder import RunFolder

CELLS = [(1, 0), (1, 2), (2, 0), (2, 2)]
FITTED = (1, 2)
ALONE = (1, 0)
"""Where each role has all cores while it is at work: what it takes then is what it wants."""
SEED = 0
FIGURES = ("tokens_per_s", "learner_idle", "worker_idle", "staleness_mean")
MANY = 10_000
MANY_BATCH = 4_000
"""With max_staleness 2 that is 12,000 groups at once: every worker has one."""
MANY_LIMIT_S = 60.0


def run_cell(cell: tuple[int, int], folder: Path, steps: int) -> dict[str, float]:
    """Train, unless the folder has the run. Returns: cores that roles took while at work; empty where nobody looked."""
    run_dir = folder / name_of(cell)
    use_file = folder / f"{name_of(cell)}.cores.json"
    if not (run_dir / "metrics.jsonl").exists():
        cpu = RoleCpu(run_dir)
        cpu.start()
        workers, staleness = cell
        overrides = (
            f"rollout.workers={workers}",
            f"max_staleness={staleness}",
            f"learner.steps={steps}",
            "eval.every=0",
            "journal.keep=true",
            "rollout.start_timeout_s=1800",
        )
        train(prepare(SEED), SEED, run_dir, *overrides, timeout_s=7200.0)
        cpu.stop()
        use_file.write_text(json.dumps(cores_at_work(run_dir, cpu.between(1, steps + 1)[1])))
    return json.loads(use_file.read_text()) if use_file.exists() else {}


def cores_at_work(run_dir: Path, used: dict[str, float]) -> dict[str, float]:
    """Of a worker and of the learner, while each was at work. Args: used: seconds of processor time by role."""
    facts = measured(run_dir)
    return {
        "worker": used.get("worker", 0.0) / max(1e-9, facts["all_busy_s"]),
        "learner": used.get("learner", 0.0) / max(1e-9, facts["all_trained_s"]),
    }


def name_of(cell: tuple[int, int]) -> str:
    return f"workers{cell[0]}_staleness{cell[1]}"


def measured(run_dir: Path) -> dict[str, float]:
    """What a run did between the steps that a plan speaks of: without its start, and without its end."""
    trace = read_trace(RunFolder(run_dir))
    config = RunFolder(run_dir).config()
    journal = read_journal_facts(RunFolder(run_dir).journal)
    assert journal is not None
    first = config.max_staleness + 1
    last = config.learner.steps - config.max_staleness - 2
    ends = {step.step: step.taken for step in trace.steps}
    window = np.array([ends[first], ends[last]])
    seconds = float(np.diff(window)[0])
    tokens = sum(step.tokens for step in trace.steps if first < step.step <= last)
    waits = sum(row["learner/wait_s"] for row in trace.rows if first < row["step"] <= last)
    busy = [worker.busy() for worker in journal.workers.values()]
    busy_s = sum(float(np.diff(spans.until(window))[0]) for spans in busy) / config.rollout.workers
    rows = [row for row in trace.rows if first < row["step"] <= last]
    after_first = np.array([ends[0], journal.end])
    return {
        "tokens_per_s": tokens / seconds,
        "learner_idle": waits / seconds,
        "worker_idle": 1 - busy_s / seconds,
        "staleness_mean": float(np.mean([row["staleness/mean_versions"] for row in rows])),
        "seconds": seconds,
        "steps": last - first,
        "all_busy_s": sum(float(np.diff(spans.until(after_first))[0]) for spans in busy),
        "all_trained_s": _inside(merged_steps(trace.steps), after_first),
    }


def merged_steps(steps: Any) -> Any:
    pairs = np.array([(step.cut, step.taken) for step in steps])
    return merged(pairs[:, 0], pairs[:, 1])


def _inside(spans: Any, window: Array) -> float:
    return float(np.diff(spans.until(window))[0])


def predicted(folder: Path, cell: tuple[int, int], cores: dict[str, float]) -> dict[str, Any]:
    """Of a run of as many steps as the measured one, between the same steps."""
    config = RunFolder(folder / name_of(cell)).config()
    assumed: dict[str, int | float] = {}
    if cores.get("worker") and cores.get("learner"):
        assumed = {"worker_cores": cores["worker"], "learner_cores": cores["learner"]}
    basis = make_basis(config, str(folder / name_of(FITTED)), assumed)
    last = config.learner.steps - config.max_staleness - 2
    outcome = Simulation(config, basis.costs, basis.workload()).run(last + 1, config.max_staleness + 1)
    figures = {
        name: getattr(outcome, name) for name in ("tokens_per_s", "learner_idle", "worker_idle", "staleness_mean")
    }
    return figures | {"costs": {name: getattr(basis.costs, name) for name in (*basis.fitted, *basis.stated)}}


def compare(folder: Path, cell: tuple[int, int], cores: dict[str, float]) -> tuple[dict[str, Any], list[Bar]]:
    was, said = measured(folder / name_of(cell)), predicted(folder, cell, cores)
    error = abs(said["tokens_per_s"] / was["tokens_per_s"] - 1)
    name = f"{cell[0]} workers, max_staleness {cell[1]}"
    bars = [Bar(f"{name}: error of throughput", error, 0.15, "at most")]
    for side in ("learner", "worker"):
        apart = abs(said[f"{side}_idle"] - was[f"{side}_idle"])
        bars.append(Bar(f"{name}: error of the {side}'s idle share, points", apart, 0.15, "at most"))
    return {"measured": was, "predicted": said}, bars


def many_workers() -> float:
    """Seconds from the command to its end, imports included."""
    words = ["--workers", str(MANY), "--staleness", "2", "--steps", "6", "--batch", str(MANY_BATCH), "--json"]
    settings = ["group_size=8", "rollout.max_sequences=64", "assume.cores=0", "assume.length_mean=60"]
    started = time.perf_counter()
    done = subprocess.run(
        [str(ECHELON), "plan", RECIPE, *settings, *words], cwd=ROOT, check=True, capture_output=True, timeout=1800
    )
    seconds = time.perf_counter() - started
    assert json.loads(done.stdout)["cells"][0]["steps"] > 0
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=Path, help="a folder for the runs, which stay there; what is there is used")
    parser.add_argument("--no-many", action="store_true", help="leave the 10,000 workers out")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.runs or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        cores = {cell: run_cell(cell, folder, args.steps) for cell in CELLS}
        for cell in CELLS:
            figures[name_of(cell)], new = compare(folder, cell, cores[ALONE])
            bars += new
        figures["cores"] = {name_of(cell): used for cell, used in cores.items()}
    if not args.no_many:
        figures["many_workers_s"] = many_workers()
        bars.append(Bar(f"seconds to simulate {MANY} workers", figures["many_workers_s"], MANY_LIMIT_S, "at most"))
    question = "Does a plan foretell what a run then does?"
    write_result(args.json, question=question, figures=figures, peers={}, bars=bars, device=hardware())


if __name__ == "__main__":
    sys.exit(main())
