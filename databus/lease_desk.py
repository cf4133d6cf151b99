"""The worker's side of the broker: leases out, results in."""

import heapq
import logging
from collections.abc import Sequence

from databus.batches import Waiting
from databus.codec import Frame, MalformedMessage
from databus.dropped import NO_LOSS, DroppedInARow
from databus.evaluation import is_evaluation
from databus.groups import Group, decode_group
from databus.history import CompletionHistory, encode_history, problem_key
from databus.leases import Held
from databus.ledger import Entry
from databus.messages import (
    Ack,
    Cancel,
    Column,
    Completed,
    Failed,
    Holding,
    Lease,
    Released,
    Sampling,
    VersionAnnounced,
    VersionApplied,
)
from databus.peers import Peer
from databus.prompts import GroupRecorder, Prompt
from databus.run_state import RunFailed, RunState
from databus.scheduling import Load

logger = logging.getLogger(__name__)

ANNOUNCE_AGAIN_S = 30.0
"""A worker that serves an older version for so long after an announcement may not have got it."""


class LeaseDesk:
    """Gives leases to workers and takes what comes of them. history: earlier completions; None where nobody drafts."""

    def __init__(self, state: RunState, recorder: GroupRecorder | None = None) -> None:
        self._state = state
        self._recorder = recorder
        history = state.config.history
        self.history = None if history is None else CompletionHistory(history)
        self._served, self._first_s = -1, 0.0  # the newest version that a worker serves, how long it took the first
        self._reward_failures = 0
        self._dropped = DroppedInARow(state.config.max_filtered, state.config.batch_groups)

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
        return 0 if self.history is None else problem_key(prompt.prompt_ids)

    def _past_of(self, key: int) -> tuple[tuple[Column, ...], list[Frame]]:
        """Earlier completions of a problem."""
        if self.history is None:
            return (), []
        return encode_history(self.history.of(key, self._state.newest or 0))

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

    # ------------------------------------------------------------ in

    def completed(self, worker: Peer, message: Completed, frames: Sequence[Frame]) -> None:
        """Take a scored group, once. Raises: MalformedMessage if it is not what was leased."""
        group = decode_group(message.columns, frames)
        if group.reward_parts.shape[1] != len(message.reward_names):
            raise MalformedMessage("reward_parts and reward_names differ in length")
        self.take(worker, message, frames, group)

    def take(self, worker: Peer, message: Completed, frames: Sequence[Frame], group: Group) -> None:
        """Take a scored group that has been decoded. Raises: MalformedMessage if it is not what was leased."""
        worker.received_tokens += group.num_tokens
        if is_evaluation(message.group_id):
            accepted = self._complete_evaluation(worker, message.group_id, group)
        else:
            accepted = self._complete_training(worker, message, frames, group)
        reason = "" if accepted else "not wanted any more: settled, or leased again and completed elsewhere"
        self._state.send(worker.name, Ack(group_id=message.group_id, accepted=accepted, reason=reason))

    def _complete_evaluation(self, worker: Peer, group_id: str, group: Group) -> bool:
        state = self._state
        current = state.evaluations.current
        if current is None or group_id not in current.leased:
            return False
        holder, index = current.leased[group_id]
        check_holder(worker, holder)
        check_against_lease(group, state.evals[index], 1, state.config.eval_max_tokens)
        current.complete(group_id, group)
        state.touch()
        return True

    def _complete_training(self, worker: Peer, message: Completed, frames: Sequence[Frame], group: Group) -> bool:
        state = self._state
        entry, held = state.ledger.get(message.group_id), state.leases.get(message.group_id)
        if entry is None or held is None or entry.state not in ("leased", "expired"):
            return False
        check_holder(worker, held.worker)
        check_against_lease(group, held.prompt, state.config.group_size, state.config.max_tokens)
        self._serves(worker, int(group.version_values.max(initial=0)))
        place = state.chronicle.completed(message, frames, worker.name)
        self._cancel_others(entry)
        state.leases.drop(entry.group_id)
        self._reward_failures = 0
        self.take_in(entry, held.prompt, group)
        if self._recorder is not None:
            self._recorder.record(entry.cursor, entry.group_id, group)
        state.touch()
        self._keep_or_settle(
            Waiting(entry, group, message.reward_names, held.prompt.prompt, message.columns, frames, place)
        )
        return True

    def take_in(self, entry: Entry, prompt: Prompt, group: Group) -> None:
        """Learn from a group, whatever becomes of it."""
        self._state.metrics.completed(group)
        if self._state.scheduler is not None:
            self._state.scheduler.completed(entry.cursor, group)
        if self.history is not None:
            self.history.add(self._key_of(prompt), entry.group_id, group)

    def _keep_or_settle(self, waiting: Waiting) -> None:
        state = self._state
        refusing = next((each for each in state.filters if not each.keep(waiting.group)), None)
        if refusing is not None:
            state.ledger.settle(waiting.entry, "filtered")
            self._dropped.add(waiting.group, f"by {type(refusing).__name__}")
        elif waiting.group.loss_versions is None:  # requeuing it would only give the like again
            logger.info("group %s has no token that bears loss", waiting.entry.group_id)
            state.chronicle.stale(waiting.entry, requeued=False)
            state.ledger.settle(waiting.entry, "stale")
            self._dropped.add(waiting.group, NO_LOSS)
        else:
            self._dropped.kept()
            state.queue.add(waiting)

    def _cancel_others(self, entry: Entry) -> None:
        """A late result came in: whoever works on another attempt may stop."""
        for other in self._state.ledger.complete(entry):
            held = self._state.leases.get(other.group_id)
            self._state.leases.drop(other.group_id)
            if held is not None:
                self._state.send(held.worker, Cancel(group_ids=(other.group_id,)))

    def failed(self, worker: Peer, message: Failed) -> None:
        """A group cannot be completed.

        Raises: RunFailed where the reward has failed too many times in a row; MalformedMessage for another's lease.
        """
        state, current = self._state, self._state.evaluations.current
        evaluated = current.leased.get(message.group_id) if current is not None else None
        held, entry = state.leases.get(message.group_id), state.ledger.get(message.group_id)
        holder = evaluated[0] if evaluated is not None else held.worker if held is not None else worker.name
        check_holder(worker, holder)
        state.send(worker.name, Ack(group_id=message.group_id, accepted=True))
        if current is not None and evaluated is not None:
            logger.warning("evaluation: %s failed: %s", message.cause, message.error)
            current.fail(message.group_id)
        elif held is not None and entry is not None and entry.state == "leased":
            logger.warning("group %s failed (%s): %s", message.group_id, message.cause, message.error)
            self._settle_failure(held, entry, message)

    def _settle_failure(self, held: Held, entry: Entry, message: Failed) -> None:
        if message.cause == "engine":
            self._lease_lost(held)
            return
        self._state.leases.drop(entry.group_id)
        self._state.ledger.settle(entry, "failed")
        self._count_reward_failure(message.error)

    def _count_reward_failure(self, error: str) -> None:
        self._reward_failures += 1
        if self._reward_failures >= self._state.config.max_reward_failures:
            raise RunFailed(f"the reward failed for {self._reward_failures} groups in a row: {error}")

    def released(self, worker: Peer, message: Released) -> None:
        current = self._state.evaluations.current
        if current is not None:
            current.take_back(worker.name, message.group_ids)
        for held in self._state.leases.of(worker.name):
            if held.group_id in message.group_ids:
                self._lease_lost(held)

    def worker_gone(self, worker: Peer) -> None:
        """It left or died: what it held is leased again."""
        current = self._state.evaluations.current
        if current is not None:
            current.take_back(worker.name)
        for held in self._state.leases.of(worker.name):
            self._lease_lost(held)

    def applied(self, worker: Peer, message: VersionApplied) -> None:
        """Raises: MalformedMessage for a version it was not told of."""
        if message.version > worker.version:
            self._serves(worker, message.version)
            self._state.metrics.applied(message)
            self._state.touch()

    def holding(self, worker: Peer, message: Holding) -> None:
        """What the worker says of itself, against what is written here. Raises: MalformedMessage as `applied`."""
        worker.credits = max(worker.credits, message.credits)
        self._serves(worker, message.version)
        now, held = self._state.clock(), set(message.group_ids)
        for lease in self._state.leases.sent_before(now - self._state.config.bus.peer_timeout_s / 2):
            if lease.worker == worker.name and lease.group_id not in held:
                logger.warning("%s does not have its lease of group %s", worker.name, lease.group_id)
                worker.leases_sent -= lease.sent >= worker.joined  # earlier ones cost no credit of this connection
                self._lease_lost(lease)

    def _serves(self, worker: Peer, version: int) -> None:
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
                self._lease_lost(held)
        for held in self._state.leases.overdue(now):
            logger.warning("the lease of group %s to %s has expired", held.group_id, held.worker)
            self._state.send(held.worker, Cancel(group_ids=(held.group_id,)))
            self._lease_lost(held)
        self._state.leases.forget_settled(lambda group_id: self._state.ledger.get(group_id) is not None)

    def _lease_lost(self, held: Held) -> None:
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


def check_holder(worker: Peer, holder: str) -> None:
    """Raises: MalformedMessage if the lease is another worker's."""
    if worker.name != holder:
        raise MalformedMessage(f"that group is leased to {holder}")


def check_against_lease(group: Group, prompt: Prompt, group_size: int, max_tokens: int) -> None:
    """Raises: MalformedMessage if the group is not an answer to that lease."""
    if group.size != group_size:
        raise MalformedMessage(f"{group.size} completions, {group_size} were leased")
    if tuple(group.prompt_ids.tolist()) != tuple(prompt.prompt_ids):
        raise MalformedMessage("the group has another prompt than its lease")
    longest = int(group.lengths.max())
    if longest > max_tokens:
        raise MalformedMessage(f"a completion of {longest} tokens, at most {max_tokens} were leased")
