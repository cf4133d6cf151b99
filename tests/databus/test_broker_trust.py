"""What the broker does not take on trust, and what a peer that misbehaves cannot do to the others."""

import pytest
from scripted import (
    RunningBroker,
    ScriptedLearner,
    ScriptedWorker,
    broker_config,
    connect,
    make_group,
    receive,
    receives_nothing,
    send_group,
)

from databus.client import BusClient
from databus.errors import BusRefused
from databus.messages import (
    Ack,
    Batch,
    BatchRequest,
    Credits,
    Failed,
    Hello,
    Lease,
    Refused,
    StepDone,
    Stop,
    VersionAnnounced,
    VersionApplied,
    Welcome,
)
from databus.prompts import Prompt
from databus.run_state import RunFailed


def test_second_worker_of_a_name_does_not_disturb_the_first(address: str) -> None:
    RunningBroker(broker_config(address))
    first = connect(address, "w", "worker", pid=1, host="elsewhere", max_sequences=4)
    first.send(Credits(total=1))
    lease = receive(first, Lease)
    with pytest.raises(BusRefused, match="'w' is taken by pid 1 on elsewhere"):
        BusClient(address, Hello(role="worker", name="w", pid=2, host="elsewhere")).connect(5.0)
    send_group(first, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    assert receive(first, Ack).accepted
    first.close("done")


def test_second_learner_does_not_disturb_the_first(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=1))
    learner = connect(address, "learner", "learner", pid=1, host="elsewhere")
    worker = ScriptedWorker(address)
    with pytest.raises(BusRefused, match="is taken"):
        BusClient(address, Hello(role="learner", name="learner", pid=2, host="elsewhere")).connect(5.0)
    learner.send(BatchRequest(step=0))
    assert receive(learner, Batch).step == 0
    learner.send(StepDone(step=0, metrics={}))
    assert receive(learner, Stop).ok
    learner.close("done")
    worker.join()
    running.join()
    assert running.failure is None


def test_old_connection_of_a_replaced_peer_is_told(address: str) -> None:
    RunningBroker(broker_config(address))
    old = connect(address, "w", "worker", max_sequences=4)
    old.send(Credits(total=1))
    lease = receive(old, Lease)
    new = connect(address, "w", "worker", max_sequences=4)  # of the same process, so it takes the name over
    new.send(Credits(total=1))
    assert receive(new, Lease).cursor == lease.cursor
    old.send(Credits(total=2))
    receive(old, Welcome)  # told that it is not known, it says hello again, and takes the name back
    for client in (old, new):
        client.close()


def test_claim_of_a_version_nobody_announced_is_refused(address: str) -> None:
    """Admission counts with it: one such claim would let the worker run far past the bound."""
    RunningBroker(broker_config(address, steps=100))
    worker = connect(address, "w", "worker", max_sequences=8)
    worker.send(VersionApplied(version=50))
    assert "version 50 is served, 0 is the newest announced" in receive(worker, Refused).reason
    worker.send(Credits(total=100))
    for _ in range(4):
        receive(worker, Lease)
    assert receives_nothing(worker, Lease)
    with pytest.raises(BusRefused, match="it serves version 7, the newest of this run is 0"):
        connect(address, "ahead", "worker", version=7)
    worker.close("done")


@pytest.mark.parametrize("failed", [False, True])
def test_result_of_another_workers_lease_is_refused(address: str, failed: bool) -> None:
    running = RunningBroker(broker_config(address))
    owner, other = (connect(address, name, "worker", max_sequences=4) for name in ("owner", "other"))
    owner.send(Credits(total=1))
    lease = receive(owner, Lease)
    if failed:
        other.send(Failed(group_id=lease.group_id, cause="reward", error="x"))
    else:
        send_group(other, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    assert "is leased to owner" in receive(other, Refused).reason
    send_group(owner, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    assert receive(owner, Ack).accepted
    assert running.broker.refused == 1
    for client in (owner, other):
        client.close("done")


def test_first_cause_survives_what_comes_in_while_stopping(address: str) -> None:
    running = RunningBroker(broker_config(address, batch_groups=4))
    worker = connect(address, "w", "worker", max_sequences=8)
    worker.send(Credits(total=8))
    for lease in [receive(worker, Lease) for _ in range(6)]:
        worker.send(Failed(group_id=lease.group_id, cause="reward", error="boom"))
    assert not receive(worker, Stop).ok
    running.join()
    assert str(running.failure) == "the reward failed for 3 groups in a row: boom"
    assert isinstance(running.failure, RunFailed)
    RunningBroker(broker_config(address))  # the address is free again
    worker.close()


def test_who_comes_after_the_end_is_told(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=1))
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    learner.step(0)
    receive(learner.client, Stop)
    with pytest.raises(BusRefused, match="the run is over: all steps are done"):
        connect(address, "late", "worker")
    learner.client.close("done")
    worker.join()
    running.join()
    assert running.failure is None


def test_ctrl_c_is_not_a_good_end(address: str) -> None:
    class Interrupting:
        def get(self, cursor: int) -> Prompt:
            raise KeyboardInterrupt

    running = RunningBroker(broker_config(address), prompts=Interrupting())
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    assert receive(worker, Stop) == Stop(reason="the broker was stopped", ok=False)
    worker.close("done")
    running.join()
    assert isinstance(running.failure, KeyboardInterrupt)


def test_no_lease_before_the_version_that_a_resumed_run_starts_from(address: str) -> None:
    RunningBroker(broker_config(address, start_step=1, steps=5, max_staleness=2))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    assert receives_nothing(worker, Lease)
    learner = ScriptedLearner(address, start_step=1)
    assert receive(worker, VersionAnnounced).version == 1
    worker.send(VersionApplied(version=1))
    assert receive(worker, Lease).cursor == 0
    worker.close("done")
    learner.client.close("done")
