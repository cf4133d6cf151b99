from dataclasses import replace

import numpy as np
import pytest

from databus.groups import Group, run_lengths
from rollout.config import DropSolved, LearningProgress, SchedulingConfig
from rollout.scheduling.filters import ZeroVarianceFilter
from rollout.scheduling.scheduler import DifficultyScheduler

NUM, BATCH, SIZE = 40, 8, 4
LENGTHS = np.random.default_rng(5).integers(10, 200, NUM)
CONFIGS = [
    SchedulingConfig(),
    SchedulingConfig(curriculum=DropSolved(threshold=0.6, retry_epochs=1)),
    SchedulingConfig(curriculum=LearningProgress(round_problems=32)),
]


def make_scheduler(config: SchedulingConfig = CONFIGS[0], num: int = NUM, **more: object) -> DifficultyScheduler:
    return DifficultyScheduler(config, [9 + index % 7 for index in range(num)], batch_groups=BATCH, seed=1, **more)  # type: ignore[arg-type]


def make_group(length: int, passes: int = 2) -> Group:
    tokens = SIZE * length
    values, counts = run_lengths(np.zeros(tokens, np.int32))
    rewards = (np.arange(SIZE) < passes).astype(np.float32)
    return Group(
        prompt_ids=np.ones(3, np.int32),
        lengths=np.full(SIZE, length, np.int32),
        token_ids=np.ones(tokens, np.int32),
        logprobs=np.zeros(tokens, np.float32),
        loss_mask=np.ones(tokens, np.uint8),
        version_values=values,
        version_lengths=counts,
        rewards=rewards,
        reward_parts=rewards[:, None],
        truncated=np.zeros(SIZE, np.uint8),
    )


def play(scheduler: DifficultyScheduler, steps: range, late: int = 3) -> list[list[int]]:
    """Steps in which every cursor is dispatched, comes in and is trained, but `late` are always out ahead."""
    batches = []
    for step in steps:
        cursors = range(step * BATCH, (step + 1) * BATCH + late)
        problems = [scheduler.problem_of(cursor) for cursor in cursors]
        for cursor in cursors:
            scheduler.predicted_tokens(cursor)
        for cursor, problem in list(zip(cursors, problems, strict=True))[:BATCH]:
            scheduler.completed(cursor, make_group(int(LENGTHS[problem]), passes=problem % (SIZE + 1)))
        scheduler.stepped(list(cursors[:BATCH]), set(cursors[BATCH:]))
        batches.append(problems)
    return batches


@pytest.mark.parametrize("config", CONFIGS)
def test_resumed_is_uninterrupted(config: SchedulingConfig) -> None:
    uninterrupted = make_scheduler(config)
    play(uninterrupted, range(11))
    saved = uninterrupted.save()
    resumed = make_scheduler(config)
    resumed.load(saved)
    assert play(resumed, range(11, 30)) == play(uninterrupted, range(11, 30))


def test_every_problem_once_an_epoch_whatever_comes_in() -> None:
    batches = play(make_scheduler(), range(15), late=0)
    drawn = [problem for batch in batches for problem in batch]
    for epoch in range(3):
        assert sorted(drawn[epoch * NUM : (epoch + 1) * NUM]) == list(range(NUM))


def test_a_cursor_keeps_its_problem_until_it_is_done_with() -> None:
    scheduler = make_scheduler()
    before = [scheduler.problem_of(cursor) for cursor in range(20)]
    scheduler.stepped(list(range(8)), set(range(8, 20)))
    assert [scheduler.problem_of(cursor) for cursor in range(8, 20)] == before[8:]
    again = make_scheduler()
    again.load(scheduler.save())
    assert [again.problem_of(cursor) for cursor in range(8, 20)] == before[8:]


def test_lengths_are_learnt_and_batches_begin_with_the_longest() -> None:
    scheduler = make_scheduler()
    play(scheduler, range(5), late=0)
    for step in range(5, 10):
        cursors = range(step * BATCH, (step + 1) * BATCH)
        predicted = [scheduler.predicted_tokens(cursor) for cursor in cursors]
        actual = [int(LENGTHS[scheduler.problem_of(cursor)]) for cursor in cursors]
        assert predicted == sorted(predicted, reverse=True)
        np.testing.assert_allclose(predicted, actual, rtol=0.35)


