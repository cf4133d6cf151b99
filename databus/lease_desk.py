"""Leases: to whom, of which version, and what becomes of those that are lost."""

import heapq
import logging
from collections.abc import Sequence

from databus.codec import Frame, MalformedMessage
from databus.history import encode_history, problem_key
from databus.leases import Held
from databus.messages import (
    Cancel,
    Column,
    Holding,
    Lease,
    Released,
    Sampling,
    VersionAnnounced,
    VersionApplied,
)
from databus.peers import Peer
from databus.prompts import Prompt
from databus.run_state import RunState
from databus.scheduling import Load

logger = logging.getLogger(__name__)

ANNOUNCE_AGAIN_S = 30.0
"""A worker that serves an older version for so long after an announcement may not have got it."""


class LeaseDesk:
    """Gives leases to workers, tells them of versions, and takes back what they will not complete."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._served, self._first_s = -1, 0.0  # the newest version that a worker serves, how long it took the first

    # ------------------------------------------------------------ out

    def announce(self) -> None:
        """Tell workers of the version they should serve: the newest, but none past an evaluation under way."""
        state = self._state
        if state.newest is None:
            return
        current = state.evaluations.current
        target = state.newest if current is None else min(state.newest, current.version)
        published = state.versions[target]
        for worker in state.peers.workers():
            if worker.version >= target and worker.is_settled:
                continue
            told = worker.version >= target or (
                worker.announced >= target and worker.announced_address == published.address
            )
            lost = not worker.is_settled and state.clock() - worker.announced_at > ANNOUNCE_AGAIN_S
            if not told or lost:
                message = VersionAnnounced(version=target, address=published.address, num_bytes=published.num_bytes)
                if state.send(worker.name, message):
                    if worker.announced_address != published.address:
                        worker.refused = -1  # by another learner: it is tried again
                    worker.announced = max(worker.announced, target)
                    worker.announced_at, worker.announced_address = state.clock(), published.address

    def lease_all(self) -> None:
        """Give every worker what it has credit for, one group at a time, each to whom `placement` chooses.

        A version opens the gate for many groups at once: those who serve it already leave the others their share.
        """
        everybody = self._state.peers.workers()
        if self._state.evaluations.current is not None:
            for worker in everybody:
                if worker.standing == "working":
                    self._lease_evaluation(worker)
        if not self._has_room():
            return
        free = [worker for worker in everybody if self._is_free(worker)]
        left = self._left_for_others(everybody) if free else 0
        may_begin = {version: self._may_begin(version, left) for version in {worker.version for worker in free}}
        workers = [worker for worker in free if may_begin[worker.version]]
        loads = [self._load(worker) for worker in workers]
        rank = self._state.placement.ranking(loads)
        queue = [(rank(load), index) for index, load in enumerate(loads)]
        heapq.heapify(queue)
        while queue:  # a lease changes the load of one worker; of the others, only whether they may have another
            _, index = queue[0]
            if self._is_free(workers[index]) and self._may_begin(workers[index].version, left):
                self._lease_training(workers[index])
                heapq.heapreplace(queue, (rank(self._load(workers[index])), index))
            else:
                heapq.heappop(queue)

    def _has_room(self) -> bool:
        """For anybody? Most turns find none, and need not ask every worker."""
        state = self._state
        return state.gate.capacity(state.newest_known, state.accepted, state.ledger.running) > 0

    def _load(self, worker: Peer) -> Load:
        return Load(
            predicted_tokens=self._state.leases.predicted_tokens(worker.name),
            reported_tokens=worker.beat.generated_tokens - worker.received_tokens,
            tokens_per_s=worker.tokens_per_s,
            free_groups=worker.credits - worker.leases_sent,
        )

    def _is_free(self, worker: Peer) -> bool:
        return worker.leases_sent < worker.credits and worker.standing == "working" and worker.is_settled

    def _left_for_others(self, workers: Sequence[Peer]) -> int:
        """Groups that are for workers which serve the newest version in a moment: of all that may run then, as large a
        share as theirs of all the room there is for groups."""
        state = self._state
        now = state.clock()
        coming = [worker for worker in workers if worker.is_coming(now, self._first_s)]
        if not coming:
            return 0
        running = state.ledger.running
        may_run = running + min(
            state.gate.capacity(state.newest_known, state.accepted, running),
            state.config.steps * state.config.batch_groups - state.accepted - running,
        )
        room = sum(self._room(worker) for worker in workers if worker.standing == "working")
        left = 0
        for worker in coming:
            share = may_run * self._room(worker) // max(1, room)
            left += max(0, share - state.leases.count(worker.name))
        return left

    def _room(self, worker: Peer) -> int:
        """For groups at a time."""
        return worker.credits - worker.leases_sent + self._state.leases.count(worker.name)

    def _may_begin(self, version: int, left: int) -> bool:
        """May a worker that serves `version` have one more group, and `left` remain for others?"""
        state = self._state
        accepted, running = state.accepted, state.ledger.running + left
        return (
            state.config.start_step <= version
            and accepted + running < state.config.steps * state.config.batch_groups
            and state.gate.capacity(version, accepted, running) > 0
        )

    def _lease_training(self, worker: Peer) -> None:
        state = self._state
        entry = state.ledger.lease()
        sampling = Sampling(max_tokens=state.config.max_tokens, temperature=state.config.temperature)
        if not state.leases.has_any(worker.name):  # what it has generated by now is not part of any group to come
            worker.received_tokens = worker.beat.generated_tokens
        held = state.add_lease(entry.group_id, entry.cursor, worker.name, state.clock())
        worker.leases_sent += 1
        predicted_tokens = held.predicted_tokens // state.config.group_size
        state.chronicle.leased(entry, worker.name, predicted_tokens)
        prompt = held.prompt
        key = self._key_of(prompt)
        columns, frames = self._past_of(key)
        lease = Lease(
            group_id=entry.group_id,
            cursor=entry.cursor,
            attempt=entry.attempt,
            purpose="train",
            prompt=prompt.prompt,
            prompt_ids=prompt.prompt_ids,
            problem=prompt.problem,
            group_size=state.config.group_size,
            sampling=sampling,
            lease_s=state.config.bus.lease_s,
            predicted_tokens=predicted_tokens,
            problem_key=key,
            history=columns,
        )
        state.send(worker.name, lease, frames)

    def _key_of(self, prompt: Prompt) -> int:
        """0 where nobody drafts."""
        return 0 if self._state.history is None else problem_key(prompt.prompt_ids)

    def _past_of(self, key: int) -> tuple[tuple[Column, ...], list[Frame]]:
        """Earlier completions of a problem."""
        if self._state.history is None:
            return (), []
        return encode_history(self._state.history.of(key, self._state.newest or 0))

    def _lease_evaluation(self, worker: Peer) -> None:
        state = self._state
        current = state.evaluations.current
        if current is None or worker.version != current.version or worker.announced > worker.version:
            return
        sampling = Sampling(max_tokens=state.config.eval_max_tokens, temperature=0.0)
        room = worker.hello.max_sequences - current.outstanding(worker.name)
        for _ in range(min(room, len(current.waiting))):
            group_id, index = current.lease(worker.name)
            prompt = state.evals[index]
            lease = Lease(
                group_id=group_id,
                cursor=index,
                attempt=0,
                purpose="eval",
                prompt=prompt.prompt,
                prompt_ids=prompt.prompt_ids,
                problem=prompt.problem,
                group_size=1,
                sampling=sampling,
                lease_s=state.config.bus.lease_s,
                problem_key=self._key_of(prompt),
            )
            state.send(worker.name, lease)

    # ------------------------------------------------------------ back

    def released(self, worker: Peer, message: Released) -> None:
        current = self._state.evaluations.current
        if current is not None:
            current.take_back(worker.name, message.group_ids)
        for held in self._state.leases.of(worker.name):
            if held.group_id in message.group_ids:
                self.lost(held)

    def worker_gone(self, worker: Peer) -> None:
        """It left or died: what it held is leased again."""
        current = self._state.evaluations.current
        if current is not None:
            current.take_back(worker.name)
        for held in self._state.leases.of(worker.name):
            self.lost(held)

    def applied(self, worker: Peer, message: VersionApplied) -> None:
        """Raises: MalformedMessage for a version it was not told of."""
        if message.version > worker.version:
            self.serves(worker, message.version)
            self._state.metrics.applied(message)
            self._state.touch()

    def holding(self, worker: Peer, message: Holding) -> None:
        """What the worker says of itself, against what is written here. Raises: MalformedMessage as `applied`."""
        worker.credits = max(worker.credits, message.credits)
        self.serves(worker, message.version)
        now, held = self._state.clock(), set(message.group_ids)
        for lease in self._state.leases.sent_before(now - self._state.config.bus.peer_timeout_s / 2):
            if lease.worker == worker.name and lease.group_id not in held:
                logger.warning("%s does not have its lease of group %s", worker.name, lease.group_id)
                worker.leases_sent -= lease.sent >= worker.joined  # earlier ones cost no credit of this connection
                self.lost(lease)

    def serves(self, worker: Peer, version: int) -> None:
        """Admission relies on what workers say here. Raises: MalformedMessage for a version it was not told of."""
        newest = self._state.newest_known
        if version > newest:
            raise MalformedMessage(f"version {version} is served, {newest} is the newest announced")
        worker.serves(version, self._state.clock())
        if version > self._served:
            self._served, self._first_s = version, worker.update_s

    def tick(self, now: float) -> None:
        """Take back what is overdue, and what workers hold who have not come back to a new broker."""
        for held in self._state.leases.sent_before(now - self._state.config.bus.peer_timeout_s):
            if self._state.peers.get(held.worker) is None:
                self.lost(held)
        for held in self._state.leases.overdue(now):
            logger.warning("the lease of group %s to %s has expired", held.group_id, held.worker)
            self._state.send(held.worker, Cancel(group_ids=(held.group_id,)))
            self.lost(held)
        self._state.leases.forget_settled(lambda group_id: self._state.ledger.get(group_id) is not None)

    def lost(self, held: Held) -> None:
        """Lease the cursor again, unless it has been tried often enough."""
        state = self._state
        entry = state.ledger.get(held.group_id)
        if entry is None or entry.state != "leased":
            state.leases.drop(held.group_id)
        elif entry.attempt + 1 >= state.config.bus.max_attempts:
            logger.warning("cursor %d failed: leased %d times, never completed", entry.cursor, entry.attempt + 1)
            state.leases.drop(held.group_id)
            state.ledger.settle(entry, "failed")
        else:
            state.leases.expire(held.group_id)
            state.ledger.expire(entry)
