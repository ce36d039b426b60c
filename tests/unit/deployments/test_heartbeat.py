import asyncio

import pytest

from core.errors import ControlUnavailableError
from deployments.monitors.heartbeat import with_heartbeat


def test_beats_come_while_the_work_lasts_and_its_result_is_returned():
    beats = []

    async def beat():
        beats.append(1)
        raise ControlUnavailableError("away")  # and that does not matter

    async def work():
        await asyncio.sleep(0.1)
        return "done"

    assert asyncio.run(with_heartbeat(work(), beat, interval_s=0.01)) == "done"
    assert len(beats) >= 3


def test_an_error_of_the_work_is_raised():
    async def work():
        raise ValueError("broken")

    async def beat():
        raise AssertionError("not needed")

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(with_heartbeat(work(), beat))


def test_cancelling_cancels_the_work():
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def beat():
        pass

    async def main():
        task = asyncio.create_task(with_heartbeat(work(), beat))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended == [True]
