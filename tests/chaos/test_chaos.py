"""Whole runs under faults: whatever happens, the run ends, and what it has trained is exactly what was asked for.

    pytest tests/chaos                  about three minutes
    pytest tests/chaos -m chaos_long    a thousand faults a run

Faults are drawn from a seed, which is printed: `CHAOS_SEED=… pytest …` draws the same ones again. When a process is hit
follows the clock, so a seed repeats the schedule of a run, not its every instant.
"""

import os
import random
import time
from collections.abc import Callable

import pytest
from proxy import Proxy, Rates
from stage import Stage, stage

from databus.config import BusConfig
from echelon.config import DataConfig, RunConfig, WandbConfig
from learner.config import LearnerConfig
from rollout.config import RolloutConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

BATCH_GROUPS = 4
END_S = 60.0
CRASH_POINTS = ("before_write", "after_write", "before_sync", "after_sync", "before_ack")


def chaos_config(steps: int, **changes: object) -> RunConfig:
    values = {
        "model": "none",
        "data": DataConfig(train="none"),
        "group_size": 2,
        "batch_groups": BATCH_GROUPS,
        "max_staleness": 2,
        "rollout": RolloutConfig(engine="small", max_sequences=8, context_tokens=64, max_tokens=12),
        "learner": LearnerConfig(steps=steps, checkpoint_every=5, keep_checkpoints=2),
        "bus": BusConfig(heartbeat_s=0.2, peer_timeout_s=2.0, lease_s=3.0, max_attempts=50),
        "wandb": WandbConfig(mode="disabled"),
    }
    return RunConfig(**values | changes)  # type: ignore[arg-type]


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED", random.randrange(2**32)))
    print(f"CHAOS_SEED={chosen}")  # noqa: T201  pytest shows it where a test fails
    return chosen


def check(scene: Stage, steps: int) -> None:
    """Each step once, with the same batch however often it was trained, as often as it was trained."""
    rows = [row for row in scene.rows() if "loss/policy" in row]
    assert [row["step"] for row in rows] == list(range(steps))
    assert rows[-1]["ledger/trained_groups"] == steps * BATCH_GROUPS
    history: dict[int, tuple[str, str]] = {}
    for step, batch, state in scene.trained():
        assert history.setdefault(step, (batch, state)) == (batch, state), f"step {step} was trained twice, differently"
    assert sorted(history) == list(range(steps))


def storm(scene: Stage, num_faults: int) -> None:
    """Kill or stop one role after another."""
    draw = scene.random
    for _ in range(num_faults):
        name = draw.choice(["broker", "learner", *(name for name in scene.roles if name.startswith("worker"))])
        if draw.random() < 0.5:
            scene.kill(name)
        else:
            scene.stop(name, draw.uniform(0.1, 3.0))
        scene.play(draw.uniform(0.1, 0.8))


def crash_points(draw: random.Random) -> Callable[[], str]:
    """The next start of the broker crashes there, the so-many-th time that it comes by."""
    points = [*CRASH_POINTS]
    draw.shuffle(points)

    def choose() -> str:
        points.append(points.pop(0))
        return f"{points[-1]}:{draw.randint(3, 30)}"

    return choose


def test_every_role_is_killed_and_stopped(seed: int) -> None:
    steps = 60
    with stage(chaos_config(steps), seed) as scene:
        scene.faults.hold.touch()
        scene.start()
        storm(scene, 40)
        scene.finish(END_S)
        check(scene, steps)
        assert sum(scene.injected.values()) == 40


def test_broker_crashes_at_every_point_of_its_journal(seed: int) -> None:
    steps = 60
    with stage(chaos_config(steps), seed) as scene:
        scene.crash_points = crash_points(scene.random)
        scene.faults.hold.touch()
        scene.start()
        wait_for(scene, lambda: scene.roles["broker"].starts > 3 * len(CRASH_POINTS), within_s=120.0)
        scene.finish(END_S)
        check(scene, steps)
        assert scene.injected["crash point or kill of broker"] >= 3 * len(CRASH_POINTS)


def test_messages_are_lost_doubled_delayed_and_reordered(seed: int) -> None:
    steps = 60
    with stage(chaos_config(steps), seed) as scene:
        listen = f"ipc://{scene.folder.path}/proxy.sock"
        scene.peer_address = listen
        proxy = Proxy(listen, f"ipc://{scene.folder.path}/bus.sock", seed, Rates(drop=0.01, double=0.05, delay=0.05))
        try:
            scene.faults.hold.touch()
            scene.start()
            wait_for(
                scene, lambda: scene.steps_done() >= 2
            )  # all are there, so that a cut is one of several connections
            for _ in range(5):
                scene.play(scene.random.uniform(1.0, 2.0))
                proxy.cut()
            scene.finish(END_S)
            check(scene, steps)
        finally:
            proxy.close()
        assert all(proxy.counts[fault] > 10 for fault in ("dropped", "doubled", "delayed", "cut")), proxy.counts


def test_disk_fills_up_and_clock_jumps(seed: int) -> None:
    steps = 60
    with stage(chaos_config(steps), seed) as scene:
        scene.faults.hold.touch()
        scene.start()
        wait_for(scene, lambda: scene.steps_done() >= 2)
        for _ in range(5):
            scene.jump_clock(scene.random.choice([-1e6, -3600.0, 3600.0, 1e6]))
            scene.fill_disk(1.0)
            done = scene.steps_done()
            scene.fill_disk(0.5)
            assert scene.steps_done() <= done + 1, "steps were taken although nothing could be written down"
            scene.play(1.0)
        scene.finish(END_S)
        check(scene, steps)


def everything(seed: int, steps: int, num_faults: int, end_s: float) -> int:
    """All faults at once, until there have been so many. Returns: how many there were."""
    with stage(chaos_config(steps), seed, workers=3) as scene:
        listen = f"ipc://{scene.folder.path}/proxy.sock"
        scene.peer_address = listen
        proxy = Proxy(listen, f"ipc://{scene.folder.path}/bus.sock", seed, Rates(0.003, 0.01, 0.01))
        scene.crash_points = crash_points(scene.random)
        try:
            scene.faults.hold.touch()
            scene.start()
            while _num_faults(scene, proxy) < num_faults:
                storm(scene, 3)
                scene.jump_clock(scene.random.uniform(-1e5, 1e5))
                if scene.random.random() < 0.3:
                    scene.fill_disk(scene.random.uniform(0.1, 1.0))
                if scene.random.random() < 0.3:
                    proxy.cut()
            scene.finish(end_s)
            check(scene, steps)
            print(f"{_num_faults(scene, proxy)} faults: {dict(scene.injected)} {dict(proxy.counts)}")  # noqa: T201
            return _num_faults(scene, proxy)
        finally:
            proxy.close()


def test_everything_at_once(seed: int) -> None:
    assert everything(seed, steps=60, num_faults=100, end_s=END_S) >= 100


@pytest.mark.chaos_long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("run", range(3))
def test_a_thousand_faults(seed: int, run: int) -> None:
    assert everything(seed + run, steps=500, num_faults=1000, end_s=300.0) >= 1000


def _num_faults(scene: Stage, proxy: Proxy) -> int:
    return sum(scene.injected.values()) + sum(proxy.counts[kind] for kind in ("dropped", "doubled", "delayed", "cut"))


def wait_for(scene: Stage, condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, scene.logs()
        scene.play(0.1)
