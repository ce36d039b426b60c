"""Free TCP ports, for servers that measurements and tests start."""

import socket


def free_port() -> int:
    """Of 127.0.0.1. Free when asked; nobody else's before it is used, we hope."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
