"""What comes of leases: scored groups, and failures."""

import logging
from collections.abc import Sequence

from databus.batches import Waiting
from databus.codec import Frame, MalformedMessage
from databus.dropped import NO_LOSS, DroppedInARow
from databus.evaluation import is_evaluation
from databus.groups import Group, decode_group
from databus.history import problem_key
from databus.lease_desk import LeaseDesk
from databus.leases import Held
from databus.ledger import Entry
from databus.messages import Ack, Cancel, Completed, Failed
from databus.peers import Peer
from databus.prompts import GroupRecorder, Prompt
from databus.run_state import RunFailed, RunState

logger = logging.getLogger(__name__)


class ResultDesk:
    """Takes each group once, learns from it, and has it wait for a batch unless it is filtered."""

    def __init__(self, state: RunState, leases: LeaseDesk, recorder: GroupRecorder | None = None) -> None:
        self._state = state
        self._leases = leases
        self._recorder = recorder
        self._reward_failures = 0
        self._dropped = DroppedInARow(state.config.max_filtered, state.config.batch_groups)

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
        self._leases.serves(worker, int(group.version_values.max(initial=0)))
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
        if self._state.history is not None:
            self._state.history.add(problem_key(prompt.prompt_ids), entry.group_id, group)

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
            self._leases.lost(held)
            return
        self._state.leases.drop(entry.group_id)
        self._state.ledger.settle(entry, "failed")
        self._count_reward_failure(message.error)

    def _count_reward_failure(self, error: str) -> None:
        self._reward_failures += 1
        if self._reward_failures >= self._state.config.max_reward_failures:
            raise RunFailed(f"the reward failed for {self._reward_failures} groups in a row: {error}")


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
