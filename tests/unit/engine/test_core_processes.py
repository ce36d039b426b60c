"""What is known of the engine's processes, whatever their helpers do."""

import subprocess
import sys
from types import SimpleNamespace

import psutil

from engine.vllm.compat import CoreProcesses

CORE = """
import subprocess, time
ended = subprocess.Popen("true")  # nobody waits for it: it stays as a zombie, whose command line cannot be read
time.sleep(0.5)
worker = subprocess.Popen(["VLLM::Worker", "60"], executable="/bin/sleep")
print(worker.pid, flush=True)
worker.wait()
"""


def test_a_helper_that_has_ended_hides_no_worker():
    core = subprocess.Popen([sys.executable, "-c", CORE], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(core.stdout.readline()))
    assert any(one.status() == psutil.STATUS_ZOMBIE for one in psutil.Process(core.pid).children())
    core.join, core.exitcode = (lambda timeout: core.wait(timeout)), 7
    resources = SimpleNamespace(engine_manager=SimpleNamespace(processes=[core]))
    processes = CoreProcesses(SimpleNamespace(engine_core=SimpleNamespace(resources=resources)))
    assert not processes.has_lost_worker()
    worker.kill()
    core.wait(10)
    assert processes.has_lost_worker()
    assert "exit code 7" in processes.end()
