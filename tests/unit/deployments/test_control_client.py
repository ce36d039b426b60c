"""The client's lines name methods that the actors have, and foreign errors become ours. Ray is replaced by calls."""

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray.exceptions

from core.config import AppArgs
from core.errors import ControlUnavailableError, InvalidFeedbackError
from core.wire import Headroom
from deployments.control.central_scheduler import CentralScheduler
from deployments.control.client import ControlClient
from deployments.control.deployment import Control
from deployments.control.drift_monitor import DriftMonitor


class RemoteActor:
    """Calls of an object as those of an actor: awaited, and with errors as Ray passes them on."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        async def remote(*args, **kwargs):
            try:
                return getattr(self._actor, name)(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - as Ray does
                raise ray.exceptions.RayTaskError(name, "traceback", error) from None

        return SimpleNamespace(remote=remote)


class FakeHandle:
    """A Serve handle of Control, whose actors live in this process."""

    def __init__(self, tmp_path):
        args = AppArgs.model_validate({"state_dir": str(tmp_path)})
        scheduler = CentralScheduler(args)
        self.actors = {"CentralScheduler": scheduler, "DriftMonitor": DriftMonitor(args, scheduler)}
        self.failure = None
        self.ask = SimpleNamespace(remote=self._ask)

        self.control = object.__new__(Control)  # without its actors
        self.control._actors = {  # noqa: SLF001
            name: RemoteActor(actor) for name, actor in self.actors.items()
        }

    async def _ask(self, *args):
        if self.failure is not None:
            raise self.failure
        return await self.control.ask(*args)


@pytest.fixture
def handle(tmp_path):
    return FakeHandle(tmp_path)


def test_each_call_reaches_the_method_of_its_actor(handle):
    client = ControlClient(handle)
    item = {"prompt": "p", "chosen": "a", "rejected": "b"}

    async def talk():
        [first] = await client.add_feedback([item], "key")
        [again] = await client.add_feedback([item], idempotency_key="key")
        assert (first["status"], again["status"]) == ("accepted", "duplicate")
        assert (await client.import_feedback(b"{broken"))["num_errors"] == 1
        assert len((await client.feedback_page(None, 5, None))["entries"]) == 1
        rows, _ = await client.export_chunk("trl", 0)
        assert rows == [item]
        assert await client.put_responses([]) == 0
        assert await client.rating_counts(0.0) == {}
        held_out = await client.held_out_pairs()
        assert len(held_out.recent) <= 1
        await client.note_live("v0001")
        assert (await client.drift(5, None))["live_version"] == "v0001"
        assert await client.poll(Headroom("e", 1e9, 10.0)) is None
        await client.heartbeat("e")

    asyncio.run(talk())


def test_our_errors_come_through_and_others_mean_that_control_is_away(handle):
    client = ControlClient(handle)
    with pytest.raises(InvalidFeedbackError, match="no feedback item"):
        asyncio.run(client.feedback_page("nope", 5, None))
    for handle.failure in (ray.exceptions.RayActorError(), TimeoutError(), ray.exceptions.GetTimeoutError("late")):
        with pytest.raises(ControlUnavailableError, match="did not answer heartbeat"):
            asyncio.run(client.heartbeat("e"))
    handle.failure = ray.exceptions.RayTaskError("ask", "traceback", ZeroDivisionError())
    with pytest.raises(ControlUnavailableError, match="did not answer poll"):
        asyncio.run(client.poll(Headroom("e", 1e9, 10.0)))


def test_an_executor_imports_no_database():
    code = "import sys, app.http.app; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_refusal_leaves_control_as_a_value_so_that_its_log_has_one_line_and_no_traceback(handle, caplog):
    caplog.set_level("INFO")
    refusal = asyncio.run(handle.control.ask("DriftMonitor", "add_feedback", ([{}], "x" * 300), {}))
    assert isinstance(refusal, InvalidFeedbackError)
    [record] = [one for one in caplog.records if one.name == "deployments.control.deployment"]
    assert (record.levelname, record.exc_info) == ("INFO", None)
    assert "Idempotency-Key" in record.getMessage()
    with pytest.raises(InvalidFeedbackError, match="Idempotency-Key"):
        asyncio.run(ControlClient(handle).add_feedback([{}], "x" * 300))
