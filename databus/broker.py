"""The broker: the only shared state of a run. One thread, one socket, no torch.

startup ──▶ receive · answer · tick, until all steps are trained ──▶ tell everyone to stop, wait for goodbyes
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from databus.codec import Frame, MalformedMessage
from databus.config import BrokerConfig
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
    Leaving,
    Position,
    PositionRequest,
    Refused,
    Released,
    Role,
    Status,
    StatusRequest,
    StepDone,
    Stop,
    ToBroker,
    VersionApplied,
    VersionPublished,
    Welcome,
)
from databus.peers import Peer, may_send
from databus.prompts import GroupFilter, GroupRecorder, MetricsSink, Prompt, PromptSource
from databus.run_state import LearnerLost, RunFailed, new_state
from databus.scheduling import Placement, Scheduler
from databus.staffing import Staffing
from databus.step_desk import StepDesk
from databus.transport import BrokerSocket, Received

logger = logging.getLogger(__name__)

TICK_S = 0.2
MAX_MESSAGES_A_TICK = 256
GOODBYE_TIMEOUT_S = 60.0
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
    ) -> None:
        """Binds the socket. Args: keys: None for plain text.

        Raises: ValueError, one line, where it cannot listen on `config.address`.
        """
        self._socket = BrokerSocket(config.address, config.bus.max_message_bytes, keys)
        self.address = self._socket.address
        self.refused = 0
        self._config = config
        self._state = new_state(
            config, prompts, evals, filters, self._socket.send, position, scheduler=scheduler, placement=placement
        )
        self._leases = LeaseDesk(self._state, recorder)
        self._staffing = Staffing(self._state)
        self._steps = StepDesk(self._state, sink)
        self._phase = "starting"
        self._error = ""

    def run(self) -> None:
        """Serve until the last step is trained and evaluated. Raises: RunFailed with the first cause."""
        stop = Stop(reason="all steps are done")
        try:
            while not self._steps.finished():
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

    # ------------------------------------------------------------ the loop

    def _turn(self) -> None:
        self._receive(TICK_S)
        now = time.monotonic()
        for peer in self._state.peers.silent(now):
            self._lost(peer, f"not heard for {now - peer.heard:.1f} s")
        self._staffing.tick(now)
        self._leases.tick(now)
        self._steps.tick(now)
        self._leases.announce()
        self._leases.lease_all()
        self._steps.cut()
        self._update_phase()

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
                self._refuse(route, "say hello first: the broker does not know you, or has given you up for dead")
                return
            peer.heard = time.monotonic()
            if not may_send(peer.role, message):
                raise MalformedMessage(f"a {peer.role} may not send {type(message).__name__}")
            self._dispatch(peer, message, frames)
        except MalformedMessage as error:
            logger.warning("message of %r refused: %s", name, error)
            self._refuse(route, str(error))

    def _dispatch(self, peer: Peer, message: ToBroker, frames: Sequence[Frame]) -> None:
        match message:
            case Heartbeat():
                peer.take_heartbeat(message, time.monotonic())
                self._state.send(peer.name, HeartbeatReply(version=self._state.newest or 0))
            case Goodbye(reason=reason):
                self._lost(peer, f"left: {reason}" if reason else "left")
            case Credits(total=total):
                peer.credits = max(peer.credits, total)
            case Completed():
                self._leases.completed(peer, message, frames)
            case Failed():
                self._leases.failed(peer, message)
            case Released():
                self._leases.released(peer, message)
            case Leaving():
                self._staffing.leaving(peer, message)
            case VersionApplied():
                self._leases.applied(peer, message)
            case BatchRequest():
                self._steps.requested(peer, message)
            case StepDone():
                self._steps.step_done(message)
            case VersionPublished():
                self._steps.published(message)
            case PositionRequest():
                self._steps.position(peer, message)
            case StatusRequest():
                self._state.send(peer.name, self._status())

    # ------------------------------------------------------------ peers

    def _hello(self, sender: str, hello: Hello, route: bytes, key_role: Role | None) -> None:
        known = self._state.peers.get(sender)
        objection = self._objection(sender, hello, key_role)
        if objection:
            self._refuse(route, objection)
            if known is None:
                self._socket.forget(sender)
            return
        if known is None or known.route != route or known.hello != hello:
            if known is not None:
                self._lost(known, "was replaced")
            self._staffing.joined(self._state.peers.add(hello, route))
            self._socket.seat(sender, route)
            logger.info("%s joined: %s, pid %d on %s", sender, hello.role, hello.pid, hello.host)
            self._state.touch()
        welcome = Welcome(
            run_id=self._config.run_id,
            heartbeat_s=self._config.bus.heartbeat_s,
            peer_timeout_s=self._config.bus.peer_timeout_s,
            config_json=self._config.config_json,
            run_dir=self._config.run_dir,
        )
        self._state.send(sender, welcome)

    def _objection(self, sender: str, hello: Hello, key_role: Role | None) -> str:
        if key_role not in (None, hello.role):
            return f"its key is of role {key_role}, and it calls itself {hello.role}"
        if self._phase in ENDED:
            return f"the run is over: {self._error or 'all steps are done'}"
        newest = self._config.start_step if self._state.newest is None else self._state.newest
        return self._state.peers.objection(sender, hello, self._config.run_id, newest)

    def _refuse(self, route: bytes, reason: str) -> None:
        self.refused += 1
        self._socket.answer(route, Refused(reason=reason))

    def _lost(self, peer: Peer, why: str) -> None:
        """Raises: LearnerLost, unless its work is done."""
        self._state.peers.remove(peer.name)
        self._socket.forget(peer.name)
        if peer.role == "worker":
            self._leases.worker_gone(peer)
        if peer.role != "observer":
            logger.info("%s %s", peer.name, why)
        if peer.role == "learner" and self._phase not in ENDED:
            raise LearnerLost(f"the learner {why}")

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
        return Status(
            phase=self._phase,
            step=state.step,
            steps=self._config.steps,
            version=state.newest or 0,
            learner_ready=state.newest is not None,
            workers=state.peers.worker_statuses(state.held_by_worker(), now),
            running_groups=state.ledger.running,
            queued_groups=len(state.queue),
            counts=state.ledger.counts(),
            last_progress_s=now - state.progress,
            error=self._error,
            drained=self._staffing.drained,
            training_s=0.0 if state.batch is None else now - state.batch_cut,
            requested=state.requested is not None and state.batch is None,
        )

    def _say_stop(self, stop: Stop) -> None:
        """Tell everyone, then answer last questions until they have left: a checkpoint may want a position."""
        for peer in self._state.peers:
            self._state.send(peer.name, stop)
        deadline = time.monotonic() + (GOODBYE_TIMEOUT_S if stop.ok else 1.0)
        while time.monotonic() < deadline and any(peer.role != "observer" for peer in self._state.peers):
            with suppress(RunFailed):  # one cause is enough
                self._receive(TICK_S)
            for peer in self._state.peers.silent(time.monotonic()):
                self._lost(peer, "left without a word")