def test_memory_is_bounded_by_what_is_open() -> None:
    scheduler = make_scheduler()
    play(scheduler, range(50))
    assert len(scheduler._assigned) == len(scheduler._open) == 3


def test_metrics_of_prediction() -> None:
    scheduler = make_scheduler(num=2)
    assert scheduler.predicted_tokens(0) == 0
    scheduler.completed(0, make_group(100))
    row = scheduler.stepped([0], set())
    assert "difficulty/length_error_ratio" not in row, "nothing was predicted"
    scheduler.problem_of(1)
    scheduler.predicted_tokens(1)
    scheduler.completed(1, make_group(50))
    row = scheduler.stepped([1], set())
    assert row["difficulty/length_predicted"] == pytest.approx(100)
    assert row["difficulty/length_actual"] == 50
    assert row["difficulty/length_error_ratio"] == pytest.approx(1.0)
    assert row["difficulty/length_bias_ratio"] == pytest.approx(1.0)


def test_what_was_dropped_raises_the_alarm(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make_scheduler()
    for step in range(6):
        cursors = range(step * BATCH, (step + 1) * BATCH)
        for cursor in cursors:
            scheduler.problem_of(cursor)
            scheduler.predicted_tokens(cursor)
            scheduler.completed(cursor, make_group(20 + cursor % 5 if cursor % 2 else 200 + cursor % 5))
        row = scheduler.stepped([cursor for cursor in cursors if cursor % 2], set())
    assert row["difficulty/selection_alarm"] == 1
    assert row["difficulty/length_trained"] < 0.3 * row["difficulty/length_dispatched"]
    assert row["difficulty/pass_rate_trained"] == row["difficulty/pass_rate_dispatched"] == 0.5
    assert len([message for message in caplog.messages if message.startswith("selection bias")]) == 1


def test_no_alarm_where_all_is_trained() -> None:
    scheduler = make_scheduler()
    play(scheduler, range(20))
    row = scheduler.stepped(range(20 * BATCH, 20 * BATCH + 3), set())
    assert row["difficulty/selection_alarm"] == 0
    shares = [row[f"difficulty/{name}_trained_share"] for name in ("short", "medium", "long")]
    assert sum(shares) == pytest.approx(1)
    assert shares == [row[f"difficulty/{name}_dispatched_share"] for name in ("short", "medium", "long")]


def test_a_fixed_order_is_kept() -> None:
    scheduler = make_scheduler(fixed_order=lambda cursor: (cursor * 3) % NUM)
    assert [scheduler.problem_of(cursor) for cursor in range(5)] == [0, 3, 6, 9, 12]
    again = make_scheduler(fixed_order=lambda cursor: (cursor * 3) % NUM)
    again.load(scheduler.save())
    assert again.problem_of(1000) == 0


def test_state_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^the scheduling state of the checkpoint cannot be read"):
        make_scheduler().load(b"nonsense")
    with pytest.raises(ValueError, match=r"difficulty of 40 problems, data\.train has 41"):
        make_scheduler(num=41).load(make_scheduler().save())
    make_scheduler().load(b"")  # of a version that had none


def test_one_problem() -> None:
    scheduler = make_scheduler(num=1)
    assert [scheduler.problem_of(cursor) for cursor in range(20)] == [0] * 20
    scheduler.completed(3, make_group(0))
    assert scheduler.predicted_tokens(3) == 1


def test_groups_of_equal_rewards_are_dropped() -> None:
    keep = ZeroVarianceFilter().keep
    assert not keep(make_group(3, passes=0))
    assert not keep(make_group(3, passes=SIZE))
    assert keep(make_group(3, passes=1))
    assert keep(replace(make_group(3, passes=0), rewards=np.array([0, 0, 0, 0.1], np.float32)))
