import time

from scripted import make_group

from databus.evaluation import Evaluations


def evaluations(**more: dict[int, float]) -> Evaluations:
    return Evaluations(num_problems=2, every=2, last_version=5, threshold=1.0, timeout_s=60.0, **more)


def test_accuracies_are_known_when_an_evaluation_is_over() -> None:
    ours = evaluations()
    for version in range(5):
        ours.published(version)
    assert ours.accuracies() == {0: None, 2: None, 4: None}
    current = ours.current
    assert current is not None
    for reward in (1.0, 0.0):
        group_id, _ = current.lease("w0")
        current.complete(group_id, make_group((1, 2), [[0]], [reward]))
    assert ours.tick(time.monotonic()) is current
    assert ours.accuracies() == {0: 0.5, 2: None, 4: None}
    ours.take_result(0)
    assert ours.accuracies()[0] == 0.5, "also once its row is written"
    assert ours.tick(time.monotonic() + 61.0) is not None
    assert ours.accuracies() == {0: 0.5, 4: None}, "abandoned: it will not be known"


def test_a_broker_that_came_back_knows_the_earlier_ones() -> None:
    ours = evaluations(accuracies={0: 0.25})
    ours.published(2)
    assert ours.accuracies() == {0: 0.25, 2: None}
