import pytest

from benchmarks.studies.idle import make_report, role_of


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("VLLM::Worker", "worker"),
        ("VLLM::EngineCore", "engine core"),
        ("ray::ServeReplica:mace:Executor.record_routing_stats", "executor"),
        ("ray::ServeReplica:mace:Control", "control"),
        ("ray::DriftMonitor", "control"),
        ("ray::ServeController.listen_for_change", "serve controller"),
        ("/env/ray/core/src/ray/raylet/raylet --agent_command=ray/dashboard/agent.py", "raylet and gcs"),
        ("/env/python -u /env/ray/dashboard/dashboard.py --host=127.0.0.1", "dashboard and agents"),
        ("ray::DashboardAgent", "dashboard and agents"),
        ("/env/python /env/bin/mace serve config.yaml", "mace serve"),
        ("ray::IDLE", "other"),
    ],
)
def test_a_process_has_a_role(title, role):
    assert role_of(title) == role


def measured(worker, proxy, first_s):
    cores = {"worker": worker, "proxy": proxy}
    return {"cores": cores, "all_cores": worker + proxy, "first_request_s": {"p50": first_s}}


def test_targets_are_those_of_a_server_with_its_dashboard_or_without():
    found = {"mace": measured(0.01, 0.1, 0.2), "plain": measured(0.01, 0.0, 0.1)}
    with_dashboard, without = make_report(found, has_dashboard=True), make_report(found, has_dashboard=False)
    assert [check["passed"] for check in with_dashboard["checks"]] == [True, True, False]
    assert [check["passed"] for check in without["checks"]] == [True, False, False]
    assert len(make_report({"mace": found["mace"]}, has_dashboard=True)["checks"]) == 2
