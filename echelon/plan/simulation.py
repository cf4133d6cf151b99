"""A run, simulated: its own ledger, leases, staleness bound, batch cut and scheduling; everybody else is a clock."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from databus.ledger import SETTLED
from databus.messages import Lease
from databus.prompts import Prompt
from databus.run_state import RunFailed
from echelon.broker_settings import broker_settings, group_filters
from echelon.config import RunConfig
from echelon.plan.broker import Rows, SimulatedBroker
from echelon.plan.cores import SharedCores
from echelon.plan.costs import Costs
from echelon.plan.engine import EngineModel, EngineSpeed
from echelon.plan.events import Events
from echelon.plan.learner import SimulatedLearner, TrainedStep
from echelon.plan.worker import SimulatedWorker
from echelon.plan.workload import Drawn, Workload
from rollout.credit import credit_groups
from rollout.scheduling.scheduler import DifficultyScheduler


@dataclass(frozen=True)
class Outcome:
    """What a simulated run came to, in the steps that count.

    seconds: that they took. learner_idle, worker_idle: shares of them in which the learner waited for a batch, and in
    which a worker had no lease for training. staleness_mean, staleness_max: of trained tokens, in versions. dropped:
    stale, filtered and failed groups over all that were settled. groups_per_s: completed. failure: why the run would
    have ended before; "" where it would not, and the figures are then of all that was simulated.
    """

    steps: int
    seconds: float
    tokens_per_s: float
    steps_per_s: float
    learner_idle: float
    worker_idle: float
    staleness_mean: float
    staleness_max: float
    dropped: float
    groups_per_s: float
    failure: str = ""


class _Prompts:
    """A prompt is the number of its problem."""

    def __init__(self, scheduler: DifficultyScheduler) -> None:
        self._scheduler = scheduler

    def get(self, cursor: int) -> Prompt:
        return prompt_of(self._scheduler.problem_of(cursor))


def prompt_of(problem: int) -> Prompt:
    return Prompt("", (problem,), b"%d" % problem)


class Simulation:
    """One run of `config` where everything takes as long as `costs` say. `run` once."""

    def __init__(self, config: RunConfig, costs: Costs, workload: Workload) -> None:
        self._config = config
        self._costs = costs
        self._workload = workload
        self._events = Events()
        self._rows = Rows()
        scheduler = self._scheduler()
        self._broker = SimulatedBroker(
            self._events,
            broker_settings(config, run_id="plan", address=""),
            _Prompts(scheduler),
            [prompt_of(index % len(workload.prompt_tokens)) for index in range(self._num_evals())],
            filters=group_filters(config),
            scheduler=scheduler,
            sink=self._rows,
            bus_s=costs.bus_s,
        )
        cores = SharedCores(costs.cores)
        self._workers = [self._worker(f"worker-{index}", cores) for index in range(config.rollout.workers)]
        self._learner = SimulatedLearner(
            costs=costs,
            events=self._events,
            broker=self._broker,
            cores=cores,
            leased_s=lambda: sum(worker.leased_s for worker in self._workers),
        )

    @property
    def rows(self) -> Sequence[dict[str, float]]:
        """As `metrics.jsonl` would have them, as far as they are known."""
        return self._rows.rows

    @property
    def steps(self) -> Sequence[TrainedStep]:
        return self._learner.steps

    def run(self, steps: int, first: int) -> Outcome:
        """Up to the end of `steps` steps. Args: first: the step from whose end on everything counts."""
        self._learner.start()
        self._beat()
        failure = self._until(steps)
        return outcome_of(self._learner.steps, self.rows, first, self._config, failure)

    def _until(self, steps: int) -> str:
        state, patience_s = self._broker.state, self._config.watchdog_s
        try:
            while len(self._learner.steps) < steps:
                if not self._events.next():
                    return "nothing more would happen"
                if self._events.now - state.progress > patience_s:
                    return f"no progress for {patience_s:g} s (watchdog_s)"
        except RunFailed as failed:
            return str(failed)
        return ""

    def _beat(self) -> None:
        for worker in self._workers:
            worker.beat()
        self._events.after(self._config.bus.heartbeat_s, self._beat)

    def _scheduler(self) -> DifficultyScheduler:
        config, num_problems = self._config, len(self._workload.prompt_tokens)
        mixed = config.scheduling.mixing and config.data.shuffle
        return DifficultyScheduler(
            config.scheduling,
            self._workload.prompt_tokens,
            batch_groups=config.batch_groups,
            seed=config.seed,
            fixed_order=None if mixed else lambda cursor: cursor % num_problems,
        )

    def _worker(self, name: str, cores: SharedCores) -> SimulatedWorker:
        rollout, costs = self._config.rollout, self._costs
        speed = EngineSpeed(costs.step_s, costs.sequence_s, costs.tokens_per_step)
        return SimulatedWorker(
            name,
            EngineModel(speed, rollout.max_sequences, rollout.max_tokens),
            credit=credit_groups(rollout.max_sequences, self._config.group_size, rollout.ahead),
            max_sequences=rollout.max_sequences,
            costs=costs,
            events=self._events,
            broker=self._broker,
            cores=cores,
            draw=self._draw,
        )

    def _draw(self, lease: Lease) -> Drawn:
        return self._workload.draw(int(lease.problem), lease.group_size, lease.sampling.max_tokens)

    def _num_evals(self) -> int:
        return self._costs.eval_problems if self._config.eval.every else 0


def simulate(config: RunConfig, costs: Costs, workload: Workload, *, steps: int) -> Outcome:
    """The steady run: what the start and the end of one make of it is left out.

    Args: steps: to simulate. Until all versions within the bound are in use, and at least for one step, nothing counts.
    """
    first = min(config.max_staleness + 1, max(1, steps // 2))
    # Towards its last step a run leases less and less; that is simulated by nobody, and measured by nobody.
    learner = replace(config.learner, steps=steps + 2 * (config.max_staleness + 2))
    return Simulation(replace(config, learner=learner), costs, workload).run(steps, first)


def outcome_of(
    steps: Sequence[TrainedStep], rows: Sequence[dict[str, float]], first: int, config: RunConfig, failure: str
) -> Outcome:
    """Args: first: the step from whose end on everything counts."""
    if len(steps) < first + 2:
        return Outcome(len(steps), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, failure or "too few steps to tell")
    counted, seconds = steps[first + 1 :], steps[-1].ended_s - steps[first].ended_s
    told = [row for row in rows if row["step"] > first and "staleness/mean_versions" in row]
    leased_s = (steps[-1].leased_s - steps[first].leased_s) / config.rollout.workers
    settled = {state: _new(rows, f"ledger/{state}_groups", first) for state in SETTLED}
    dropped = sum(settled.values()) - settled["trained"]
    return Outcome(
        steps=len(counted),
        seconds=seconds,
        tokens_per_s=sum(step.tokens for step in counted) / seconds,
        steps_per_s=len(counted) / seconds,
        learner_idle=sum(step.wait_s for step in counted) / seconds,
        worker_idle=max(0.0, 1 - leased_s / seconds),
        staleness_mean=float(np.mean([row["staleness/mean_versions"] for row in told])) if told else 0.0,
        staleness_max=max((row["staleness/max_versions"] for row in told), default=0.0),
        dropped=dropped / max(1.0, sum(settled.values())),
        groups_per_s=sum(settled.values()) / seconds,
        failure=failure,
    )


def _new(rows: Sequence[dict[str, float]], name: str, first: int) -> float:
    """By how much a total has grown since the row of step `first`."""
    before = next((row[name] for row in rows if row["step"] == first), 0.0)
    return rows[-1].get(name, before) - before if rows else 0.0
