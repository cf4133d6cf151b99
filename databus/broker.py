"""The broker: the only shared state of a run. One thread, one socket, no torch.

startup ──▶ receive · answer · tick, until all steps are trained ──▶ tell everyone to stop, wait for goodbyes
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from databus.chronicle import Chronicle, Listener
from databus.codec import Frame, MalformedMessage
from databus.config import BrokerConfig
from databus.gate_desk import GateDesk
from databus.group_commit import GroupCommit
from databus.journal import Journal, JournalEntry
from databus.keys import ServerKeys
from databus.lease_desk import LeaseDesk
from databus.messages import (
    BatchRequest,
    Completed,
    Credits,
    Failed,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Holding,
    Leaving,
    Position,
    PositionRequest,
    Refused,
    Released,
    Role,
    Rows,
    Status,
    StatusRequest,
    StepDone,
    Stop,
    ToBroker,
    VersionApplied,
    VersionPublished,
    VersionRefused,
    Welcome,
)
from databus.outbox import Outbox
from databus.peers import Peer, may_send
from databus.prompts import GroupFilter, GroupRecorder, MetricsSink, Prompt, PromptSource
from databus.recovery import Recovery
from databus.result_desk import ResultDesk
from databus.retention import Retention
from databus.run_state import RunFailed, new_state
from databus.scheduling import Placement, Scheduler
from databus.staffing import Staffing
from databus.step_desk import StepDesk
from databus.transport import BrokerSocket, Received

logger = logging.getLogger(__name__)

TICK_S = 0.2
WRITING_TICK_S = 0.001
"""How soon what has become durable is said, where no message comes in meanwhile."""
MAX_MESSAGES_A_TICK = 256
GOODBYE_TIMEOUT_S = 60.0
STOP_AGAIN_S = 2.0
RETURN_S = 2.0
MAX_REASON = 500
ENDED = ("finished", "failed")


class Broker:
    """Leases prompts, takes scored groups, cuts batches under the staleness bound, knows who runs which version."""

    def __init__(
        self,
        config: BrokerConfig,
        prompts: PromptSource,
        evals: Sequence[Prompt],
        sink: MetricsSink,
        position: Position | None = None,
        filters: Sequence[GroupFilter] = (),
        scheduler: Scheduler | None = None,
        placement: Placement | None = None,
        recorder: GroupRecorder | None = None,
        keys: ServerKeys | None = None,
        journal: Journal | None = None,
        past: Iterable[JournalEntry] = (),
        first_row: int = 0,
        accuracies: Mapping[int, float] | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Binds the socket, and goes on where an earlier broker of the run has stopped.

        Args: keys: None for plain text. journal: None writes nothing down. past: what is in it already. first_row: of
            the steps whose rows the sink does not have. accuracies: of the versions whose evaluations it has. listener:
            told of what happens from here on, not of the past.

        Raises: ValueError, one line, where it cannot listen on `config.address`.
        """
        self._socket = BrokerSocket(config.address, config.bus.max_message_bytes, keys)
        self.address = self._socket.address
        self.refused = 0
        self._refusal_logged = -1.0
        self._next_tick = 0.0
        self._config = config
        self._sink = sink
        outbox = Outbox(self._socket)
        self._commit = GroupCommit(journal, outbox)
        self._state = new_state(
            config, prompts, evals, filters, outbox, position, Chronicle(listener), scheduler, placement, accuracies
        )
        self._leases = LeaseDesk(self._state)
        self._results = ResultDesk(self._state, self._leases, recorder)
        self._staffing = Staffing(self._state)
        self._gate = GateDesk(self._state)
        self._steps = StepDesk(self._state, sink, first_row)
        self._retention = Retention(self._state, self._commit, config.keep_journal)
        Recovery(self._state, self._results, self._steps, self._retention).fold(past)
        # Where an earlier broker had all but ended the run, peers are about to come back, and want to hear of it.
        came_back = self._state.ledger.next_cursor > 0 and position is None
        self._earliest_end = time.monotonic() + (2 * config.bus.heartbeat_s + RETURN_S if came_back else 0.0)
        self._state.chronicle.write_to(journal)
        self._state.chronicle.started(config)
        self._phase = "starting"
        self._error = ""

    def run(self) -> None:
        """Serve until the last step is trained and evaluated. Raises: RunFailed with the first cause."""
        stop = Stop(reason="all steps are done")
        try:
            while not (self._steps.finished() and self._commit.is_idle and time.monotonic() >= self._earliest_end):
                self._turn()
            self._phase = "finished"
        except BaseException as error:  # Ctrl-C as well: nobody may take it for a good end
            stop = Stop(reason=str(error) or "the broker was stopped", ok=False)
            self._phase, self._error = "failed", stop.reason
            raise
        finally:
            try:
                self._say_stop(stop)
            finally:
                self._socket.close()
                self._state.chronicle.ended(stop.ok, stop.reason)
                self._commit.close()

    # ------------------------------------------------------------ the loop

    def _turn(self) -> None:
        self._receive(WRITING_TICK_S if self._commit.is_busy else TICK_S)
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK_S / 10
            self._tick(now)
        self._leases.announce()
        self._leases.lease_all()
        self._steps.cut()
        self._gate.check()
        self._commit.turn()
        self._update_phase()

    def _tick(self, now: float) -> None:
        """What has a deadline; looking at it every turn would cost more than most turns."""
        for peer in self._state.peers.silent(now):
            self._lost(peer, f"not heard for {now - peer.heard:.1f} s")
        self._staffing.tick(now)
        self._leases.tick(now)
        self._steps.tick(now)

    def _receive(self, timeout_s: float) -> None:
        """Take what has arrived, up to a limit; a ROUTER reads its peers in turn, so that none is passed over."""
        for _ in range(MAX_MESSAGES_A_TICK):
            received = self._socket.receive(timeout_s)
            if received is None:
                return
            self._take(received)
            timeout_s = 0

    def _take(self, received: Received) -> None:
        """One message in; whatever is wrong with it is the sender's problem, not the run's."""
        name, message, frames, route, key_role = received
        try:
            if isinstance(message, MalformedMessage):
                raise message
            if isinstance(message, Hello):
                self._hello(name, message, route, key_role)
                return
            peer = self._state.peers.get(name)
            if peer is None or peer.route != route or key_role not in (None, peer.role):
                reason = "say hello first: the broker does not know you, or has given you up for dead"
                self._refuse(route, reason, unknown=True)
                return
            peer.heard = time.monotonic()
            if not may_send(peer.role, message):
                raise MalformedMessage(f"a {peer.role} may not send {type(message).__name__}")
            self._dispatch(peer, message, frames)
        except MalformedMessage as error:
            self._refuse(route, str(error))
            self._log_refusal(name, str(error))

    def _dispatch(self, peer: Peer, message: ToBroker, frames: Sequence[Frame]) -> None:
        match message:
            case Heartbeat():
                peer.take_heartbeat(message, time.monotonic())
                self._socket.send(peer.name, HeartbeatReply(version=self._state.newest or 0))
            case Goodbye(reason=reason):
                self._lost(peer, f"left: {reason}" if reason else "left")
            case Credits(total=total):
                peer.credits = max(peer.credits, total)
            case Holding():
                self._leases.holding(peer, message)
            case Completed():
                self._results.completed(peer, message, frames)
            case Failed():
                self._results.failed(peer, message)
            case Released():
                self._leases.released(peer, message)
            case Leaving():
                self._staffing.leaving(peer, message)
            case VersionApplied():
                self._leases.applied(peer, message)
                self._gate.applied(message)
            case VersionRefused():
                self._gate.refused(peer, message)
            case BatchRequest():
                self._steps.requested(peer, message)
            case StepDone():
                self._steps.step_done(message)
            case VersionPublished():
                self._steps.published(message)
            case PositionRequest(step=step, oldest_checkpoint=oldest):
                self._retention.save(step)
                self._steps.position(peer, step, self._retention.position(step))
                self._retention.drop_before(min(oldest, self._steps.rows_written))
            case StatusRequest(rows_from=first):
                self._socket.send(peer.name, self._status())
                rows = self._sink.rows_from(first) if first >= 0 else ()
                if rows:
                    self._socket.send(peer.name, Rows(first=first, rows=tuple(rows)))

    # ------------------------------------------------------------ peers

    def _hello(self, sender: str, hello: Hello, route: bytes, key_role: Role | None) -> None:
        known = self._state.peers.get(sender)
        objection = self._objection(sender, hello, key_role)
        if objection:
            self._refuse(route, objection)
            if known is None:
                self._socket.forget(sender)
            return
        if known is not None and known.route == route and known.hello.joining < hello.joining:
            known.rejoin(hello, time.monotonic())
        elif known is None or known.route != route or known.hello != hello:
            if known is not None:
                self._lost(known, "was replaced")
            self._staffing.joined(self._state.peers.add(hello, route))
            if hello.role == "learner":
                self._steps.learner_joined(hello)
            self._socket.seat(sender, route)
            logger.info("%s joined: %s, pid %d on %s", sender, hello.role, hello.pid, hello.host)
            self._state.touch()
        welcome = Welcome(
            run_id=self._config.run_id,
            heartbeat_s=self._config.bus.heartbeat_s,
            peer_timeout_s=self._config.bus.peer_timeout_s,
            config_json=self._config.config_json,
            run_dir=self._config.run_dir,
            reconnect_s=self._config.bus.reconnect_s,
        )
        self._socket.send(sender, welcome)

    def _objection(self, sender: str, hello: Hello, key_role: Role | None) -> str:
        if key_role not in (None, hello.role):
            return f"its key is of role {key_role}, and it calls itself {hello.role}"
        if self._phase in ENDED:
            return f"the run is over: {self._error or 'all steps are done'}"
        return self._state.peers.objection(sender, hello, self._config.run_id, self._state.newest_known)

    def _refuse(self, route: bytes, reason: str, unknown: bool = False) -> None:
        """What is refused may be long and hostile, and so may what is said of it."""
        self.refused += 1
        self._socket.answer(route, Refused(reason=reason[:MAX_REASON], unknown=unknown))

    def _log_refusal(self, name: str, reason: str) -> None:
        """One a second at most: nobody may fill the log."""
        now = time.monotonic()
        if now - self._refusal_logged >= 1.0:
            self._refusal_logged = now
            logger.warning("message of %r refused, %d by now: %s", name[:MAX_REASON], self.refused, reason[:MAX_REASON])

    def _lost(self, peer: Peer, why: str) -> None:
        """A worker's leases go to others; a learner may come back, and rollouts go on as far as the bound allows."""
        self._state.peers.remove(peer.name)
        self._socket.forget(peer.name)
        if peer.role == "worker":
            self._leases.worker_gone(peer)
        if peer.role != "observer":
            logger.info("%s %s", peer.name, why)
        if peer.role == "learner":
            self._state.requested = None

    # ------------------------------------------------------------ the run as a whole

    def _update_phase(self) -> None:
        state = self._state
        if self._phase == "starting" and state.newest is not None and state.peers.workers():
            self._phase = "running"
            state.metrics.start()
        if self._phase == "running" and state.step >= self._config.steps:
            self._phase = "finishing"

    def _status(self) -> Status:
        state, now = self._state, time.monotonic()
        learner = state.peers.learner
        return Status(
            phase=self._phase,
            step=state.step,
            steps=self._config.steps,
            version=state.newest or 0,
            learner_ready=learner is not None and state.newest is not None,
            workers=state.peers.worker_statuses(state.held_by_worker(), now),
            running_groups=state.ledger.running,
            queued_groups=len(state.queue),
            counts=state.ledger.counts(),
            last_progress_s=now - state.progress,
            error=self._error,
            drained=self._staffing.drained,
            training_s=0.0 if state.batch is None else now - state.batch_cut,
            requested=state.requested is not None and state.batch is None,
            learner_silent_s=0.0 if learner is None else now - learner.heard,
            learner_joined_s=0.0 if learner is None else now - learner.joined,
            disk_full=self._commit.disk_full,
            refusal=state.refusal,
            batch_groups=self._config.batch_groups,
            oldest_lease_s=state.leases.oldest_s(now),
            published=state.published,
        )

    def _say_stop(self, stop: Stop) -> None:
        """Tell everyone, then answer last questions until they have left: a checkpoint may want a position."""
        now = time.monotonic()
        deadline, say_at = now + (GOODBYE_TIMEOUT_S if stop.ok else 1.0), now
        while True:
            now = time.monotonic()
            if now >= say_at:  # again and again: it may be lost on the way
                say_at = now + STOP_AGAIN_S
                for peer in self._state.peers:
                    self._socket.send(peer.name, stop)
            if now >= deadline or all(peer.role == "observer" for peer in self._state.peers):
                return
            with suppress(RunFailed):  # one cause is enough
                self._receive(TICK_S)
            self._commit.turn()
            for peer in self._state.peers.silent(time.monotonic()):
                self._lost(peer, "left without a word")
