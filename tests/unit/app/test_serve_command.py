"""What `mace serve` checks before anything starts."""

import socket

import pytest

from app.commands import serve
from app.commands.serve import _check_head, _claim, bracketed, check_port
from core.errors import ConfigError


@pytest.mark.parametrize(
    ("family", "host"),
    [
        (socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0"),
        (socket.AF_INET6, "::1"),
        (socket.AF_INET6, "::"),
    ],
)
def test_a_free_port_is_taken_and_a_taken_one_refused(family, host):
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError) as refusal:
            check_port({"host": host, "port": port})
        assert str(refusal.value).startswith(f"{bracketed(host)}:{port} is taken; stop what listens there")
    check_port({"host": host, "port": port})


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_refused(port):
    with pytest.raises(ConfigError, match=f"{port} is no port"):
        check_port({"port": port})


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no.such.host.invalid"])
def test_a_host_that_is_not_ours_is_not_called_taken(host):
    with pytest.raises(ConfigError, match="cannot listen at") as refusal:
        check_port({"host": host, "port": 8000})
    assert host in str(refusal.value)
    assert "taken" not in str(refusal.value)


def test_an_address_of_ray_where_nothing_listens_is_one_sentence():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS is {address}, where no Ray answers [^\n]*$"):
            _check_head(address)
        probe.listen()
        _check_head(address)
        _check_head(f"ray://{address}")
    _check_head("auto")


def test_a_state_directory_has_one_server(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_OWN_LIMIT_S", 0.1)
    state_dir = tmp_path / "new" / "state"
    _claim(state_dir)
    with pytest.raises(ConfigError, match="another `mace serve` uses") as refusal:
        _claim(state_dir)
    assert str(state_dir) in str(refusal.value)
