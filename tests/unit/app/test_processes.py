"""A command that runs apart: one signal reaches it, whoever is signalled, and nothing of it is left."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

SCRIPT = """
import os, signal, subprocess, sys, time
from app.commands.processes import become_subreaper, end_descendants, run_apart
run_apart({limit})
become_subreaper()
got = []
signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
helper = subprocess.Popen(["sleep", "300"])
print(os.getpid(), helper.pid, flush=True)
while {waits}:
    time.sleep(0.02)
time.sleep(0.3)
print(got, helper.poll(), flush=True)
end_descendants(0.2)
sys.exit(7)
"""


def start(waits="not got", limit=20):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(waits=waits, limit=limit)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]


def wait_until_gone(processes):
    deadline_s = time.monotonic() + 10
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_one_sigterm_arrives_and_the_exit_code_comes_back(send, number):
    process, others = start()
    send(process.pid, number)
    out, _ = process.communicate(timeout=20)
    assert out == f"[{int(signal.SIGTERM)}] None\n"  # what it started got no signal
    assert process.returncode == 7
    wait_until_gone(others)


def test_signals_that_come_twice_do_not_disturb_the_end():
    process, others = start()
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == (f"[{int(signal.SIGTERM)}] None\n", 7)
    wait_until_gone(others)


def test_what_hangs_is_killed_in_time_with_all_that_it_started():
    process, others = start(waits="True", limit=0.5)
    process.terminate()
    assert process.wait(timeout=20) == 1
    wait_until_gone(others)


def test_the_child_is_told_when_the_waiting_process_is_killed():
    process, others = start()
    process.kill()
    wait_until_gone(others)
    assert process.stdout.read() == f"[{int(signal.SIGTERM)}] None\n"


def test_an_end_of_its_own_is_passed_on():
    process, others = start(waits="False")
    assert process.wait(timeout=20) == 7
    wait_until_gone(others)
