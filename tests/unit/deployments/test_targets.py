"""`slo: auto`: targets from what four clients see of a quiet server."""

import asyncio
import json

import pytest

from core.config import AppArgs, SloConfig
from core.errors import ProfileError
from deployments.monitors.profiling import with_profile_path
from deployments.monitors.targets import kept_targets, measure_targets, targets_path


class Server:
    """vLLM's application as far as it matters: a first token, then one each `gap_s`."""

    def __init__(self, first_s=0.01, gap_s=0.002, status=200):
        self.first_s, self.gap_s, self.status = first_s, gap_s, status
        self.bodies, self.keys = [], set()

    async def __call__(self, scope, receive, send):
        body = json.loads((await receive())["body"])
        self.bodies.append(body)
        self.keys.add(dict(scope["headers"]).get(b"authorization"))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await asyncio.sleep(self.first_s)
        for _ in range(body["max_tokens"]):
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
            await asyncio.sleep(self.gap_s)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def measure(server, **args):
    return asyncio.run(measure_targets(server, AppArgs(**args), "m@base", 100, 400))


def test_targets_are_one_and_a_half_times_the_p99_that_clients_see():
    server = Server()
    targets = measure(server)
    assert targets.tbt_s == pytest.approx(1.5 * targets.tbt_p99_s, rel=0.05)
    assert targets.ttft_s == pytest.approx(1.5 * targets.ttft_p99_s, rel=0.05)
    assert 0.002 <= targets.tbt_p99_s < targets.ttft_p99_s
    assert targets.num_gaps >= 500
    assert len({tuple(body["prompt"]) for body in server.bodies}) == len(server.bodies)
    assert all(max(body["prompt"]) < 100 and body["model"] == "m@base" for body in server.bodies)


def test_a_server_with_a_key_is_asked_with_it():
    server = Server(first_s=0.0, gap_s=0.001)
    measure(server, engine={"frontend_kwargs": {"api_key": ["secret"]}})
    assert server.keys == {b"Bearer secret"}


def test_a_server_that_refuses_makes_no_targets():
    with pytest.raises(ProfileError, match="HTTP 500"):
        measure(Server(status=500))


def test_targets_are_kept_beside_the_profile_and_a_damaged_file_is_none(tmp_path):
    args = with_profile_path(AppArgs(state_dir=tmp_path, slo="auto"), tmp_path)
    path = targets_path(args)
    assert path.parent == args.profile.path.parent
    assert kept_targets(path) is None
    targets = measure(Server(first_s=0.0, gap_s=0.001))
    targets.save(path)
    assert kept_targets(path) == targets
    assert targets.slo.auto
    path.write_text("{}")
    assert kept_targets(path) is None


def test_auto_is_a_word_or_a_setting_and_survives_the_way_into_the_engine():
    args = AppArgs(slo="auto")
    assert args == AppArgs(slo={"auto": True})
    assert AppArgs(**args.model_dump(mode="json")) == args
    assert SloConfig().auto is False
    with pytest.raises(ValueError, match="slo"):
        AppArgs(slo="automatic")
