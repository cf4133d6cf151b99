"""A door is shut only once nobody stands in it, and stays shut for those who waited at it."""

import asyncio

from rollout.engine.door import Door


def test_who_stands_in_it_holds_it_open() -> None:
    async def scenario() -> None:
        door, inside = Door(), asyncio.Event()
        door.open()

        async def pass_slowly() -> None:
            async with door.passing():
                await inside.wait()

        passing = asyncio.ensure_future(pass_slowly())
        await asyncio.sleep(0)
        shutting = asyncio.ensure_future(door.shut())
        await asyncio.sleep(0.01)
        assert not door.is_open and not shutting.done()
        inside.set()
        await asyncio.wait_for(asyncio.gather(passing, shutting), 5)

    asyncio.run(scenario())


def test_one_who_waited_does_not_slip_through_a_door_that_is_shut_again() -> None:
    """`asyncio.Event.wait` returns once it has been set, whatever it is by then."""

    async def scenario() -> None:
        door, passed = Door(), 0

        async def come_in() -> None:
            nonlocal passed
            async with door.passing():
                passed += 1

        waiting = [asyncio.ensure_future(come_in()) for _ in range(3)]
        await asyncio.sleep(0.01)
        door.open()
        await door.shut()
        await asyncio.sleep(0.01)
        assert passed == 0
        door.open()
        await asyncio.wait_for(asyncio.gather(*waiting), 5)
        assert passed == 3

    asyncio.run(scenario())


def test_a_cancelled_one_leaves_the_door() -> None:
    async def scenario() -> None:
        door = Door()
        door.open()

        async def stay() -> None:
            async with door.passing():
                await asyncio.sleep(60)

        staying = asyncio.ensure_future(stay())
        await asyncio.sleep(0)
        staying.cancel()
        await asyncio.gather(staying, return_exceptions=True)
        await asyncio.wait_for(door.shut(), 5)  # or it would wait for the one who has gone
        assert staying.cancelled() and not door.is_open

    asyncio.run(scenario())
