"""The supervisor's end of a role on a Ray cluster: one actor, or for a learner of several nodes one on each."""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from echelon.errors import ErrorReport, message_of, write_error
from echelon.launch.base import Site
from echelon.launch.ray_head import RayHead
from echelon.launch.ray_messages import NodeFacts, RoleEnd, RoleNews, RoleOrder
from echelon.processes import LINE_LENGTH, POLL_S, RoleProcess

NEWS_EVERY_S = 0.5
PLACES_EVERY_S = 1.0
ANSWER_S = 5.0
OTHERS_S = 75.0
"""Ray 2.60 calls a node lost after 15 s where its machine refuses connections, about a minute where it is silent."""
KILLED = RoleEnd(code=-signal.SIGKILL, killed_by=signal.SIGKILL, words="was killed by SIGKILL")
NEVER_STARTED = RoleEnd(code=-signal.SIGTERM, killed_by=signal.SIGTERM, words="was not started")

MakeOrders = Callable[[Sequence[NodeFacts]], Sequence[RoleOrder]]


class Part:
    """One actor, of which one thing at a time is asked. end: how its role ended."""

    def __init__(self, actor: Any, site: Site) -> None:
        self.actor = actor
        self.end: RoleEnd | None = None
        self._log_bytes = 0
        self._next = 0.0
        self._place = actor.look_around.remote(str(site.folder.path), site.folder.record().run_id)
        self._news: Any = None

    def node(self) -> NodeFacts | None:
        """Where it is; None while it has no place. Raises: RayError."""
        return _answer(self._place)

    def news(self) -> bytes:
        """What its log has got, about twice a second. Raises: RayError."""
        if self._news is None and time.monotonic() >= self._next:
            self._news = self.actor.news.remote(self._log_bytes)
        news: RoleNews | None = None if self._news is None else _answer(self._news)
        if news is None:
            return b""
        self._news, self._next = None, time.monotonic() + (0 if news.log else NEWS_EVERY_S)
        self._log_bytes += len(news.log)
        self.end = news.end
        return news.log

    def forget_question(self) -> None:
        self._news, self._next = None, time.monotonic() + NEWS_EVERY_S


