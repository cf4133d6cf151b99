"""How long a version is put off: by events, never by seconds."""

import asyncio

import pytest

import rollout.delay
from rollout.config import UpdateConfig
from rollout.delay import Delay, Postponable

LONGEST = UpdateConfig(delay="longest", delay_s=60.0)


class Work:
    def __init__(self, max_staleness: int = 2) -> None:
        self.groups = {"long", "short"}
        self.full = True
        self.newest = 1
        self.postponable = Postponable(
            max_staleness=max_staleness, under_way=lambda: self.groups, is_full=lambda: self.full
        )

    async def put_off(self, config: UpdateConfig = LONGEST) -> "asyncio.Task[float]":
        delay = Delay(config, self.postponable)
        waiting = asyncio.ensure_future(delay.wait(served=0, newest=lambda: self.newest))
        await asyncio.sleep(4 * rollout.delay.POLL_S)
        return waiting


async def end_of(waiting: "asyncio.Task[float]") -> float:
    return await asyncio.wait_for(waiting, 10.0)


def test_a_version_waits_for_the_groups_under_way_and_no_others() -> None:
    async def scenario() -> None:
        work = Work()
        waiting = await work.put_off()
        work.groups = {"long", "newer"}
        await asyncio.sleep(4 * rollout.delay.POLL_S)
        assert not waiting.done()
        work.groups = {"newer"}
        assert await end_of(waiting) > 0

    asyncio.run(scenario())


def test_it_does_not_wait_where_the_bound_leaves_no_room() -> None:
    async def scenario() -> None:
        assert (await Work(max_staleness=0).put_off()).done()
        assert (await Work(max_staleness=1).put_off()).done()
        work = Work(max_staleness=2)
        waiting = await work.put_off()
        assert not waiting.done()
        work.newest = 2
        await end_of(waiting)

    asyncio.run(scenario())


def test_it_ends_when_the_engine_is_starved_and_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.delay, "STARVED_S", 0.1)

    async def scenario() -> None:
        work = Work()
        waiting = await work.put_off()
        assert not waiting.done()
        work.full = False
        await end_of(waiting)
        await end_of(await Work().put_off(UpdateConfig(delay="longest", delay_s=0.1)))

    asyncio.run(scenario())


def test_without_the_setting_nothing_waits() -> None:
    async def scenario() -> float:
        return await end_of(await Work().put_off(UpdateConfig()))

    assert asyncio.run(scenario()) == 0.0
