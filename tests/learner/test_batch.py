import numpy as np
import pytest
from learner_script import encode_batch, make_groups

from databus.groups import Group
from databus.messages import Batch, BatchGroup, BatchRequest, HeartbeatReply, StepDone
from learner import bus as learner_bus
from learner.batch import BatchFeed, StalenessViolation, check_staleness, decode_batch
from learner.bus import BrokerLink


def one_group(versions: list[int], mask: list[int]) -> Group:
    num_tokens = len(versions)
    return Group(
        prompt_ids=np.array([1], np.int32),
        lengths=np.array([num_tokens], np.int32),
        token_ids=np.ones(num_tokens, np.int32),
        logprobs=np.zeros(num_tokens, np.float32),
        loss_mask=np.array(mask, np.uint8),
        version_values=np.array(versions, np.int32),
        version_lengths=np.ones(num_tokens, np.int32),
        rewards=np.zeros(1, np.float32),
        reward_parts=np.zeros((1, 0), np.float32),
        truncated=np.zeros(1, np.uint8),
    )


def test_decoding_restores_groups() -> None:
    groups = make_groups(5)
    for ours, theirs in zip(decode_batch(*encode_batch(5, groups)), groups, strict=True):
        for name, column in theirs.columns().items():
            assert np.array_equal(ours.columns()[name], column), name


@pytest.mark.parametrize(
    ("versions", "mask", "allowed"),
    [
        ([8, 9, 10], [1, 1, 1], True),
        ([7, 9, 10], [1, 1, 1], False),
        ([7, 9, 10], [0, 1, 1], True),  # masked tokens may be older
        ([9, 10, 11], [1, 1, 1], False),  # from the future
        ([9, 10, 11], [1, 1, 0], True),
        ([3, 3], [0, 0], True),
    ],
)
def test_staleness_bound(versions: list[int], mask: list[int], allowed: bool) -> None:
    groups = [one_group([10], [1]), one_group(versions, mask)]
    if allowed:
        check_staleness(groups, step=10, max_staleness=2)
    else:
        with pytest.raises(StalenessViolation, match=r"batch 10 has tokens with lags .*, allowed are 0 to 2"):
            check_staleness(groups, step=10, max_staleness=2)


class TardyBus:
    """Answers with other messages and an old batch first, and only when it has been asked twice."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)
        self._answers = [(HeartbeatReply(version=3), ()), encode_batch(3, make_groups(3))]
        if len(self.sent) == 2:
            self._answers.append(encode_batch(4, make_groups(4)))

    def recv(self, timeout: float) -> object:
        return self._answers.pop(0) if self._answers else None


def test_asks_again_and_passes_over_what_it_did_not_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_bus, "RESEND_S", 0.01)
    bus = TardyBus()
    feed = BatchFeed(BrokerLink(bus), rank=0, world_size=1, max_staleness=2, timeout_s=5.0)  # type: ignore[arg-type]
    groups = feed.groups(4)
    assert np.array_equal(groups[0].token_ids, make_groups(4)[0].token_ids)
    assert bus.sent == [BatchRequest(step=4), BatchRequest(step=4)]


def test_what_was_said_last_is_said_again_with_a_question_that_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_bus, "RESEND_S", 0.01)
    bus = TardyBus()
    link = BrokerLink(bus)  # type: ignore[arg-type]
    said = [StepDone(step=2, metrics={}), StepDone(step=3, metrics={})]
    for message in said:
        link.send(message)
    bus.sent.clear()
    with pytest.raises(RuntimeError, match="no Batch from the broker"):
        link.request(BatchRequest(step=4), Batch, lambda batch: batch.step == 5, timeout_s=0.05)
    assert bus.sent[:3] == [BatchRequest(step=4), said[1], BatchRequest(step=4)]


def test_malformed_batch_is_one_line() -> None:
    class WrongBus(TardyBus):
        def send(self, message: object) -> None:
            group = BatchGroup(group_id="g", columns=(), first_frame=0)
            self._answers = [(Batch(step=0, max_staleness=2, groups=(group,)), ())]

    feed = BatchFeed(BrokerLink(WrongBus()), rank=0, world_size=1, max_staleness=2, timeout_s=5.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="batch 0 cannot be read: missing or unknown columns"):
        feed.groups(0)
