"""One run from its first process to its last: start, watch, restart what may be restarted, stop all, say why."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from databus.messages import Status, WorkerStatus
from echelon.cli import OK
from echelon.failures import RunFailed, first_cause, names
from echelon.files import RowFollower
from echelon.interrupts import Interrupts
from echelon.launch.base import Launcher, RunningRole, Site
from echelon.launch.modules import BROKER, LEARNER, PREPARE
from echelon.observer import Observer
from echelon.processes import wait_all
from echelon.progress import Progress
from echelon.replacements import MAX_RESTARTS, Replacements
from echelon.roster import Roster
from echelon.view import View
from echelon.wandb_sink import WandbSink
from echelon.watchdog import Watchdog

logger = logging.getLogger(__name__)

TICK_S = 0.1
BROKER_START_S = 60.0
SETTLE_S = 1.5
NOTE_WAIT_S = 10.0
GRACE_S = 10.0
END_S = 60.0
ENGINE_NAMES = {"vllm": "vLLM", "small": "the small engine"}


class Supervisor:
    """Runs the roles of one run folder; everything happens in the thread that calls `run`."""

    def __init__(
        self,
        site: Site,
        launcher: Launcher,
        progress: Progress,
        view: View,
        wandb: WandbSink,
    ) -> None:
        self._config, self._folder = site.config, site.folder
        self._progress = progress
        self._view = view
        self._wandb = wandb
        self._roster = Roster(site, launcher)
        self._needed_workers = launcher.needed_workers(site.config)
        self._interrupts = Interrupts(at_once=self._roster.kill)
        self._observer: Observer | None = None
        self._follower = RowFollower(site.folder.metrics_file)
        self._ready: set[str] = set()
        self._progress_at = self._status_at = time.monotonic()
        turns = site.folder.turns_of(site.config)
        self._watchdog = Watchdog(self._roster, site.folder.log_file("watchdog"), turns)
        self._replacements = Replacements(site.config.rollout.drain_s + GRACE_S)
        self._refusal = ""
        self._noted_waits: set[str] = set()

    def run(self) -> int:
        """Returns: 0 when the run has finished. Raises: RunFailed; Interrupted. No process is left either way."""
        with self._interrupts.handled():
            self._view.start()
            try:
                self._start()
                self._watch()
            except BaseException:
                with suppress(OSError):  # perhaps nobody reads our output any more
                    self._enter("stopping")
                raise
            finally:
                self._stop()
        self._view.summary(self._progress)
        return OK

    # ------------------------------------------------------------ start

    def _start(self) -> None:
        self._enter("checking model and data")
        prepare = self._roster.start_prepare()
        # They import what they need meanwhile, and wait for the broker.
        self._roster.start_learner()
        for index in range(self._config.rollout.workers + self._config.rollout.spares):
            self._roster.start_worker(index)
        self._wait(lambda: prepare.exit_code() is not None)
        if prepare.exit_code() != 0:
            raise first_cause([prepare], self._folder.logs)
        del self._roster.children[PREPARE]
        self._wandb.start()
        self._enter("starting the broker")
        self._roster.start_broker()
        self._wait_for_broker()

    def _wait_for_broker(self) -> None:
        deadline = time.monotonic() + BROKER_START_S
        while self._progress.status is None:
            self._tick()
            self._check_children()
            bus = self._folder.bus()
            if bus is not None and self._observer is None:
                self._observer = Observer(bus)
            if time.monotonic() > deadline:
                raise RunFailed(f"the broker did not answer within {BROKER_START_S:.0f} s (log: {self._log(BROKER)})")

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            self._tick()

    # ------------------------------------------------------------ watch

    def _watch(self) -> None:
        """Returns when learner and broker have ended well."""
        while not self._has_ended():
            self._tick()
            self._check_children()
            self._note_ready()
            self._check_deadlines()
        self._enter("finishing")
        for child in self._roster.children.values():
            if child.name not in self._ready and child.exit_code() is None:
                # The broker, which has ended, cannot tell it that the run is over; nor would every signal end it yet.
                child.kill()
        if not wait_all(self._roster.children.values(), END_S):
            late = [child.name for child in self._roster.children.values() if child.exit_code() is None]
            self._view.note(f"{names(late)} did not end with the run: stopped")

    def _tick(self) -> None:
        """What has to happen all the time. Raises: Interrupted."""
        time.sleep(TICK_S)
        self._interrupts.check()
        self._ask_broker()
        self._read_rows()
        self._view.update(self._progress)

    def _ask_broker(self) -> None:
        status = None if self._observer is None else self._observer.poll()
        if status is not None:
            self._progress.status, self._status_at = status, time.monotonic()
            self._replacements.take(status.drained, self._roster.children)
            if status.refusal not in ("", self._refusal):
                self._refusal = status.refusal
                self._view.note(status.refusal)

    def _read_rows(self) -> None:
        rows = self._follower.new_rows()
        if rows:
            self._progress_at = time.monotonic()
            self._progress.add(rows)
            self._view.rows(self._progress, rows)
            self._wandb.log(rows)
        for warning in self._wandb.warnings():
            self._view.note(warning)

    def _has_ended(self) -> bool:
        """The learner ends well only when the broker tells it to, which then has nothing left to do."""
        children = self._roster.children
        if BROKER not in children or LEARNER not in children:
            return False
        return children[LEARNER].exit_code() == 0 and children[BROKER].exit_code() is not None

    def _note_ready(self) -> None:
        """Who has said hello to the broker, and which phase follows from it."""
        status = self._progress.status
        if status is None:
            return
        present = {LEARNER} if self._learner_is_present(status) else set()
        present |= {worker.name for worker in status.workers if self._is_present(worker)}
        if present - self._ready:
            self._ready |= present
            self._progress_at = time.monotonic()
        self._progress_at = max(self._progress_at, self._status_at - status.last_progress_s)
        self._note_waits()
        missing = self._missing()
        if missing:
            self._enter(f"starting {names([self._title(name) for name in missing])}")
        else:
            self._needed_workers = 1  # it has begun: whoever is lost from now on may wait for another place
            self._enter("finishing" if status.phase in ("finishing", "finished") else "training")

    def _learner_is_present(self, status: Status) -> bool:
        return status.learner_ready and self._has_joined(LEARNER, status.learner_joined_s)

    def _is_present(self, worker: WorkerStatus) -> bool:
        return self._has_joined(worker.name, worker.joined_s)

    def _has_joined(self, name: str, joined_s: float) -> bool:
        """False for one that the broker still knows but that has died, and is being started again. When it was heard
        would not say: its last messages may have been read a moment after."""
        child = self._roster.children.get(name)
        return child is None or joined_s < self._status_at - child.started  # of that moment, as the broker's figure is

    def _missing(self) -> list[str]:
        """Roles that have been started and are not ready; whoever waits for a place is missing only where needed."""
        children = self._roster.children
        workers = len(self._ready & children.keys() - {LEARNER})
        missing = [name for name in children if name not in (*self._ready, BROKER)]
        return [
            name
            for name in missing
            if name == LEARNER or workers < self._needed_workers or not children[name].waits_for()
        ]

    def _note_waits(self) -> None:
        """Says once of each role that it has no place yet."""
        for child in self._roster.children.values():
            is_late = time.monotonic() - child.started > NOTE_WAIT_S and child.name not in self._noted_waits
            if is_late and (wish := child.waits_for()):
                self._view.note(f"{child.name} waits for a place: {wish}")
                self._noted_waits.add(child.name)

    def _title(self, name: str) -> str:
        engine = ENGINE_NAMES[self._config.rollout.engine]
        return "the learner" if name == LEARNER else f"{engine} ({name})"

    def _check_deadlines(self) -> None:
        limit = self._config.rollout.start_timeout_s
        missing = self._missing()
        late = [child for name in missing if time.monotonic() - (child := self._roster.children[name]).started > limit]
        for child in sorted(late, key=lambda child: not child.waits_for()):
            if wish := child.waits_for():
                raise RunFailed(f"{child.name} got no place within {limit:.0f} s: {wish}")
            self._report()
            raise RunFailed(f"{child.name} did not become ready within {limit:.0f} s (log: {child.log})")
        silent_s = time.monotonic() - self._progress_at
        if not missing and silent_s > self._config.watchdog_s:
            raise RunFailed(
                f"no progress for {silent_s:.0f} s after step {self._progress.steps_done} of {self._progress.steps} "
                f"(watchdog_s={self._config.watchdog_s:g}): {self._report()}"
            )

    def _report(self) -> str:
        return self._watchdog.report(self._progress.status, time.monotonic() - self._status_at)

    # ------------------------------------------------------------ processes that end

    def _check_children(self) -> None:
        """Restarts what died and may come back. Raises: RunFailed for everything else that should not have ended."""
        if trouble := self._roster.trouble():
            raise RunFailed(trouble)
        for child in list(self._roster.children.values()):
            if child.exit_code() is None or self._may_end(child):
                continue
            if child.killed_by() is None:
                time.sleep(SETTLE_S)  # others may be about to say what came first; a signal comes from nobody's failure
            self._ask_broker()
            if self._may_end(child):
                continue
            if self._may_restart(child):
                self._restart(child)
            elif self._may_go_without(child):
                self._view.note(f"{child.name} {self._why_gone(child)}: going on without it")
                del self._roster.children[child.name]
            else:
                raise first_cause(self._roster.children.values(), self._folder.logs)

    def _may_end(self, child: RunningRole) -> bool:
        """Once the broker has said that the run is over, all may leave in any order; who comes then is refused."""
        phase = "" if self._progress.status is None else self._progress.status.phase
        others = [self._roster.children.get(role) for role in (BROKER, LEARNER)]
        ended = phase == "finished" or any(other and other.exit_code() == 0 for other in others)
        if child.name == BROKER and self._has_ended():
            return True
        comes_too_late = ended and child.name not in (*self._ready, BROKER, LEARNER)
        return comes_too_late or (child.exit_code() == 0 and (ended or phase == "finishing"))

    def _may_restart(self, child: RunningRole) -> bool:
        may_return = self._is_worker_of_a_living_run(child) or self._goes_on_from_disk(child)
        return may_return and self._replacements.may_restart(child.name)

    def _goes_on_from_disk(self, child: RunningRole) -> bool:
        """Broker and learner go on from what they have written down, unless they ended for a reason of their own.

        Where one rank of the learner was killed, the others' reports are its consequences.
        """
        for_a_reason = child.exit_code() == 0 or self._folder.error_file(child.name).exists()
        has_begun = child.name == BROKER or (child.name == LEARNER and LEARNER in self._ready)
        return has_begun and (child.killed_by() is not None or not for_a_reason)

    def _may_go_without(self, child: RunningRole) -> bool:
        """Too slow too often; as long as another works, that is no reason to end the run."""
        others = [name for name in self._roster.children if name not in (BROKER, LEARNER, child.name)]
        return self._is_worker_of_a_living_run(child) and child.name in self._replacements.drained and bool(others)

    def _is_worker_of_a_living_run(self, child: RunningRole) -> bool:
        essential = [self._roster.children.get(role) for role in (BROKER, LEARNER)]
        return (
            child.name not in (BROKER, LEARNER)
            and child.name in self._ready
            and all(other is not None and other.exit_code() is None for other in essential)
        )

    def _restart(self, child: RunningRole) -> None:
        count = self._replacements.restarted(child.name)
        self._view.note(f"{child.name} {self._why_gone(child)}: starting it again ({count} of {MAX_RESTARTS})")
        self._ready.discard(child.name)
        self._noted_waits.discard(child.name)
        self._roster.restart(child)

    def _why_gone(self, child: RunningRole) -> str:
        reason = self._replacements.drained.get(child.name)
        return child.how_it_ended() if reason is None else f"was sent away ({reason})"

    # ------------------------------------------------------------ stop

    def _stop(self) -> None:
        """Also what a failed start left; the last rows count."""
        self._roster.stop(GRACE_S)
        if self._observer is not None:
            self._observer.close()
        self._read_rows()
        self._wandb.close()
        for warning in self._wandb.warnings():
            self._view.note(warning)
        self._view.stop()

    def _enter(self, phase: str) -> None:
        if self._progress.enter(phase):
            self._view.phase(self._progress)

    def _log(self, role: str) -> Path:
        return self._folder.log_file(role)