class RayRole:
    """A role as the supervisor sees any other. Only what has come by now is looked at: nothing here waits for Ray,
    besides `kill` and the watchdog's questions, for a few seconds."""

    def __init__(
        self,
        name: str,
        site: Site,
        head: RayHead,
        actors: Sequence[Any],
        make_orders: MakeOrders,
        wanted: Mapping[str, float],
        group: PlacementGroup | None = None,
    ) -> None:
        """Args: make_orders: what each actor is to run, once all have a place; raises ValueError where the places will
        not do. wanted: resources on each node. group: what the actors are placed by."""
        self.name = name
        self.log = site.folder.log_file(name)
        self.log.touch()
        self.started = time.monotonic()
        self.exited_at: float | None = None
        self._site = site
        self._head = head
        self._parts = [Part(actor, site) for actor in actors]
        self._make_orders = make_orders
        self._wanted = wanted
        self._group = group
        self._placed = self._connected = self._released = False
        self._end: RoleEnd | None = None
        self._places, self._places_at = self._wish(), 0.0
        self._failed_at = 0.0

    def exit_code(self) -> int | None:
        if self._end is None:
            self._advance()
        return None if self._end is None else self._end.code

    def killed_by(self) -> int | None:
        return None if self._end is None else self._end.killed_by

    def how_it_ended(self) -> str:
        return "runs" if self._end is None else self._end.words

    def waits_for(self) -> str:
        if self._placed or self._end is not None:
            return ""
        if time.monotonic() - self._places_at > PLACES_EVERY_S and self._head.answers():
            self._places, self._places_at = f"{self._wish()}; {places()}", time.monotonic()
        return self._places

    def terminate(self) -> None:
        if not self._placed:
            self._finish(NEVER_STARTED)
            return
        for part in self._parts if self._end is None else ():
            part.actor.terminate.remote()

    def kill(self) -> None:
        for part in self._parts if self._end is None and self._placed else ():
            part.actor.kill.remote()
        deadline = time.monotonic() + ANSWER_S
        while self._placed and self.exit_code() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._finish(KILLED)

    def look(self, module: str) -> list[RoleProcess]:
        return [process for found in self._ask("look", module) for process in found]

    def ask_for_stacks(self, module: str) -> None:
        self._ask("ask_for_stacks", module)

    def _ask(self, method: str, module: str) -> list[Any]:
        """What its actors answer in time."""
        if not self._placed or self._end is not None:
            return []
        answers = []
        for reference in [getattr(part.actor, method).remote(module) for part in self._parts]:
            with contextlib.suppress(RayError):
                answers.append(ray.get(reference, timeout=ANSWER_S))
        return answers

    def _advance(self) -> None:
        try:
            if not self._placed:
                self._start_where_placed()
            else:
                self._connect()
                self._listen()
        except ActorUnavailableError:  # for a moment, says Ray: its answer is lost, not the actor
            for part in self._parts:
                part.forget_question()
        except RayActorError as error:
            words = f"was lost with its node or its actor: {_one_line(error)}"
            self._finish(RoleEnd(code=-signal.SIGKILL, killed_by=signal.SIGKILL, words=words))
        except (RayError, ValueError) as error:
            self._fail(error)

    def _start_where_placed(self) -> None:
        nodes = [part.node() for part in self._parts]
        facts = [node for node in nodes if node is not None]
        if len(facts) < len(nodes):
            return
        for part, order in zip(self._parts, self._make_orders(facts), strict=True):
            part.actor.start.remote(order)
        self._placed, self.started = True, time.monotonic()

    def _connect(self) -> None:
        """Tells it where the broker is, which may start later than it does."""
        bus = None if self._connected else self._site.folder.bus()
        if bus is not None:
            for part in self._parts:
                part.actor.connect.remote(bus.address, bus.run_id)
            self._connected = True

    def _listen(self) -> None:
        for part in self._parts:
            if part.end is None and (said := part.news()):
                with self.log.open("ab") as log:
                    log.write(said)
        ends = [part.end for part in self._parts if part.end is not None]
        failed = [end for end in ends if end.code != 0]
        killed = [end for end in failed if end.killed_by is not None]
        if killed or len(ends) == len(self._parts) or (failed and self._has_waited_for_others()):
            self._finish((killed or failed or ends)[0])

    def _has_waited_for_others(self) -> bool:
        """Where a node is lost, the ranks elsewhere fail at once, and Ray says so later: that is what came first."""
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        return now - self._failed_at > OTHERS_S

    def _fail(self, error: Exception) -> None:
        """What Ray or a place will not do is said as the role's own failure."""
        kind = "user" if isinstance(error, ValueError) else "runtime"
        report = ErrorReport(time=time.time(), role=self.name, kind=kind, message=_one_line(error))
        write_error(self._site.folder.error_file(self.name), report)
        self._finish(RoleEnd(code=1, killed_by=None, words=f"failed: {_one_line(error)}"))

    def _finish(self, end: RoleEnd) -> None:
        """The first end stands. Its actors go, and what they hold of the cluster."""
        if self._end is None:
            self._end, self.exited_at = end, time.time()
            if end.report:
                error_file = self._site.folder.error_file(self.name)
                error_file.write_bytes(end.report)
        if not self._released:
            self._released = True
            self._release()

    def _release(self) -> None:
        closing = [part.actor.close.remote() for part in self._parts] if self._placed else []
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=ANSWER_S)
        if self._head.lost:  # the nodes end, and their actors with them, once they miss it as long as Ray lets them
            return
        for part in self._parts:
            ray.kill(part.actor)
        if self._group is not None:
            remove_placement_group(self._group)

    def _wish(self) -> str:
        where = f" on each of {len(self._parts)} nodes" if len(self._parts) > 1 else ""
        return f"it wants {_amounts(self._wanted)}{where}"


def places() -> str:
    """What the cluster has, and what is free of it."""
    there, free = ray.cluster_resources(), ray.available_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    counted = [f"{free.get(kind, 0):g} of {there[kind]:g} {kind}s" for kind in ("CPU", "GPU") if kind in there]
    return f"free are {' and '.join(counted) or 'no CPUs'} on {nodes} node{'s' if nodes > 1 else ''}"


def _amounts(wanted: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}{'s' if amount != 1 else ''}" for kind, amount in wanted.items() if amount)


def _answer(reference: Any) -> Any:
    """None before there is one. Raises: RayError."""
    ready, _ = ray.wait([reference], timeout=0)
    return ray.get(ready[0]) if ready else None


def _one_line(error: Exception) -> str:
    return message_of(error)[:LINE_LENGTH]
