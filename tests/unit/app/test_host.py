"""What is replaced, what is reported and what is refused on poor hosts."""

import os
import resource
import socket

import pytest

from app.commands import host
from app.commands.host import (
    MAX_FOLDER_BYTES,
    choose_folders,
    files_problem,
    home_problem,
    prepare_host,
    replace_home,
    shared_memory_problem,
)
from core.errors import ConfigError


def test_the_longest_folder_that_is_taken_fits_a_socket_of_ray_and_one_byte_more_does_not():
    assert MAX_FOLDER_BYTES + len(host.LONGEST_SOCKET) == 107
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(FileNotFoundError):
        probe.bind("/nowhere/".ljust(107, "x"))  # no such folder, but not too long
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match="too long"):
        probe.bind("/nowhere/".ljust(108, "x"))


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("folder", ["/tmp/" + "x" * 80, "/tmp/" + "é" * 30, "/proc/sys/nowhere"])
def test_a_folder_that_sockets_cannot_be_in_is_replaced(name, folder):
    environ = {name: folder}
    [notice] = choose_folders(environ)
    assert environ == {name: "/tmp"}
    assert notice.startswith(f"{name}: {folder}")


def test_short_folders_stay_and_without_a_short_one_there_is_one_sentence(monkeypatch):
    environ = {"TMPDIR": "/var/tmp", "RAY_TMPDIR": "/tmp"}
    assert choose_folders(environ) == []
    assert environ == {"TMPDIR": "/var/tmp", "RAY_TMPDIR": "/tmp"}
    monkeypatch.setattr(host, "_SHORT_FOLDERS", ("/proc/sys",))
    with pytest.raises(ConfigError, match=r"^TMPDIR: /proc/sys cannot be written; set TMPDIR to [^\n]*$"):
        choose_folders({})


@pytest.mark.parametrize("home", ["/proc/sys", "/nonexistent/deeper/proc"])
def test_caches_go_elsewhere_where_home_cannot_be_written(tmp_path, monkeypatch, home):
    monkeypatch.setattr(host.tempfile, "gettempdir", lambda: str(tmp_path))
    if home.startswith("/nonexistent") and os.access("/", os.W_OK):
        home = "/proc/nonexistent"
    environ = {"HOME": home, "XDG_CACHE_HOME": ""}
    assert home in home_problem({"HOME": home})
    [notice] = replace_home(environ)
    assert environ == {"HOME": str(tmp_path / f"mace-{os.getuid()}")}
    assert home in notice
    assert home_problem(environ) == ""
    assert replace_home(environ) == []


def test_folders_that_are_named_for_caches_make_home_unnecessary():
    assert home_problem({"HOME": "/proc/sys", "XDG_CACHE_HOME": "/tmp", "XDG_CONFIG_HOME": "/tmp"}) == ""


def test_little_or_no_shared_memory_is_one_sentence(tmp_path, monkeypatch):
    assert shared_memory_problem(tmp_path) == ""
    assert "cannot be written" in shared_memory_problem(tmp_path / "none")
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    assert "1.0 MiB free" in shared_memory_problem(tmp_path)
    assert "\n" not in shared_memory_problem(tmp_path)


def test_the_limit_of_open_files_is_raised_and_a_low_one_is_reported(monkeypatch):
    monkeypatch.setattr(host, "shared_memory_problem", lambda: "")
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, old[1]))
        prepare_host(dict(os.environ))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (old[1], old[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    assert "256 open files" in files_problem(256)
    assert files_problem(resource.RLIM_INFINITY) == ""
